"""Arrows run one way: experiments -> finetune -> sparsegrad -> torch; heavy packages are imported where they are used.

The check imports a package in a fresh interpreter and looks at ``sys.modules``; planted modules show that it can fail.
"""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

SRC = Path(__file__).parents[1] / "src"
NOT_IN_THE_METHOD = {
    "accelerate",
    "datasets",
    "finetune",
    "hydra",
    "optuna",
    "peft",
    "tensorly",
    "transformers",
    "wandb",
}
NOT_ON_IMPORT = {"datasets", "dvc", "fastchat", "hydra", "matplotlib", "omegaconf", "openai", "tensorly", "wandb"}

NOT_TO_MEASURE = NOT_ON_IMPORT | {"optuna", "pyarrow", "scipy", "sklearn"}

IMPORT_AND_LIST = """
import importlib, sys
for name in sys.argv[1:]:
    importlib.import_module(name)
sys.stdout.write("\\n".join(sorted({name.partition(".")[0] for name in sys.modules})))
"""


def modules_of(package, root):
    """Every module under root/package, from the files: pkgutil would pass over a folder without ``__init__.py``."""
    files = sorted((root / package).rglob("*.py"))
    names = [".".join(file.relative_to(root).with_suffix("").parts).removesuffix(".__init__") for file in files]
    return [package, *(name for name in names if name != package)]


def imported_with(modules, root):
    """Top-level packages in ``sys.modules`` after a fresh interpreter imported the modules."""
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_AND_LIST, *modules],
        env=os.environ | {"PYTHONPATH": str(root), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def source_files(root):
    return sorted(root.rglob("*.py"))


def imports_in(file):
    """Absolute imports anywhere in a file, those inside functions too."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module.partition(".")[0]


def prints_in(file):
    return [
        node.lineno
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]


def test_the_method_needs_torch_and_safetensors_only():
    loaded = imported_with(modules_of("sparsegrad", SRC), SRC)
    assert {"sparsegrad", "torch", "safetensors"} <= loaded
    assert not loaded & NOT_IN_THE_METHOD


def test_importing_the_comparison_loads_no_heavy_or_optional_package():
    modules = modules_of("finetune", SRC)
    loaded = imported_with(modules, SRC)
    assert "finetune" in loaded and len(modules) > 1
    assert not loaded & NOT_ON_IMPORT


def test_measuring_efficiency_needs_torch_transformers_accelerate_and_peft_alone():
    modules = [name for name in modules_of("finetune", SRC) if name.startswith("finetune.efficiency")]
    loaded = imported_with(modules, SRC)
    assert len(modules) > 5 and not loaded & NOT_TO_MEASURE


def test_the_method_never_imports_the_comparison_and_neither_imports_a_script():
    """Inside functions neither."""
    for file in source_files(SRC / "sparsegrad"):
        assert not set(imports_in(file)) & {"finetune", "experiments"}, file
    for file in source_files(SRC / "finetune"):
        assert "experiments" not in set(imports_in(file)), file


def test_no_module_prints():
    found = {str(file.relative_to(SRC)): lines for file in source_files(SRC) if (lines := prints_in(file))}
    assert not found


# ---- the checks can fail ----


@pytest.mark.parametrize("folder", ["finetune", "finetune/deep/without_init"])
@pytest.mark.parametrize("statement", ["import omegaconf", "from omegaconf import OmegaConf"])
def test_a_planted_import_is_caught(folder, statement, tmp_path):
    (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "finetune" / "__init__.py").touch()
    (tmp_path / folder / "planted.py").write_text(f"{statement}\n")
    modules = modules_of("finetune", tmp_path)
    assert modules[-1] == f"{folder.replace('/', '.')}.planted"
    assert imported_with(modules, tmp_path) & NOT_ON_IMPORT == {"omegaconf"}
    (tmp_path / folder / "planted.py").write_text(f"def lazily():\n    {statement}\n")
    assert not imported_with(modules, tmp_path) & NOT_ON_IMPORT


def test_the_pipelines_packages_are_seen_where_they_are_imported():
    assert "pyarrow" in imported_with(["finetune.data.glue"], SRC) & NOT_TO_MEASURE


def test_a_planted_module_that_does_not_import_is_not_passed_over(tmp_path):
    (tmp_path / "finetune").mkdir()
    (tmp_path / "finetune" / "__init__.py").touch()
    (tmp_path / "finetune" / "planted.py").write_text("import no_such_package\n")
    with pytest.raises(AssertionError, match="No module named 'no_such_package'"):
        imported_with(modules_of("finetune", tmp_path), tmp_path)


def test_a_planted_import_in_a_function_and_a_planted_print_are_caught(tmp_path):
    planted = tmp_path / "planted.py"
    planted.write_text(
        "def f():\n    from finetune.store.records import x\n    import experiments.train\n    print(x)\n"
    )
    assert set(imports_in(planted)) == {"finetune", "experiments"}
    assert prints_in(planted) == [4]
