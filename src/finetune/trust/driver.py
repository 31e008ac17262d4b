"""A stage as a process of its own that can be killed, or refused a file, at every call that changes a file.

The process is forked, so that torch and transformers are imported once. Python's audit events and wrapped ``os.fsync``
and ``os.write`` say when a file is changed; a limit on a file's size stops writers outside Python within a file.
"""

from __future__ import annotations

import errno
import fcntl
import importlib
import json
import locale
import os
import resource
import runpy
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PRELOADED = (
    "accelerate", "fastchat.llm_judge.common", "hydra", "matplotlib.pyplot", "peft", "scipy.stats", "sklearn.metrics",
    "transformers.models.bert.modeling_bert", "transformers.models.llama.modeling_llama", "finetune.runs.cells",
    "finetune.runs.search", "finetune.mt_bench.answer_cells", "finetune.mt_bench.judgment_cells",
    "finetune.report.page.inputs", "finetune.energy.cell", "finetune.efficiency.cell",
)  # fmt: skip
ROOMY = ("open", "os.mkdir", "os.write", "os.fsync")
"""Events that a full disk refuses."""

ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled"}
OUTSIDE = ("SPARSEGRAD_DATA", "RANK", "WORLD_SIZE", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "SSL_CERT_FILE")
"""Variables that a stage does not see, unless a fault sets them."""

PIPE_BYTES = 2**20
_EVENTS = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link", "os.symlink", "open"}
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


@dataclass(frozen=True)
class Outcome:
    """How a process ended.

    Attributes:
        code: exit code; negative: the signal that ended it.
        err: what it said, on both streams.
        seconds: until its end, or until the limit.
        hung: whether it was ended at the limit.
        events: ``open a.json`` and so on, in order: calls that changed files below its folder.
    """

    code: int
    err: str = ""
    seconds: float = 0.0
    hung: bool = False
    events: tuple[str, ...] = ()


@dataclass(frozen=True)
class Trouble:
    """What happens to a process, and when. Plain values: it stands in the record.

    Attributes:
        kind: ``none``; ``kill`` or ``pause``: before an event; ``delay``: killed after so many seconds; ``bytes``:
            killed when a file grows beyond so many bytes; ``full``: the disk is full from an event on;
            ``large``: no file may grow beyond so many bytes; ``readonly``: all below ``place`` is; ``flock``: there
            is none; ``locale``: files are ASCII unless a script says otherwise.
        at: number of the event, from 0; or seconds; or bytes.
        place: a path relative to the folder; empty: all of it.
    """

    kind: str = "none"
    at: float = 0
    place: str = ""


@dataclass
class Watch:
    """Notes a process' file events below a folder, and makes trouble at one of them."""

    folder: Path
    trouble: Trouble
    note: int
    events: list[str] = field(default_factory=list)

    def save(self) -> None:
        """Write the events down, unless files may not grow."""
        if self.trouble.kind not in ("bytes", "large"):
            os.ftruncate(self.note, 0)
            os.pwrite(self.note, json.dumps(self.events).encode(), 0)

    def install(self) -> None:
        """Begin, in the process that is watched; there is no end."""
        kind, at = self.trouble.kind, int(self.trouble.at)
        if kind in ("bytes", "large"):
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL if kind == "bytes" else signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            resource.setrlimit(resource.RLIMIT_FSIZE, (at, at))
        if kind == "flock":
            fcntl.flock = _refuse(errno.ENOLCK)
        if kind == "locale":
            locale.setlocale(locale.LC_CTYPE, "C")
        for name in ("write", "fsync"):
            setattr(os, name, self._wrapped(name, getattr(os, name)))
        sys.addaudithook(self._hook)

    def _wrapped(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def watched(handle: int, *rest: Any) -> Any:
            path = f"/proc/self/fd/{handle}"
            target = os.readlink(path) if os.path.islink(path) else ""
            if name == "write" and self._is_last(target) and rest and len(rest[0]) > 1:
                call(handle, bytes(rest[0])[: len(rest[0]) // 2])
            if target.startswith(f"{self.folder}/"):
                self._note(f"os.{name}", target)
            return call(handle, *rest)

        return watched

    def _is_last(self, target: str) -> bool:
        there = target.startswith(f"{self.folder}/")
        return there and self.trouble.kind in ("kill", "full") and len(self.events) == int(self.trouble.at)

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event not in _EVENTS or (event == "open" and not int(arguments[2] or 0) & _WRITING):
            return
        if isinstance(arguments[0], int):  # a handle that is open already: its opening was the event
            return
        self._note(event, os.path.join(self.folder, os.fsdecode(arguments[0])))

    def _note(self, event: str, path: str) -> None:
        inside = os.path.relpath(path, self.folder)
        if inside.startswith("..") or inside.startswith("outputs/hydra"):
            return
        number, trouble = len(self.events), self.trouble
        self.events.append(f"{event} {inside}")
        if trouble.kind in ("kill", "pause") and number == int(trouble.at):
            self.save()
            os.kill(os.getpid(), signal.SIGKILL if trouble.kind == "kill" else signal.SIGSTOP)
        if trouble.kind == "full" and number >= int(trouble.at) and event in ROOMY:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)
        if trouble.kind == "readonly" and f"{inside}/".startswith(f"{trouble.place}/".lstrip("/")):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), path)


def _refuse(number: int) -> Callable[..., Any]:
    def refused(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    return refused


def preload() -> None:
    """Import once what every stage would import."""
    for name in PRELOADED:
        importlib.import_module(name)


@dataclass(frozen=True)
class Process:
    """A forked process, and the end of a pipe with what it says."""

    pid: int
    folder: Path
    says: int


def start(folder: Path, words: Sequence[str], trouble: Trouble, env: Mapping[str, str | None]) -> Process:
    """Fork a script of a folder there. A pipe takes what it says: no limit on files holds for that."""
    from hydra.core.global_hydra import GlobalHydra

    reading, writing = os.pipe()
    fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
    pid = os.fork()
    if pid:
        os.close(writing)
        os.set_blocking(reading, False)
        return Process(pid, folder, reading)
    code = 1
    try:
        os.setsid()
        os.chdir(folder)
        GlobalHydra.instance().clear()
        for stream in (1, 2):
            os.dup2(writing, stream)
        code = _script(folder, words, trouble, env)
    except BaseException:
        traceback.print_exc()
    finally:
        with suppress(BaseException):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _script(folder: Path, words: Sequence[str], trouble: Trouble, env: Mapping[str, str | None]) -> int:
    """In the forked process: run the script; its exit code."""
    for name, value in {**dict.fromkeys(OUTSIDE), **ENVIRONMENT, **env}.items():
        os.environ.pop(name, None) if value is None else os.environ.update({name: value})
    sys.argv = [str(folder / words[0]), *words[1:]]
    sys.path[0] = str(folder / "experiments")
    sys.stdout, sys.stderr = (os.fdopen(n, "w", buffering=1, closefd=False) for n in (1, 2))
    code, note = 0, os.open(f"{folder}.events", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    watch = Watch(folder, trouble, note)
    watch.install()
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as exit:
        code = exit.code if isinstance(exit.code, int) else int(exit.code is not None)
        if isinstance(exit.code, str):
            sys.stderr.write(exit.code + "\n")
    except BaseException:
        traceback.print_exc()
        code = 1
    watch.save()
    return code


def finish(process: Process, limit: float, kill_after: float | None = None) -> Outcome:
    """Wait for a process; end it at the limit, or kill it after some seconds."""
    began, hung, handle = time.monotonic(), False, os.pidfd_open(process.pid)
    try:
        if not select.select([handle], [], [], limit if kill_after is None else kill_after)[0]:
            hung = kill_after is None
            os.killpg(process.pid, signal.SIGKILL)
        code = os.waitstatus_to_exitcode(os.waitpid(process.pid, 0)[1])
    finally:
        os.close(handle)
    with suppress(ProcessLookupError):  # what it started
        os.killpg(process.pid, signal.SIGKILL)
    said = b""
    with suppress(BlockingIOError):  # a process that it started may hold the pipe
        said = os.read(process.says, PIPE_BYTES)
    os.close(process.says)
    seconds = time.monotonic() - began
    return Outcome(code, said.decode(errors="replace"), seconds, hung, events_of(process.folder))


def events_of(folder: Path) -> tuple[str, ...]:
    """What the last process of a folder noted: at its end, where it was killed, or where it stands still."""
    path = Path(f"{folder}.events")
    return tuple(json.loads(path.read_text() or "[]")) if path.is_file() else ()


def run(
    folder: Path,
    words: Sequence[str],
    trouble: Trouble | None = None,
    *,
    limit: float,
    env: Mapping[str, str | None] | None = None,
) -> Outcome:
    """Run a script of a folder there, in a forked process.

    Args:
        folder: holds ``experiments`` and ``conf``.
        words: path of the script, and its arguments.
        trouble: what happens to it.
        limit: seconds; what takes longer hangs.
        env: changes of the environment; None takes a variable away.
    """
    trouble = trouble or Trouble()
    process = start(folder, words, trouble, env or {})
    return finish(process, limit, trouble.at if trouble.kind == "delay" else None)
