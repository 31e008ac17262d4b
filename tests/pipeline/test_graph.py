"""The DVC graph of every experiment: it resolves, its stages are the expected ones, its configurations compose."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
EXPERIMENTS = ("smoke", "local", "paper", "paper_released")


@pytest.fixture(params=EXPERIMENTS)
def experiment(request, tmp_path):
    """A copy of the pipeline with one experiment in place, outside the repository; its name and its content."""
    for name in ("conf", ".dvc/config"):
        source = ROOT / name
        target = tmp_path / name
        target.parent.mkdir(exist_ok=True)
        shutil.copytree(source, target) if source.is_dir() else shutil.copy(source, target)
    shutil.copy(ROOT / "dvc.yaml", tmp_path)
    shutil.copy(ROOT / "experiments" / f"{request.param}.yaml", tmp_path / "params.yaml")
    (tmp_path / ".dvc" / "config").write_text("[core]\n    analytics = false\n    no_scm = true\n")
    return tmp_path, request.param, yaml.safe_load((tmp_path / "params.yaml").read_text())


def stages(folder: Path) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-m", "dvc", "stage", "list", "--name-only"], cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_graph_resolves_into_the_expected_cells(experiment):
    folder, name, content = experiment
    found = stages(folder)
    assert len(found) == len(set(found))
    cells = {f"{model}-{method}" for model in content["models"] for method in content["methods"]}
    for kind in ("search", "train"):
        assert {s for s in found if s.startswith(f"{kind}@")} == {f"{kind}@{name}-{cell}" for cell in cells}
    variants = {f"{model}-{method}" for model in content["ablation_models"] for method in content["ablations"]}
    for kind in ("ablation_search", "ablation"):
        assert {s for s in found if s.startswith(f"{kind}@")} == {f"{kind}@{name}-{cell}" for cell in variants}
    for kind in ("gradients", "basis", "energy"):
        assert {s for s in found if s.startswith(f"{kind}@")} == {f"{kind}@{name}-{m}" for m in content["models"]}
    for kind in ("hosvd_cost", "cost_curves"):
        assert {s for s in found if s.startswith(f"{kind}@")} == {f"{kind}@{name}"}
    measured = {f"efficiency@{name}-{model}" for model in content["efficiency_models"]}
    assert {s for s in found if s.startswith("efficiency@")} == measured
    decoders = content["llama_models"]
    for kind in ("llama_gradients", "llama_basis"):
        assert {s for s in found if s.startswith(f"{kind}@")} == {f"{kind}@{name}-{m}" for m in decoders}
    for kind in ("llama_train", "answers", "judgments"):
        expected = {f"{kind}@{name}-{model}-{method}" for model in decoders for method in content["methods"]}
        assert {s for s in found if s.startswith(f"{kind}@")} == expected
    expected = {f"llama_ablation@{name}-{m}-{variant}" for m in decoders for variant in content["llama_ablations"]}
    assert {s for s in found if s.startswith("llama_ablation@")} == expected
    assert {s for s in found if s.startswith("examples@")} == {f"examples@{name}"}
    tables = {f"{table}@{name}" for table, where in content["tables"].items() if where}
    assert {s for s in found if s.startswith("table_")} == tables
    figures = {f"{figure}@{name}" for figure, where in content["figures"].items() if where}
    assert {s for s in found if s.startswith("figure_")} == figures
    if name == "smoke":
        assert len(found) <= 90


def test_commands_name_existing_configurations(experiment):
    folder, name, content = experiment
    for group, values in (
        ("model", content["models"] + content["llama_models"] + content["pretrain_chat"]),
        ("model", content["efficiency_models"]),
        ("scale/efficiency", [content["scale"]]),
        ("scale/energy", [content["scale"]]),
        ("scale/hosvd_cost", [content["scale"]]),
        ("scale/cost_curves", [content["scale"]]),
        ("method", content["methods"] + content["ablations"] + content["llama_ablations"]),
        ("protocol", [content["protocol"]]),
        ("scale", [content["scale"]]),
        ("data", [content["data"]]),
        ("chat", [content["chat"]]),
        ("questions", [content["questions"]]),
        ("judge", [content["judge"]]),
        ("protocol/llama", [content["protocol"]]),
        ("scale/llama", [content["scale"]]),
    ):
        for value in values:
            assert (folder / "conf" / group / f"{value}.yaml").is_file(), f"{name}: {group}={value}"
