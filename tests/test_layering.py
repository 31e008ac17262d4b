"""Arrows run one way: experiments -> the rooms of finetune -> sparsegrad -> torch; heavy packages load where used.

Arrows are read from the source, imports inside functions too; what loads is seen in a fresh interpreter's
``sys.modules``. Planted modules show that each check can fail.
"""

import ast
import graphlib
import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest

SRC = Path(__file__).parents[1] / "src"
NOT_IN_THE_METHOD = set("accelerate datasets finetune hydra optuna peft tensorly transformers wandb".split())
NOT_ON_IMPORT = {"datasets", "dvc", "fastchat", "hydra", "matplotlib", "omegaconf", "openai", "tensorly", "wandb"}

# The rooms of finetune, from the ground up: a room imports from those of the lines before its own, and from itself.
# The last lines are the rooms inside report.
ROOMS = (
    ("config",),
    ("store",),
    ("stats", "published", "fetch"),
    ("methods", "data"),
    ("tracking", "models"),
    ("training",),
    ("runs", "efficiency"),
    ("mt_bench", "energy", "plan", "trust"),
    ("report.model", "report.labels", "report.markdown"),
    ("report.paper",),
    ("report.evidence",),
    ("report.tables", "report.statistics", "report.figures"),
    ("report.page",),
)
TO_BE_MENDED = {  # shrinks to nothing; an entry that no longer holds fails
    ("finetune.methods.costs", "finetune.methods.base"),  # a circle
}
WITHOUT_TORCH = ("config", "store", "stats", "published", "report")
NOT_TO_MEASURE = NOT_ON_IMPORT | {"optuna", "pyarrow", "pydantic", "scipy", "sklearn"}

IMPORT_AND_LIST = """
import importlib, sys
for name in sys.argv[1:]:
    importlib.import_module(name)
sys.stdout.write("\\n".join(sorted({name.partition(".")[0] for name in sys.modules})))
"""


FOR_CUDA = {"radix.py"}  # Triton's, which torch's CPU build lacks; tests of the kernels import it
FOR_PEFT = "sparsegrad.peft"  # a tuner of peft: the only part of the method that imports it


def files_of(package, root):
    """Every module under root/package, by name: pkgutil would pass over a folder without ``__init__.py``."""
    files = sorted(file for file in (root / package).rglob("*.py") if file.name not in FOR_CUDA)
    return {".".join(file.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): file for file in files}


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


def imports_in(file):
    """Dotted names that a file imports anywhere, inside functions too; relative ones are not used here."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def packages_in(file):
    return {name.partition(".")[0] for name in imports_in(file)}


def at_import(module):
    """Packages that importing a module of finetune imports by its own lines and those of the modules behind it."""
    files, found, left = files_of("finetune", SRC), set(), {module}
    seen = set()
    while left:
        one = left.pop()
        seen.add(one)
        for node in ast.parse(files[one].read_text()).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            found |= {name.partition(".")[0] for name in names}
            ours = {m for name in names for m in (name, name.rpartition(".")[0]) if m in files}
            left |= {m for one in ours for m in (one, one.rpartition(".")[0]) if m in files} - seen
    return found


def arrows(root):
    """Module of finetune -> modules of finetune that it imports."""
    files, graph = files_of("finetune", root), {}
    for module, file in files.items():
        found = {next((m for m in (name, name.rpartition(".")[0]) if m in files), None) for name in imports_in(file)}
        graph[module] = found - {None, module}
    return graph


def room_of(module):
    parts = module.split(".")[1:]
    return ".".join(parts[:2] if parts[:1] == ["report"] else parts[:1])


def wrong_arrows(graph):
    """Imports that do not run down, and modules that stand in no room."""
    level = {room: n for n, line in enumerate(ROOMS) for room in line} | {"": len(ROOMS), "report": len(ROOMS)}
    for module, imported in graph.items():
        room = room_of(module)
        if room not in level:
            yield f"{module} stands in no room"
            continue
        for other in imported:
            if room_of(other) != room and level.get(room_of(other), len(ROOMS)) >= level[room]:
                yield f"{module} -> {other}"


def prints_in(file):
    return [
        node.lineno
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]


@pytest.mark.parametrize(
    ("package", "rooms", "forbidden"),
    [
        ("sparsegrad", None, NOT_IN_THE_METHOD),
        ("finetune", None, NOT_ON_IMPORT),
        ("finetune", ("efficiency",), NOT_TO_MEASURE),
        ("finetune", WITHOUT_TORCH, {"torch", "transformers", "sparsegrad"}),
    ],
    ids=["the method", "the comparison", "efficiency", "light rooms"],
)
def test_importing_loads_no_more_than_is_needed(package, rooms, forbidden):
    modules = [name for name in files_of(package, SRC) if rooms is None or (*name.split("."), "")[1] in rooms]
    modules = [name for name in modules if not name.startswith(FOR_PEFT)]
    assert rooms is None or {name.split(".")[1] for name in modules} == set(rooms)
    loaded = imported_with(modules, SRC)
    assert package in loaded and len(modules) > 5 and not loaded & forbidden


@pytest.mark.parametrize("module", ["runs.carried", "runs.grid", "store.pack"])
def test_what_runs_on_a_bare_machine_imports_nothing_that_it_lacks(module):
    lacking = NOT_ON_IMPORT | {"optuna", "pydantic"}
    assert not at_import(f"finetune.{module}") & lacking
    assert at_import("finetune.runs.carry") & lacking == {"pydantic"}  # the check can fail


@pytest.mark.parametrize(
    ("package", "above"), [("sparsegrad", {"finetune", "experiments"}), ("finetune", {"experiments"})]
)
def test_no_module_prints_or_imports_what_stands_above_it(package, above):
    """Inside functions neither."""
    for file in files_of(package, SRC).values():
        assert not packages_in(file) & above and not prints_in(file), file


@pytest.fixture(scope="module")
def graph():
    """The arrows of the source without those that are to be mended."""
    found = arrows(SRC)
    for module, other in TO_BE_MENDED:
        assert other in found[module], f"{module} -> {other} is mended: take it off the list"
        found[module].remove(other)
    return found


def test_the_arrows_of_the_rooms_run_down(graph):
    assert not sorted(wrong_arrows(graph))


def test_no_circle_between_modules(graph):
    graphlib.TopologicalSorter(graph).prepare()  # a CycleError names the circle


def test_nothing_lies_loose_beside_the_rooms():
    assert [file.name for file in (SRC / "finetune").glob("*.py")] == ["__init__.py"]


# ---- the checks can fail ----


@pytest.fixture
def planted(tmp_path):
    """``planted({"store.a": "import finetune.stats.b"})``: a tree of modules with these lines."""

    def make(modules):
        for name, line in modules.items():
            file = tmp_path.joinpath("finetune", *name.split(".")).with_suffix(".py")
            for folder in itertools.takewhile(lambda f: f != tmp_path, file.parents):
                folder.mkdir(parents=True, exist_ok=True)
                (folder / "__init__.py").touch()
            file.write_text(f"{line}\n")
        return tmp_path

    return make


@pytest.mark.parametrize(
    ("module", "line", "wrong"),
    [
        ("store.a", "import finetune.stats.b", "finetune.store.a -> finetune.stats.b"),
        ("methods.a", "def f():\n    from finetune.training.b import x", "finetune.methods.a -> finetune.training.b"),
        ("energy.a", "from finetune.report.tables import b", "finetune.energy.a -> finetune.report.tables.b"),
        ("report.paper.a", "from finetune.report.page.b import x", "finetune.report.paper.a -> finetune.report.page.b"),
        ("plan.a", "from finetune.energy import b", "finetune.plan.a -> finetune.energy.b"),
        ("stats.a", "from finetune import report", "finetune.stats.a -> finetune.report"),
        ("shed.a", "x = 1", "finetune.shed.a stands in no room"),
        ("loose", "x = 1", "finetune.loose stands in no room"),
    ],
)
def test_a_planted_arrow_is_caught(module, line, wrong, planted):
    others = dict.fromkeys(("stats.b", "training.b", "report.tables.b", "report.page.b", "energy.b"), "x = 1")
    right = {"runs.c": "from finetune.training.b import x", "report.page.c": "from finetune.report.tables import b"}
    found = set(wrong_arrows(arrows(planted(others | right | {module: line}))))
    assert wrong in found and all(arrow.startswith(wrong.split()[0].rpartition(".")[0]) for arrow in found)


def test_a_planted_circle_is_caught(planted):
    root = planted({"data.a": "from finetune.data.b import x", "data.b": "def f():\n    from finetune.data import a"})
    with pytest.raises(graphlib.CycleError, match=r"finetune\.data\.a"):
        graphlib.TopologicalSorter(arrows(root)).prepare()


@pytest.mark.parametrize("statement", ["import omegaconf", "from omegaconf import OmegaConf"])
def test_a_planted_import_is_caught(statement, planted):
    """In a folder without ``__init__.py`` too."""
    file = planted({"deep.planted": statement}) / "finetune" / "deep" / "planted.py"
    (file.parent / "__init__.py").unlink()
    root, modules = file.parents[2], list(files_of("finetune", file.parents[2]))
    assert modules == ["finetune", "finetune.deep.planted"]
    assert imported_with(modules, root) & NOT_ON_IMPORT == {"omegaconf"}
    file.write_text(f"def lazily():\n    {statement}\n")
    assert not imported_with(modules, root) & NOT_ON_IMPORT
    file.write_text("import no_such_package\n")
    with pytest.raises(AssertionError, match="No module named 'no_such_package'"):
        imported_with(modules, root)


def test_the_pipelines_packages_are_seen_where_they_are_imported():
    assert "pyarrow" in imported_with(["finetune.data.glue"], SRC) & NOT_TO_MEASURE


def test_a_planted_import_in_a_function_and_a_planted_print_are_caught(tmp_path):
    planted = tmp_path / "planted.py"
    planted.write_text("def f():\n    from finetune.a import x\n    import experiments.train\n    print(x)\n")
    assert packages_in(planted) == {"finetune", "experiments"} and prints_in(planted) == [4]
