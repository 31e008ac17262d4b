"""Runs peft's own adapter tests over sparsegrad.peft, and records which hold.

pip download --no-deps --no-binary :all: peft==0.21.2 && tar xzf peft-0.21.2.tar.gz
python experiments/peft_suite.py peft-0.21.2 results/library/peft_suite.json

The tests are those of the installed version, from its source distribution or a checkout; they need `datasets` and
`diffusers`. In a copy of them our configuration takes the place of peft's in every list that tests are made of, and
tiny models with random weights that of the hub's. Nothing of peft is kept.
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import peft
import torch
import transformers

FILES = (
    "config",
    "custom_models",
    "decoder_models",
    "encoder_decoder_models",
    "feature_extraction_models",
    "seq_classifier",
    "token_classification_qa",
)
OURS = "import peft_suite\n\npeft_suite.replace_cases(globals())\n\n\n"
SETTINGS = """[pytest]
addopts = -p no:cacheprovider
pythonpath = .
markers =
    single_gpu_tests: peft's
    multi_gpu_tests: peft's
    regression: peft's
    bitsandbytes: peft's
"""


def main() -> None:
    """Run the tests, write what they said."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peft", type=Path, help="an unpacked source distribution, or a checkout, of peft")
    parser.add_argument("output", type=Path, help="JSON file to write")
    parser.add_argument("--files", nargs="*", default=FILES, help="of tests/test_*.py")
    options = parser.parse_args()
    found = re.search(r'__version__ = "(.+)"', (options.peft / "src/peft/__init__.py").read_text())
    if found is None or found[1] != peft.__version__:
        sys.exit(f"{options.peft} is peft {found and found[1]}; installed is {peft.__version__}: give its own tests.")
    with tempfile.TemporaryDirectory() as folder:
        copied(options.peft / "tests", Path(folder))
        report = Path(folder) / "report.xml"
        files = [f"tests/test_{name}.py" for name in options.files]
        command = [sys.executable, "-m", "pytest", "-q", "-k", "SparseGrad", "--junitxml", report, *files]
        subprocess.run(command, cwd=folder, check=False)
        tests = results(ElementTree.parse(report))
    versions = {"peft": peft.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
    counts = counted(tests)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps({"versions": versions, "counts": counts, "tests": tests}, indent=1) + "\n")
    print(counts)


def copied(tests: Path, into: Path) -> None:
    """peft's tests with our cases, as a package in a folder with pytest's settings."""
    (into / "tests").mkdir()
    for file in tests.glob("*.py"):
        text = file.read_text()
        if file.stem.removeprefix("test_") in FILES:
            # In front of the first class of tests: its decorators read the lists.
            text = re.sub(r"^(?=(@pytest\S*\n)*class Test(?!ing))", OURS, text, count=1, flags=re.MULTILINE)
        (into / "tests" / file.name).write_text(text)
    (into / "tests" / "__init__.py").touch()
    shutil.copy(__file__, into / "peft_suite.py")
    (into / "pytest.ini").write_text(SETTINGS)


def results(report: ElementTree.ElementTree) -> dict[str, dict[str, Any]]:
    """By file and test: how many cases passed, how many were skipped for which reason, which failed for which."""
    tests: dict[str, dict[str, Any]] = {}
    for case in report.iter("testcase"):
        name, _, parameters = case.attrib["name"].partition("[")
        test = tests.setdefault(f"{case.attrib['classname'].removeprefix('tests.')}.{name}", {})
        problem = next((child for child in case if child.tag in ("failure", "error", "skipped")), None)
        if problem is None:
            test["passed"] = test.get("passed", 0) + 1
            continue
        reason = problem.attrib["message"].splitlines()[0][:300]
        if problem.tag == "skipped":
            skipped = test.setdefault("skipped", {})
            skipped[reason] = skipped.get(reason, 0) + 1
        else:
            test.setdefault("failed", {}).setdefault(reason, []).append(parameters.removesuffix("]"))
    return dict(sorted(tests.items()))


def counted(tests: dict[str, dict[str, Any]]) -> dict[str, int]:
    """Cases by what came of them."""
    return {
        "passed": sum(test.get("passed", 0) for test in tests.values()),
        "skipped": sum(sum(test.get("skipped", {}).values()) for test in tests.values()),
        "failed": sum(len(cases) for test in tests.values() for cases in test.get("failed", {}).values()),
    }


# ---- inside the tests ----

ADAPTER = {"init_bases": "random", "density": 0.25}
CUSTOM = {
    "Vanilla MLP 1": ("MLP", {"target_modules": "lin0"}),
    "Vanilla MLP 2": ("MLP", {"target_modules": ["lin0"]}),
    "Vanilla MLP 3": ("MLP", {"target_modules": ["lin1"]}),
    "Vanilla MLP 4": ("MLP", {"target_modules": ["lin0", "lin1"]}),
    "Vanilla MLP 5": ("MLP", {"target_modules": ["lin0"], "modules_to_save": ["lin1"]}),
    "Vanilla MLP 6": ("MLP", {"target_modules": ["lin0", "lin1"], "exclude_modules": ["lin1"]}),
    "Vanilla MLP 7 full ranks": ("MLP", {"target_modules": ["lin0", "lin1"], "density": 1.0}),
    "Vanilla MLP 8 dictionary": ("MLP", {"target_modules": {"up": "lin0", "down": "lin1"}}),
    "Vanilla MLP 9 bases by reference": ("MLP", {"target_modules": ["lin0", "lin1"], "save_bases": False}),
    "Embedding + transformers Conv1D 1": ("EmbConv1D", {"target_modules": ["conv1d"]}),
}
SMALL = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2, "intermediate_size": 24}
T5 = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "decoder_start_token_id": 0}
BERT = {"bert": ("bert", SMALL), "roberta": ("roberta", SMALL)}
LLAMA = {"llama": ("llama", SMALL | {"num_key_value_heads": 1})}
MODELS = {
    "decoder": (
        "AutoModelForCausalLM",
        LLAMA
        | {"gpt2": ("gpt2", {"n_embd": 16, "n_layer": 2, "n_head": 2})}
        | {"gemma3": ("gemma3_text", SMALL | {"num_key_value_heads": 1, "head_dim": 8})},
    ),
    "encoder_decoder": (
        "AutoModelForSeq2SeqLM",
        {"t5": ("t5", T5), "t5_gated": ("t5", T5 | {"feed_forward_proj": "gated-gelu"})},
    ),
    "feature_extraction": ("AutoModel", BERT | {"deberta": ("deberta", SMALL)}),
    "seq_classifier": ("AutoModelForSequenceClassification", BERT | LLAMA),
    "token": ("AutoModelForTokenClassification", BERT),
}


def replace_cases(module: dict[str, Any]) -> None:
    """Put our cases in place of those that a module of tests was made with; called where its lists are complete."""
    from sparsegrad.peft import SparseGradConfig

    @dataclass
    class SparseGradConfigOfRandomBases(SparseGradConfig):
        """For tests that give targets alone, where ours asks for bases."""

        init_bases: str = "random"

    name = module["__name__"].rpartition("test_")[2]
    if name == "custom_models":
        module["TEST_CASES"] = [
            (f"{title} SparseGrad", model, SparseGradConfig, ADAPTER | own) for title, (model, own) in CUSTOM.items()
        ]
        module["ALL_PEFT_CONFIG_CLASSES"] = [SparseGradConfigOfRandomBases]
        first, other = ({"target_modules": [lin], "init_weights": False} | ADAPTER for lin in ("lin0", "lin1"))
        module["MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES"] = [
            ("SparseGrad Same", "sparsegrad", SparseGradConfig, first, first | {"seed": 1}),
            ("SparseGrad Different", "sparsegrad", SparseGradConfig, first, other),
        ]
    elif name == "config":
        module["ALL_CONFIG_CLASSES"] = [(SparseGradConfig, {})]
        module["LAYER_INDEXING_CONFIG_CLASSES"] = [(SparseGradConfig, {})]
    for variable, value in module.items():
        if variable.endswith("_CONFIGS") and isinstance(value, list):
            task = {key: kwargs["task_type"] for _, kwargs in value for key in ["task_type"] if key in kwargs}
            module[variable] = [(SparseGradConfig, task | ADAPTER)]
        if variable.endswith("MODELS_TO_TEST") or variable == "SMALL_GRID_MODELS":
            module[variable] = models_for(name)


def models_for(name: str) -> list[str]:
    """Folders of tiny models with random weights for a module of tests."""
    key = next((key for key in sorted(MODELS, key=len, reverse=True) if name.startswith(key)), None)
    if key is None:
        return []
    auto, sorts = MODELS[key]
    folders = []
    for title, (model_type, sizes) in sorts.items():
        folder = Path("models") / f"{key}-{title}"
        if not folder.exists():
            torch.manual_seed(0)
            config = transformers.AutoConfig.for_model(model_type, vocab_size=1000, **sizes)
            getattr(transformers, auto).from_config(config).save_pretrained(folder)
        folders.append(str(folder))
    return folders


if __name__ == "__main__":
    main()
