"""peft's comparison and peft's tests: what our scripts write, and what docs/peft.md says of it."""

import json
import re
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from xml.etree import ElementTree

import pytest

pytest.importorskip("peft")
ROOT = Path(__file__).parents[2]
COMPARED = ROOT / "results" / "library" / "method_comparison"
SUITE = ROOT / "results" / "library" / "peft_suite.json"
WORDS = {  # of a result of peft's own runner
    "run_info": "created_at total_time experiment_name peft_branch peft_worktree_is_dirty train_config peft_config "
    "error_msg",
    "train_info": "accelerator_memory_reserved_avg accelerator_memory_max accelerator_memory_reserved_99th train_time "
    "file_size num_trainable_params num_total_params status metrics",
    "meta_info": "model_info dataset_info package_info system_info pytorch_info",
}
STEP = "step,valid accuracy,train loss,train samples,train time,eval time,tokens / sec,elapsed time"
STEP += ",mem allocated avg,mem reserved avg"
LAST = "step,test accuracy,train loss,train samples,train total tokens,forgetting"


def script(name):
    spec = spec_from_file_location(name, ROOT / "experiments" / f"{name}.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {word: number for number, word in enumerate(["[UNK]", "[END]", *"abcdefghij"])}
    plain = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    plain.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="[END]")


@pytest.fixture
def at_hand(tokenizer, tmp_path):
    """A model and 60 questions in a folder."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=12, **sizes)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    rows = [{"query": "abc"[: 1 + n % 3], "response": "defg"[n % 4 :]} for n in range(60)]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


@pytest.mark.parametrize("method", ["hosvd", "random", "lora"])
def test_a_result_has_the_words_of_pefts(method, at_hand, monkeypatch):
    names = ["up_proj", "down_proj"]
    own = {"bases": str(at_hand / "bases.safetensors")} if method == "hosvd" else {"init_bases": "random"}
    own = {"peft_type": "LORA", "r": 1} if method == "lora" else {"peft_type": "SPARSEGRAD", "k": 40} | own
    folder = at_hand / "experiments" / "method" / "name"
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps({"target_modules": names, "task_type": "CAUSAL_LM"} | own))
    steps = {"max_steps": 2, "eval_steps": 1, "dtype": "float32", "max_seq_length": 16, "query_template": "{query}a"}
    (folder / "training_params.json").write_text(json.dumps(steps))
    given = ["--data", at_hand / "data.jsonl", "--model", at_hand / "model", "--output", at_hand / "out", folder]
    module = script("method_comparison")
    if method == "hosvd":
        monkeypatch.setattr(sys, "argv", ["run", "--bases-only", *map(str, given)])
        module.main()
        assert (at_hand / "bases.safetensors").is_file() and not (at_hand / "out").exists()
    monkeypatch.setattr(sys, "argv", ["run", *map(str, given)])
    module.main()
    result = json.loads((at_hand / "out" / "method--name.json").read_text())
    assert {part: set(result[part]) for part in result} == {part: set(words.split()) for part, words in WORDS.items()}
    first, _, last = result["train_info"]["metrics"]
    assert set(first) == {*STEP.split(","), "elapsed time", "valid loss"} and set(last) == {
        *LAST.split(","),
        "valid loss",
    }
    assert result["train_info"]["num_trainable_params"] == (160 if method == "lora" else 4 * 36)
    assert 1 < last["valid loss"] < 4 and last["train samples"] == 8


def test_a_file_without_questions_is_refused(tmp_path):
    (tmp_path / "data.jsonl").write_text('{"text": "a"}')
    with pytest.raises(SystemExit, match="has columns text; needed are query and response"):
        script("method_comparison").pairs(tmp_path / "data.jsonl")


REPORT = """<testsuites><testsuite>
<testcase classname="tests.test_a.TestA" name="test_one[x]"/>
<testcase classname="tests.test_a.TestA" name="test_one[y]"/>
<testcase classname="tests.test_a.TestA" name="test_one[z]"><skipped message="not here"/></testcase>
<testcase classname="tests.test_a.TestA" name="test_two"><failure message="E: wrong&#10;more"/></testcase>
</testsuite></testsuites>"""


def test_pefts_tests_take_our_cases_and_are_counted(tmp_path):
    module = script("peft_suite")
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_config.py").write_text("class Testing:\n    a = 1\n\nclass TestConfig:\n    b = 2\n")
    (tmp_path / "into").mkdir()
    module.copied(tmp_path / "tests", tmp_path / "into")
    text = (tmp_path / "into" / "tests" / "test_config.py").read_text()
    assert text.index("a = 1") < text.index("replace_cases") < text.index("class TestConfig")
    found = module.results(ElementTree.ElementTree(ElementTree.fromstring(REPORT)))
    assert found == {
        "test_a.TestA.test_one": {"passed": 2, "skipped": {"not here": 1}},
        "test_a.TestA.test_two": {"failed": {"E: wrong": [""]}},
    }
    assert module.counted(found) == {"passed": 2, "skipped": 1, "failed": 1}


def test_the_page_says_what_the_records_say():
    page = (ROOT / "docs" / "peft.md").read_text()
    suite = json.loads(SUITE.read_text())
    counts = suite["counts"]
    assert counts["failed"] == 0 and counts == script("peft_suite").counted(suite["tests"])
    assert (
        f"Of {sum(counts.values())} cases {counts['passed']} pass" in page and f"The {counts['skipped']} others" in page
    )
    rows = dict(re.findall(r"^\| `(\S+)` \| (.+) \|$", page, re.M))
    assert rows.keys() == {path.stem.replace("--", "/") for path in COMPARED.glob("*.json")}
    for path in COMPARED.glob("*.json"):
        result = json.loads(path.read_text())
        numbers, loss = result["train_info"]["num_trainable_params"], result["train_info"]["metrics"][-1]["valid loss"]
        lr = result["run_info"]["train_config"]["optimizer_kwargs"]["lr"]
        size = result["train_info"]["file_size"]
        assert rows[path.stem.replace("--", "/")] == f"{numbers:,} | {size / 1000:.0f} kB | {lr} | {loss:.3f}"
