"""What a card is asked, most telling first: the parts of :mod:`finetune.efficiency.card`.

Everything that they read lies in ``conf``: models, protocols, scales, and the token lengths of the GLUE tasks whose
data were at hand (MNLI's, QQP's and SST-2's were not).
"""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from finetune.efficiency import cost_curves, hosvd_cost, machine
from finetune.efficiency.lengths import Lengths, read_lengths, rows_of
from finetune.efficiency.rotation import RotationOptions, measure_rotation
from finetune.efficiency.stage import Stage
from finetune.efficiency.step_parts import step_parts
from finetune.efficiency.task import EfficiencyOptions, measure_task
from finetune.store import records
from finetune.store.files import read_yaml

TEST_SECONDS = 90  # after which the CUDA tests are ended
_WORDS = "PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS"
OUTCOME = re.compile(rf"^(?:\[gw\d+\].*?({_WORDS}) )?(\S+::.*?)(?: ({_WORDS})\b.*| *)$", re.MULTILINE)
"""A line of a test's end; of several workers the outcome comes first."""
CHOICES = ("full", "folded", "folded_backward", "folded_float32", "folded_tf32", "folded_bf16")
DECODER_VARIANTS = ("full", "lora", "folded", "truncated_input")
FIRST_TASKS, OTHER_TASKS = ("cola", "mrpc"), ("stsb", "rte", "qnli")


@dataclass(frozen=True)
class Part:
    """One record.

    Attributes:
        name: for ``--only`` and the log.
        path: of the record, below the output folder.
        seconds: that it is thought to take.
        group: of parts that take about as long.
        asked: what decides it, beside the code and its files.
        run: writes the record, from the stage that it is given.
    """

    name: str
    path: str
    seconds: float
    group: str
    asked: Mapping[str, Any]
    run: Callable[[Stage], Any]


@dataclass(frozen=True)
class Sizes:
    """What differs between a card and a try on a CPU.

    Attributes:
        encoder, decoder: names in ``conf/model``.
        scale: name in ``conf/scale/*``.
        precision: of the protocol ``sound`` and of decoders.
        rows: of a decoder's batches, without and with checkpointing.
        tokens: of a decoder's row.
        vocabulary: where a model's file names none.
    """

    encoder: str = "roberta_base"
    decoder: str = "llama2_7b"
    scale: str = "card"
    precision: str = "bf16"
    rows: tuple[tuple[int, bool], ...] = ((8, False), (8, True), (2, False))
    tokens: int = 512
    vocabulary: int | None = None


SMOKE = Sizes("tiny_roberta", "tiny_llama", "smoke", rows=((2, False), (2, True)), tokens=16, vocabulary=300)


def plan(root: Path, device: str, sizes: Sizes, rotation: Path | None) -> list[Part]:
    """All parts, in the order of what tells most.

    Args:
        root: of the project: ``conf`` and ``tests`` are read.
        device: ``auto``, ``cpu`` or ``cuda``.
        sizes: of models and records.
        rotation: folder of prepared inputs (:mod:`finetune.efficiency.rotation_inputs`); None leaves that part out.

    Raises:
        ValueError: if a file is missing or damaged.
    """
    encoders, conf = _Encoders(root / "conf", device, sizes), root / "conf"
    decoders = list(_decoders(conf, device, sizes))
    both = [encoders.part(protocol, task, graphs) for protocol, task in _FIRST for graphs in ("off", "auto")]
    tests = Part("cuda_tests", "cuda_tests.json", 45, "tests", {"of": "tests"}, partial(_cuda_tests, root))
    return [
        tests,
        *both,
        *(encoders.part("sound", f"tokens{tokens}", graphs) for tokens in (16, 128) for graphs in ("auto", "off")),
        _parts_of_a_step(encoders, device),
        *decoders[:-1],
        *(encoders.part(protocol, task, "off", CHOICES) for protocol, task in (("sound", "mrpc"), ("printed", "cola"))),
        *([_rotation(rotation, device)] if rotation else []),
        _hosvd(conf, device, sizes),
        decoders[-1],
        _curves(conf, device, sizes),
        encoders.part("printed", "mrpc", "off"),
        *(encoders.part(p, task, graphs) for task in OTHER_TASKS for p, graphs in _OTHER),
    ]


_FIRST = (("sound", "cola"), ("sound", "mrpc"), ("printed", "cola"))
_OTHER = (("sound", "off"), ("sound", "auto"), ("printed", "off"))


class _Encoders:
    """Parts of the paper's encoder."""

    def __init__(self, conf: Path, device: str, sizes: Sizes) -> None:
        self.conf, self.device, self.sizes = conf, device, sizes
        self.model = _model(conf, sizes.encoder, sizes.vocabulary)
        self.scale = read_yaml(conf / "scale" / "efficiency" / f"{sizes.scale}.yaml")
        self.tasks = read_yaml(conf / "data" / "glue.yaml")["tasks"]

    def part(self, protocol: str, task: str, graphs: str, variants: Sequence[str] | None = None) -> Part:
        """All variants of a protocol on a task's lengths, or the named ones."""
        group, scale = read_yaml(self.conf / "protocol" / f"{protocol}.yaml"), self.scale
        options = EfficiencyOptions(
            **{name: scale[name] for name in ("batch_size", "batches", "rounds", "warmup_steps", "keep")},
            padding=group["padding"],
            max_length=min(group["max_length"], self.model["architecture"]["max_position_embeddings"] - 2),
            precision=self.sizes.precision if protocol == "sound" else group["precision"],
            variants=variants,
            device=self.device,
            num_labels=self.tasks[task]["num_labels"] if task in self.tasks else 2,
            graphs=graphs,
        )
        suffix = ("-graphs" if graphs != "off" else "") + ("-folded" if variants else "")
        name = f"{protocol}{suffix}/{task}"
        own = "" if protocol == "printed" and not suffix else f"-{protocol}{suffix}"
        lengths = self._fixed(task) or read_lengths(self.conf / "lengths" / "roberta_base" / f"{task}.json")
        path = f"efficiency/{self.sizes.encoder}{own}/{task}.json"
        kind, seconds = ("eager", 20) if graphs == "off" else ("graphs", 25)
        return _measured(name, path, seconds, self.model, group, lengths, options, f"{kind}, {len(variants or ())}")

    def _fixed(self, task: str) -> Lengths | None:
        """Rows of one length, of a name such as tokens16."""
        tokens = task.removeprefix("tokens")
        rows = (int(tokens),) * self.scale["batch_size"] if tokens.isdecimal() else ()
        return Lengths(task, f"rows of {tokens} tokens", rows) if rows else None


def _decoders(conf: Path, device: str, sizes: Sizes) -> Iterator[Part]:
    model = _model(conf, sizes.decoder, sizes.vocabulary)
    protocol = read_yaml(conf / "protocol" / "llama" / "sound.yaml")
    for rows, checkpointing in sizes.rows:
        options = EfficiencyOptions(
            batch_size=rows,
            batches=3,
            rounds=2,
            warmup_steps=2,
            max_length=sizes.tokens,
            precision=sizes.precision,
            variants=DECODER_VARIANTS,
            keep="each_round",
            device=device,
            checkpointing=checkpointing,
        )
        suffix = "-checkpointing" if checkpointing else ""
        lengths = rows_of(rows, sizes.tokens)
        path = f"efficiency/{sizes.decoder}{suffix}/{lengths.task}.json"
        yield _measured(f"decoder{suffix}/{lengths.task}", path, 45, model, protocol, lengths, options, "decoder")


def _measured(
    name: str,
    path: str,
    seconds: float,
    model: Mapping[str, Any],
    protocol: Mapping[str, Any],
    lengths: Lengths,
    options: EfficiencyOptions,
    group: str,
) -> Part:
    asked = {"model": model, "protocol": protocol, "lengths": lengths.content(), "options": asdict(options)}
    return Part(name, path, seconds, group, asked, partial(measure_task, model, protocol, lengths, options))


def _model(conf: Path, name: str, vocabulary: int | None) -> dict[str, Any]:
    found = dict(read_yaml(conf / "model" / f"{name}.yaml"))
    if vocabulary is not None:
        found["architecture"] = {"vocab_size": vocabulary} | found["architecture"]
    return found


def _parts_of_a_step(encoders: _Encoders, device: str) -> Part:
    protocol = read_yaml(encoders.conf / "protocol" / "sound.yaml")
    sizes = {"rows": encoders.scale["batch_size"], "tokens": 16}

    def run(stage: Stage) -> None:
        found = step_parts(encoders.model, protocol, **sizes, device=machine.find_device(device))
        records.write_json(stage.path, found | {"provenance": records.provenance(commit=stage.commit)})

    asked = {"model": encoders.model, "protocol": protocol, **sizes}
    return Part("profile", "profile.json", 20, "profile", asked, run)


def _hosvd(conf: Path, device: str, sizes: Sizes) -> Part:
    config = _script(conf, "hosvd_cost", device, sizes)
    cases, options = hosvd_cost.read_config(config)
    asked = {"cases": [asdict(case) for case in cases], "options": asdict(options)}
    run = partial(hosvd_cost.hosvd_cost, cases, options)
    return Part("hosvd_cost", "hosvd_cost.json", 40, "hosvd", asked, run)


def _curves(conf: Path, device: str, sizes: Sizes) -> Part:
    config = _script(conf, "cost_curves", device, sizes)
    config |= {name: config["scale"][name] for name in ("precision", "clock")}
    options = cost_curves.read_config(config)
    run = partial(cost_curves.cost_curves, options)
    return Part("cost_curves", "cost_curves.json", 45, "curves", asdict(options), run)


def _script(conf: Path, name: str, device: str, sizes: Sizes) -> dict[str, Any]:
    """The configuration of a script whose scale is all that it composes."""
    scale = read_yaml(conf / "scale" / name / f"{sizes.scale}.yaml")
    return read_yaml(conf / f"{name}.yaml") | {"scale": scale, "device": device, "threads": scale["threads"]}


def _rotation(folder: Path, device: str) -> Part:
    examples = sorted(str(path) for path in folder.glob("*.safetensors") if not path.name.startswith("model"))
    if not examples:
        raise ValueError(f"--rotation {folder} holds no examples: python -m finetune.efficiency.rotation_inputs --help")
    options = RotationOptions(device=device)
    run = partial(measure_rotation, folder, examples, options)
    asked = {"folder": str(folder), "examples": examples, "options": asdict(options)}
    return Part("rotation", "rotation.json", 60 * len(examples), "rotation", asked, run)


def _cuda_tests(root: Path, stage: Stage) -> None:
    """Run the tests that need a CUDA device, in a process of their own, and write what came out.

    The record has ``counts`` by outcome, ``tests`` (name -> outcome), ``exit_code`` (None: ended after 90 s),
    ``seconds``, and the ``end`` of what pytest said.
    """
    files = sorted(str(p.relative_to(root)) for p in (root / "tests").rglob("test_*.py") if _has_cuda(p))
    command = [sys.executable, "-m", "pytest", "-m", "cuda", "-v", "--tb=short", "-p", "no:cacheprovider", *files]
    command += ["-p", "no:benchmark"]  # it warns of several workers, and warnings are errors
    command += ["--continue-on-collection-errors", *(["-n", "4"] if find_spec("xdist") else [])]
    command += ["-W", "ignore::pytest.PytestConfigWarning"]  # an option of a plugin that is not there
    started = time.monotonic()
    try:
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=TEST_SECONDS)
        said, code = done.stdout + done.stderr, done.returncode
    except subprocess.TimeoutExpired as error:
        said, code = bytes(error.stdout or b"").decode(errors="replace"), None
    outcomes = {name: first or last for first, name, last in OUTCOME.findall(said) if first or last}
    found = sorted(outcomes.values())
    record = {
        "counts": {outcome.lower(): found.count(outcome) for outcome in dict.fromkeys(found)},
        "tests": outcomes,
        "exit_code": code,
        "seconds": time.monotonic() - started,
        "end": said[-6000:],
        "provenance": records.provenance(commit=stage.commit),
    }
    records.write_json(stage.path, record)


def _has_cuda(path: Path) -> bool:
    return "mark.cuda" in path.read_text(encoding="utf-8")
