"""experiments/fetch.py as a user runs it: a process, its output, its exit code, the files it leaves."""

import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import hub_mirror
import pytest
import yaml

from finetune.fetch import fetching

ROOT = Path(__file__).resolve().parents[2]
COMMIT = "0123456789abcdef0123456789abcdef01234567"
WEIGHTS = os.urandom(1 << 20)
MODELS = {
    "tiny": {
        "checkpoint": "acme/tiny",
        "revision": COMMIT,
        "folder": "models/tiny",
        "files": ["config.json", "model.safetensors"],
        "checksums": {"model.safetensors": hashlib.sha256(WEIGHTS).hexdigest()},
    },
    "made": {"checkpoint": None, "revision": None, "folder": "models/made", "files": []},
}
QUESTIONS = b'{"question_id": 81}\n'
GLUE = {"root": "${oc.env:SPARSEGRAD_DATA,data}", "folder": "glue", "source": "acme/glue", "revision": COMMIT}
CHAT = {"name": "oasst1", "root": "data", "folder": "oasst1", "source": "acme/oasst1", "revision": COMMIT}
CHAT["files"] = ["data/train-*.parquet", "data/validation-*.parquet"]
SOURCE = {"repo": "acme/FastChat", "revision": "v0.2.36", "path": "data/mt_bench/question.jsonl"}
SOURCE |= {"file": "question.jsonl", "sha256": hashlib.sha256(QUESTIONS).hexdigest()}
EXPERIMENTS = {
    "real": {"models": ["tiny"], "tasks": ["cola"], "decoders": ["made"], "questions": "mt_bench"},
    "smoke": {"models": ["made"], "data": "generated", "tasks": ["cola"]},
}


@pytest.fixture
def mirror():
    with hub_mirror.HubMirror() as server:
        files = {"config.json": b"{}", "model.safetensors": WEIGHTS}
        server.repos["models", "acme/tiny"] = hub_mirror.Repo(COMMIT, files)
        server.repos["datasets", "acme/glue"] = hub_mirror.Repo(COMMIT, {"cola/train-0.parquet": b"PAR1"})
        server.repos["datasets", "acme/oasst1"] = hub_mirror.Repo(
            COMMIT, {"data/train-0.parquet": b"PAR1 t", "data/validation-0.parquet": b"PAR1 v", "more.jsonl.gz": b""}
        )
        server.repos["raw", "acme/FastChat"] = hub_mirror.Repo("v0.2.36", {"data/mt_bench/question.jsonl": QUESTIONS})
        yield server


@pytest.fixture
def project(tmp_path):
    """The script in a project of its own: other models, so that the real ones' pins and sizes don't matter."""
    for name in ("experiments/fetch.py", "conf/fetch.yaml", "conf/script.yaml", "experiments/base.yaml"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    files = {f"conf/model/{name}.yaml": config for name, config in MODELS.items()}
    files |= {f"experiments/{name}.yaml": config for name, config in EXPERIMENTS.items()}
    files |= {"conf/data/glue.yaml": {**GLUE, "tasks": {"cola": {}}}, "conf/data/generated.yaml": {"name": "generated"}}
    files |= {
        "conf/chat/oasst1.yaml": CHAT,
        "conf/questions/mt_bench.yaml": {"folder": "mt_bench", "sources": [SOURCE]},
    }
    for name, config in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(yaml.safe_dump(config))
    return tmp_path


def command(project, mirror, *overrides, **environment):
    clean = {
        k: v
        for k, v in os.environ.items()
        if not re.match("HF_|HUGGING|TRANSFORMERS_|SPARSEGRAD_|HYDRA_|GITHUB_RAW_", k)
    }
    ours = {"PYTHONPATH": str(ROOT / "src"), "HF_ENDPOINT": mirror.endpoint, "NO_PROXY": "127.0.0.1,localhost"}
    ours["GITHUB_RAW_ENDPOINT"] = mirror.raw_endpoint
    ours["HF_HOME"] = str(project / "outputs/huggingface")
    args = [sys.executable, "-W", "error", "experiments/fetch.py", *overrides]
    return {"args": args, "cwd": project, "env": clean | ours | environment}


def launch(project, mirror, *overrides, experiment="real", **environment):
    overrides = (f"experiment=experiments/{experiment}.yaml", *overrides)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "timeout": 60}
    return subprocess.run(**command(project, mirror, *overrides, **environment), **pipes)


def test_dry_run_then_fetch_then_verify(project, mirror):
    dry = launch(project, mirror, "dry_run=true")
    assert dry.returncode == 0, dry.stdout
    assert f"models/tiny: acme/tiny@{COMMIT}, 2 files, 1.0 MB: 1.0 MB to download" in dry.stdout
    assert "mt_bench: acme/FastChat@v0.2.36, 1 files, 20 B: 20 B to download" in dry.stdout
    assert "glue/cola: acme/glue@" in dry.stdout and "to download: 1.0 MB, into data" in dry.stdout
    assert mirror.bodies == [] and not (project / "data").exists()

    first = launch(project, mirror)
    assert first.returncode == 0, first.stdout
    assert "4 of 4 folders are complete under data" in first.stdout
    assert "/cdn/" not in first.stdout, "addresses that carry a signature stay out of the log"
    found = {str(p.relative_to(project / "data")) for p in (project / "data").rglob("*") if p.is_file()}
    content = {
        "glue/cola": ["train-0.parquet"],
        "models/tiny": ["config.json", "model.safetensors"],
        "mt_bench": ["question.jsonl"],
        "oasst1": ["data/train-0.parquet", "data/validation-0.parquet"],
    }
    assert found == {f"{folder}/{name}" for folder, names in content.items() for name in ["SHA256SUMS", *names]}
    assert {p.name for p in project.iterdir()} == {"conf", "data", "experiments", "outputs"}

    mirror.requests.clear()
    again = launch(project, mirror, HF_HUB_OFFLINE="1")
    assert again.returncode == 0 and mirror.requests == [], again.stdout
    for path in ("models/tiny/config.json", "mt_bench/question.jsonl"):
        (project / "data" / path).write_text("[]")
    bad = launch(project, mirror, "verify=true", HF_HUB_OFFLINE="1")
    assert bad.returncode == 1 and "config.json: expected" in bad.stdout and "question.jsonl: expected" in bad.stdout
    assert "2 of 4 folders are complete" in bad.stdout and mirror.requests == []
    assert (project / "data/models/tiny/config.json.corrupt").read_text() == "[]"
    mirror.repos["raw", "acme/FastChat"].files.clear()
    gone = launch(project, mirror)
    assert gone.returncode == 1 and "there is no " in gone.stdout and "Traceback" not in gone.stdout


def test_resumes_after_a_kill(project, mirror):
    body = os.urandom(24 << 20)  # huggingface_hub writes blocks of 10 MiB
    repo = mirror.repos["models", "acme/tiny"]
    repo.files["model.safetensors"], repo.cuts["model.safetensors"] = body, [(15 << 20, "stall")]
    (project / "conf/model/tiny.yaml").write_text(yaml.safe_dump(MODELS["tiny"] | {"checksums": {}}))
    folder = project / "elsewhere/models/tiny"
    overrides = ("experiment=experiments/real.yaml", f"data.root={project / 'elsewhere'}")
    with subprocess.Popen(
        **command(project, mirror, *overrides), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline and not any(p.stat().st_size for p in folder.glob("model.*.incomplete")):
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
    mirror.released.set()
    (partial,) = folder.glob("model.*.incomplete")
    kept = partial.stat().st_size
    assert 0 < kept < len(body) and not (folder / "SHA256SUMS").exists()

    second = launch(project, mirror, overrides[1])
    assert second.returncode == 0, second.stdout
    assert ("model.safetensors", kept, len(body) - kept) in mirror.bodies
    assert (folder / "model.safetensors").read_bytes() == body


def test_gated_model(project, mirror):
    mirror.repos["models", "acme/tiny"].token = "hf_secret"
    refused = launch(project, mirror)
    assert refused.returncode == 1
    assert "accept the licence at" in refused.stdout and "HF_TOKEN is not set" in refused.stdout
    assert "Traceback" not in refused.stdout
    assert (project / "data/glue/cola/SHA256SUMS").exists(), "what is free is fetched all the same"
    assert launch(project, mirror, HF_TOKEN="hf_secret").returncode == 0
    assert mirror.leaked_tokens == []


@pytest.mark.parametrize(
    ("overrides", "environment", "message"),
    [
        ([], {"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE (or TRANSFORMERS_OFFLINE) is set: unset it"),
        (["dry_run=true"], {"HF_ENDPOINT": "http://127.0.0.1:9"}, "http://127.0.0.1:9 can't be reached"),
        (["experiment=experiments/none.yaml"], {}, "its folder has base.yaml, real.yaml, smoke.yaml"),
        (["verify=true"], {}, "has no SHA256SUMS: run fetch without verify=true"),
        (["experiment=???"], {}, "Missing mandatory value: experiment"),
    ],
)
def test_errors_are_one_line_and_exit_code_1(project, mirror, overrides, environment, message):
    failed = launch(project, mirror, *overrides, **environment)
    assert failed.returncode == 1 and message in failed.stdout, failed.stdout
    assert "Traceback" not in failed.stdout
    assert {name for name, *_ in mirror.bodies} <= {SOURCE["path"]}  # the hub's switch is not GitHub's


def test_unknown_revision(project, mirror):
    mirror.repos["models", "acme/tiny"].revision = "f" * 40
    failed = launch(project, mirror, "dry_run=true")
    assert failed.returncode == 1 and f"acme/tiny has no revision {COMMIT}" in failed.stdout


def test_an_experiment_that_makes_everything_itself(project, mirror):
    done = launch(project, mirror, experiment="smoke", HF_HUB_OFFLINE="1")
    assert done.returncode == 0 and "nothing to fetch" in done.stdout and mirror.requests == []


def test_default_root_is_the_pipelines():
    roots = [yaml.safe_load((ROOT / "conf" / name).read_text()) for name in ("fetch.yaml", "data/glue.yaml")]
    assert roots[0]["data"]["root"] == roots[1]["root"]


@pytest.mark.parametrize("path", sorted((ROOT / "conf/model").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_model_can_be_fetched(path):
    config = yaml.safe_load(path.read_text())
    found = fetching.sources({"models": [path.stem]}, {path.stem: config}, {})
    assert bool(found) == bool(config["checkpoint"])
    for source in found:
        assert all(re.fullmatch(r"[0-9a-f]{64}", sha) for sha in source.checksums.values())
