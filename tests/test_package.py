"""What `pip install .` brings: the library alone, with what it imports; and that the reference names all of it."""

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from email import message_from_string
from pathlib import Path

import pytest
import yaml

import sparsegrad

ROOT = Path(__file__).parents[1]
BUILT_FROM = ("pyproject.toml", "README.md", "LICENSE", "requirements.in", "requirements-dev.in")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built offline from a copy: a checkout may hold what earlier builds have left."""
    copy = tmp_path_factory.mktemp("copy")
    for name in BUILT_FROM:
        shutil.copy(ROOT / name, copy)
    shutil.copytree(ROOT / "src", copy / "src", ignore=shutil.ignore_patterns("*.egg-info", "__pycache__"))
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", "built", "."]
    done = subprocess.run(command, cwd=copy, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": ""})
    assert done.returncode == 0, done.stderr
    (path,) = (copy / "built").iterdir()
    return path


def test_the_wheel_holds_the_library_alone(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    info = f"sparsegrad-{sparsegrad.__version__}.dist-info"
    assert {name.partition("/")[0] for name in names} == {"sparsegrad", info}
    source = ROOT / "src" / "sparsegrad"
    files = {path for pattern in ("*.py", "*.json", "py.typed") for path in source.rglob(pattern)}
    expected = {str(path.relative_to(ROOT / "src")) for path in files - {source / "pyrightconfig.json"}}
    assert {name for name in names if name.startswith("sparsegrad/")} == expected and len(expected) > 20


def test_the_wheel_needs_torch_and_safetensors(wheel):
    (name,) = (name for name in zipfile.ZipFile(wheel).namelist() if name.endswith("/METADATA"))
    metadata = message_from_string(zipfile.ZipFile(wheel).read(name).decode())
    assert (metadata["Name"], metadata["Version"]) == ("sparsegrad", sparsegrad.__version__)
    assert metadata["Requires-Python"] == ">=3.11"
    needed = [line for line in metadata.get_all("Requires-Dist") if "extra ==" not in line]
    assert needed == ["torch>=2.11", "safetensors[torch]"]
    extras = metadata.get_all("Provides-Extra")
    for extra, file in (("pipeline", "requirements.in"), ("dev", "requirements-dev.in")):
        lines = (line.partition("#")[0].strip() for line in (ROOT / file).read_text().splitlines())
        found = [line.partition(";")[0] for line in metadata.get_all("Requires-Dist") if f'extra == "{extra}"' in line]
        assert extra in extras and found == [line for line in lines if line], extra


def test_the_version_stands_in_one_place():
    assert str(yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"]) == sparsegrad.__version__
    assert 'dynamic = ["version"' in (ROOT / "pyproject.toml").read_text()


def test_the_reference_names_all_that_is_public():
    named = re.findall(r"^::: sparsegrad\.(\w+)", (ROOT / "docs" / "api.md").read_text(), re.M)
    assert sorted(named) == sorted(sparsegrad.__all__)


def test_the_site_leads_to_every_page():
    pages = {path.name for path in (ROOT / "docs").glob("*.md")}
    assert pages <= set(re.findall(r"^ +- ([\w.]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.M))


def test_the_wheel_was_used_in_empty_environments():
    """`make package` writes the record: what `pip install` brought, and that tutorial, README and a Trainer ran."""
    record = json.loads((ROOT / "results" / "library" / "package.json").read_text())
    assert record["holds"] == ["sparsegrad", record["holds"][1]] and record["holds"][1].endswith(".dist-info")
    assert {one["python"].rpartition(".")[0] for one in record["environments"]} == {"3.11", "3.12", "3.13"}
    for one in record["environments"]:
        assert one["needs"] == ["safetensors", "torch"] and not one["finetune"]
        assert {"numpy", "safetensors", "sparsegrad", "torch"} <= set(one["installed"])
        assert not set(one["installed"]) & {"accelerate", "datasets", "hydra-core", "peft", "transformers"}
        assert set(one["seconds"]) >= {"tutorial", "readme", "trainer, killed and resumed"}
