"""Build the wheel, and use it in an empty environment of each Python: writes results/library/package.json.

    python experiments/package.py python3.11 python3.12 python3.13      # make package; minutes, and a package index

In each: ``pip install WHEEL`` brings torch, safetensors and what these need; the blocks of the tutorial run. Then, with
transformers and accelerate beside it, the blocks of README's section "The library" run, and a Trainer that is killed
goes on. The standard library is all that this script needs.
"""

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BUILT_FROM = ("pyproject.toml", "README.md", "LICENSE", "requirements.in", "requirements-dev.in")
DIRECT = ["safetensors", "torch"]
WITH_TRANSFORMERS = ("transformers", "accelerate")
LOOK = r"""
import json, re, sys
from importlib import metadata, util
import sparsegrad
installed = {found.metadata["Name"].lower(): found.version for found in metadata.distributions()}
needed = [line for line in metadata.requires("sparsegrad") if "extra ==" not in line]
print(json.dumps({
    "python": sys.version.split()[0],
    "version": sparsegrad.__version__,
    "needs": sorted(re.match(r"[\w-]+", line)[0] for line in needed),
    "finetune": util.find_spec("finetune") is not None,
    "installed": dict(sorted(installed.items())),
}))
"""


def build(folder: Path) -> Path:
    """The wheel, from a copy: a checkout may hold what earlier builds have left."""
    copy = folder / "copy"
    copy.mkdir()
    for name in BUILT_FROM:
        shutil.copy(ROOT / name, copy)
    shutil.copytree(ROOT / "src", copy / "src", ignore=shutil.ignore_patterns("*.egg-info", "__pycache__"))
    run([sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", folder / "built", copy], folder)
    (wheel,) = (folder / "built").iterdir()
    return wheel


def run(command: list, folder: Path) -> str:
    """Standard output of a command that works in a folder, away from the checkout.

    Raises:
        RuntimeError: with the end of what it said, if it fails.
    """
    done = subprocess.run([str(word) for word in command], cwd=folder, env=alone(), capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(map(str, command))} ended with {done.returncode}:\n{done.stderr[-4000:]}")
    return done.stdout


def alone() -> dict[str, str]:
    """The environment without what would find a checkout; one thread, as tiny tensors want it."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}


def blocks(page: str, heading: str = "") -> list[str]:
    """The Python of a page, or of one of its sections."""
    text = (ROOT / page).read_text()
    if heading:
        text = text.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    return re.findall(r"```python\n(.*?)```", text, re.S)


def kill_and_go_on(python: Path, folder: Path) -> None:
    """The Trainer example, killed after its first checkpoint and started again."""
    command = [str(python), str(ROOT / "examples" / "trainer.py"), "--output", "trained"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    started = subprocess.Popen(command, cwd=folder, env=alone(), **quiet)
    while started.poll() is None and not list(folder.glob("trained/checkpoint-*/trainer_state.json")):
        time.sleep(0.05)
    started.send_signal(signal.SIGKILL)
    if started.wait() != -signal.SIGKILL:
        raise RuntimeError(f"{' '.join(command)} ended before it was killed.")
    run(command, folder)


def use(python: str, wheel: Path, folder: Path) -> dict:
    """What one Python's empty environment got and did: seconds of each step.

    Raises:
        RuntimeError: if a step fails, or the wheel brings something else than the library and what it needs.
    """
    folder.mkdir()
    run([python, "-m", "venv", folder / "env"], folder)
    own, took = folder / "env" / "bin" / "python", {}

    def step(name: str, what, *arguments) -> None:
        begun = time.monotonic()
        what(*arguments)
        took[name] = round(time.monotonic() - begun, 1)
        print(f"{python}: {name}, {took[name]} s", flush=True)

    step("install", run, [own, "-m", "pip", "install", "-q", wheel], folder)
    found = json.loads(run([own, "-c", LOOK], folder))
    if found["needs"] != DIRECT or found["finetune"] or "transformers" in found["installed"]:
        raise RuntimeError(f"{wheel.name} brought more than the library: {found}")
    (folder / "tutorial.py").write_text("\n".join(blocks("docs/tutorial.md")))
    step("tutorial", run, [own, "tutorial.py"], folder)
    step("install transformers", run, [own, "-m", "pip", "install", "-q", *WITH_TRANSFORMERS], folder)
    beside = json.loads(run([own, "-c", LOOK], folder))["installed"]
    (folder / "readme.py").write_text("\n".join(blocks("README.md", "The library")))
    step("readme", run, [own, "readme.py"], folder)
    step("trainer, killed and resumed", kill_and_go_on, own, folder)
    return found | {"beside": {name: beside[name] for name in WITH_TRANSFORMERS}, "seconds": took}


def main() -> None:
    """Build, use, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pythons", nargs="+", help="interpreters, such as python3.11")
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "library" / "package.json")
    given = parser.parse_args()
    for python in given.pythons:  # a version manager may have a command that starts nothing
        if not shutil.which(python) or subprocess.run([python, "-c", ""], capture_output=True).returncode != 0:
            parser.error(f"{python} does not start: name interpreters that do, make package PYTHONS=python3.11")
    found: list[dict] = []
    given.output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        wheel = build(folder)
        held = sorted({name.partition("/")[0] for name in zipfile.ZipFile(wheel).namelist()})
        for number, python in enumerate(given.pythons):
            found.append(use(python, wheel, folder / str(number)))
            shutil.rmtree(folder / str(number))  # gigabytes, where torch is CUDA's build
            record = {"wheel": wheel.name, "holds": held, "environments": found}
            given.output.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
