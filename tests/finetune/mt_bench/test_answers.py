"""Answers: FastChat's own on the same model, the same in any batch and after any kill, never beyond the window."""

import json
import os
import shutil
import signal
import subprocess
import sys
import types
from itertools import chain
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from finetune import models
from finetune.data.chat import chat_template
from finetune.mt_bench import answer_cells, answers, generation
from finetune.mt_bench.answers import AnswerOptions, Speaker, answer_questions, fit
from finetune.mt_bench.generation import SampleByRow, row_generator
from finetune.store.files import sha256
from finetune.store.records import read_json, write_json

DATA = Path(os.environ.get("SPARSEGRAD_DATA", Path(__file__).parents[3] / "data"))
WINDOW = 320
LLAMA_2 = chat_template("llama-2")
CATEGORIES = ("writing", "math", "stem", "coding", "roleplay", "reasoning", "humanities")
QUESTIONS = [
    {
        "question_id": 900 + number,
        "category": category,
        "turns": [f"Say {'more and ' * (3 * number % 5)}something about {category}.", f"Again, number {number}."],
    }
    for number, category in enumerate(CATEGORIES)
]
GREEDY = {"math", "coding", "reasoning"}  # temperature 0 in FastChat's temperature_config


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A LLaMA of random weights with a byte tokenizer, as the train stage leaves it: ``<folder>/seed1``. Read only."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("models") / "seed1"
    letters = ["<unk>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE({letter: number for number, letter in enumerate(letters)}, [], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=backend, **names).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {
        "max_position_embeddings": WINDOW,
        "initializer_range": 0.4,
    }  # peaked: answers differ, and stop
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(letters), num_key_value_heads=2, **sizes))
    model.generation_config.eos_token_id = [2, *range(60, 70)]  # several, or so small a model would never stop
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def load(checkpoint):
    """``load()``: the model in float64, so that sums in another order can't change a token, and its tokenizer."""
    return lambda: load_checkpoint(checkpoint)


@pytest.fixture
def answer(load, tmp_path):
    """``answer(batch_size=2, questions=..., file=...)``: lines by question id, and the facts."""
    model, tokenizer = load()

    def run(questions=QUESTIONS, file="answers.jsonl", digest="abc", model=model, **options):
        values = {"max_new_tokens": 24, "batch_size": 3, "reserve": 24, "seed": 5} | options
        speaker = Speaker(model.eval(), tokenizer, LLAMA_2, AnswerOptions(**values))
        facts = answer_questions(
            speaker, questions, tmp_path / file, model_id="tiny", digest=digest, progress_bar=False
        )
        return read(tmp_path / file), facts

    return run


def load_checkpoint(folder):
    group = answer_cells.model_group(folder)
    return models.load_causal(group, "", 0, torch.float64).eval(), models.load_tokenizer(group, "")


def read(path):
    """Answer lines by question id."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    found = {line["question_id"]: line for line in lines}
    assert len(found) == len(lines)
    return found


def turns(lines):
    return {number: line["choices"][0]["turns"] for number, line in lines.items()}


# ---- what is generated ----


def test_greedy_answers_are_those_of_fastchats_own_script(answer, load, tmp_path, monkeypatch):
    """gen_model_answer itself, on the CPU: it answers one by one, without padding, and calls generate its own way."""
    from fastchat.conversation import get_conv_template
    from fastchat.llm_judge import gen_model_answer

    greedy = [question for question in QUESTIONS if question["category"] in GREEDY]
    monkeypatch.setattr(gen_model_answer, "load_model", lambda *args, **kwargs: load())
    monkeypatch.setattr(gen_model_answer, "get_conversation_template", lambda _: get_conv_template("llama-2"))
    monkeypatch.setattr(torch.Tensor, "cuda", lambda tensor: tensor)
    theirs = tmp_path / "theirs.jsonl"
    gen_model_answer.get_model_answers("", "tiny", greedy, str(theirs), 24, 1, 1, None, dtype=None, revision="")
    lines, _ = answer(greedy)
    assert turns(lines) == turns(read(theirs))
    assert all(turns(lines)[900 + CATEGORIES.index("math")])


@pytest.mark.parametrize("size", [1, 5])
def test_answers_do_not_depend_on_the_batch_nor_on_the_order(size, answer):
    reference, _ = answer(file="reference.jsonl", batch_size=3)
    lines, _ = answer(QUESTIONS[::-1], batch_size=size)
    assert turns(lines) == turns(reference)
    new = [tokens for line in lines.values() for tokens in line["new_tokens"]]
    assert min(new) < 24 and max(new) == 24  # some stop by themselves, some are stopped
    assert len({text for pair in turns(lines).values() for text in pair}) == 2 * len(QUESTIONS)
    assert list(lines) == sorted(lines)


def test_another_seed_changes_what_is_sampled_and_nothing_else(answer):
    first, again, other = (turns(answer(file=f"{n}", seed=seed)[0]) for n, seed in enumerate((5, 5, 6)))
    assert first == again
    for question in QUESTIONS:
        number = question["question_id"]
        if question["category"] in GREEDY:
            assert first[number] == other[number]
        elif question["category"] in ("writing", "roleplay"):
            assert first[number] != other[number]


def test_a_sample_has_the_temperatures_distribution():
    scores = torch.tensor([[1.0, 0.3, -0.5, 2.0]])
    counts = torch.zeros(2, 4)
    sampler = SampleByRow([0.7, 2.0, 0.0], [row_generator(0, 1, turn) for turn in range(3)], [])
    for _ in range(4000):
        drawn = sampler(torch.zeros(3, 1, dtype=torch.long), scores.expand(3, 4)).argmax(-1)
        counts[[0, 1], drawn[:2]] += 1
        assert drawn[2] == 3
    expected = torch.stack([torch.softmax(scores[0] / temperature, 0) for temperature in (0.7, 2.0)])
    assert (counts / 4000 - expected).abs().max() < 0.03  # four standard deviations of a share


def test_top_k_and_top_p_of_the_checkpoint_are_used_as_generate_would(load):
    """FastChat calls generate, which reads generation_config.json and else takes top_k=50."""
    model, _ = load()
    assert generation.sampling_settings(model) == {"top_k": 50, "top_p": None, "min_p": None}
    model.generation_config.top_k, model.generation_config.top_p = 2, 0.9
    prompt, plain = [1, 40, 50], model(torch.tensor([[1, 40, 50]])).logits[0, -1]
    drawn = {
        generation.generate(model, [prompt], 1, [5.0], [row_generator(seed, 1, 0)], [2])[0][0] for seed in range(40)
    }
    assert drawn == set(plain.topk(2).indices.tolist())


def test_the_second_prompt_holds_the_first_answer(answer, load, monkeypatch):
    prompts, (_, tokenizer) = [], load()

    def spy(model, rows, *rest):
        prompts.extend(tokenizer.decode(row) for row in rows)
        return generation.generate(model, rows, *rest)

    monkeypatch.setattr(answers, "generate", spy)
    lines, _ = answer(QUESTIONS[:1])
    asked, told = QUESTIONS[0]["turns"], turns(lines)[900]
    assert prompts == [
        f"<s>[INST] {asked[0]} [/INST]",
        f"<s>[INST] {asked[0]} [/INST] {told[0]} </s><s>[INST] {asked[1]} [/INST]",
    ]


def test_text_ends_at_the_templates_stops_and_holds_no_special_token(load):
    _, tokenizer = load()
    ids = tokenizer("one, two.", add_special_tokens=False).input_ids
    comma, point = ids[3], ids[8]

    def text(tokens, stop_token_ids=(), stop=None):
        template = types.SimpleNamespace(
            stop_token_ids=stop_token_ids, cut_at_stop=lambda text: text.partition(stop)[0] if stop else text
        )
        return answers.to_text(tokens, tokenizer, template)

    assert text([1, 0, *ids, 2]) == "one, two."
    assert text(ids, (comma, point)) == "one"
    assert text(ids, (point,)) == "one, two"
    assert text(ids, stop="two") == "one,"


# ---- the window ----


@pytest.mark.parametrize(
    ("length", "options", "expected"),
    [
        (10, {}, (10, 30, False)),
        (80, {}, (80, 20, False)),  # the answer is shortened to the room that is left
        (90, {}, (90, 10, False)),
        (91, {}, (90, 10, True)),
        (500, {}, (90, 10, True)),
        (91, {"long_prompts": "refuse"}, (0, 0, False)),
        (90, {"long_prompts": "refuse"}, (90, 10, False)),
        (98, {"max_new_tokens": 3}, (97, 3, True)),  # no more is kept free than can be used
    ],
)
def test_a_long_prompt_is_cut_or_refused(length, options, expected):
    ids = [1, *range(1000, 1000 + length - 1)]
    prompt = fit(ids, 100, 1, AnswerOptions(**({"max_new_tokens": 30, "reserve": 10} | options)))
    assert (len(prompt.input_ids), prompt.limit, prompt.cut) == expected
    assert fit(ids, None, 1, AnswerOptions(max_new_tokens=7)).input_ids == ids  # a model without a limit
    if prompt.input_ids:
        assert prompt.input_ids[0] == 1 and prompt.input_ids[1:] == ids[length - len(prompt.input_ids) + 1 :]


LONG = [
    question | {"turns": [question["turns"][0] + " word" * (13 * n), "And?"]} for n, question in enumerate(QUESTIONS)
]


@pytest.mark.parametrize("size", [1, 7])
def test_no_position_beyond_the_window_is_ever_used(size, answer, monkeypatch):
    from transformers import LlamaModel

    highest, plain = [], LlamaModel.forward

    def forward(self, *args, **kwargs):
        highest.append(int(kwargs["position_ids"].max()))
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(LlamaModel, "forward", forward)
    lines, facts = answer(LONG, batch_size=size, max_new_tokens=60, reserve=8)
    assert max(highest) < WINDOW
    pairs = [zip(line["prompt_tokens"], line["new_tokens"], strict=True) for line in lines.values()]
    assert WINDOW - 8 <= max(sum(pair) for pair in chain(*pairs)) <= WINDOW
    flags = [flag for line in lines.values() for flag in line["cut"]]
    assert facts["counts"] == {"questions": 7, "cut": sum(flags), "refused": 0} and 0 < sum(flags) < 14
    assert turns(answer(LONG, file="other.jsonl", batch_size=3, max_new_tokens=60, reserve=8)[0]) == turns(lines)


def test_refused_prompts_have_empty_answers_and_are_counted(answer):
    lines, facts = answer(LONG, long_prompts="refuse")
    refused = [line for line in lines.values() if any(line["refused"])]
    assert refused and len(refused) < len(LONG)
    assert facts["counts"]["refused"] == sum(sum(line["refused"]) for line in refused) and not facts["counts"]["cut"]
    for line in refused:
        said = zip(line["choices"][0]["turns"], line["new_tokens"], line["refused"], strict=True)
        assert all((text, new) == ("", 0) for text, new, refused in said if refused)


# ---- kills, full disks, other configurations ----


def config_for(checkpoint, tmp_path, **answering):
    """A composed configuration as far as answering reads it."""
    file = tmp_path / "questions" / "question.jsonl"
    file.parent.mkdir(exist_ok=True)
    file.write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    values = {"max_new_tokens": 16, "batch_size": 4, "long_prompts": "cut", "reserve": 16, "seed": 0}
    settings = {"name": "test", "version": 1, "checkpoint": None, "device": "cpu", "threads": None, "progress": False}
    questions = {"name": "own", "root": str(tmp_path), "folder": "questions", "questions": "question.jsonl"}
    return settings | {
        "model": {"name": "tiny_llama", "title": "Tiny", "template": "llama-2"},
        "method": {"name": "lora"},
        "checkpoints": str(tmp_path / "locks"),
        "protocol": {"name": "sound"},
        "scale": {"name": "smoke", "answers": values | {"dtype": "fp32"} | answering},
        "questions": questions,
    }


KILLED = """
import json, os, signal, sys
from pathlib import Path
from finetune.mt_bench import answer_cells, journal

config, checkpoint, folder, whole = json.loads(sys.argv[1])
append, written = journal.Journal.append, []

def append_or_die(self, item):
    if len(written) == whole:  # in the middle of a batch, and of a line
        with open(self.path, "ab") as file:
            file.write(b'{"question_id": 9')
        os.kill(os.getpid(), signal.SIGKILL)
    written.append(item)
    append(self, item)

journal.Journal.append = append_or_die
answer_cells.answer_one(config, 1, Path(checkpoint), Path(folder))
"""


def test_a_killed_run_goes_on_where_it_was(checkpoint, tmp_path, monkeypatch):
    config = config_for(checkpoint, tmp_path)
    folder, unbroken = tmp_path / "killed", tmp_path / "unbroken"
    arguments = json.dumps([config, str(checkpoint), str(folder), 5])
    done = subprocess.run([sys.executable, "-c", KILLED, arguments], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    name = "tiny_llama-lora-seed1"
    raw = (folder / f"{name}.jsonl").read_bytes()
    assert raw.count(b"\n") == 5 and not raw.endswith(b"\n") and not (folder / f"{name}.json").exists()
    before = [json.loads(line) for line in raw.splitlines()[:5]]
    asked = []
    plain = Speaker.answer
    monkeypatch.setattr(
        Speaker, "answer", lambda self, batch: asked.extend(q["question_id"] for q in batch) or plain(self, batch)
    )
    answer_cells.answer_one(config, 1, checkpoint, folder)
    lines = read(folder / f"{name}.jsonl")
    assert sorted(asked) == sorted({q["question_id"] for q in QUESTIONS} - {line["question_id"] for line in before})
    assert all(lines[line["question_id"]] == line for line in before)
    answer_cells.answer_one(config, 1, checkpoint, unbroken)
    assert turns(lines) == turns(read(unbroken / f"{name}.jsonl"))
    assert list(lines) == [question["question_id"] for question in QUESTIONS]
    record = read_json(folder / f"{name}.json")
    assert record["counts"] == {"questions": 7, "cut": 0, "refused": 0}
    assert record["seconds"] == pytest.approx(sum(line["seconds"] for line in lines.values()))


def test_answers_of_another_configuration_are_kept_apart_and_come_back(answer, tmp_path, monkeypatch):
    first, _ = answer(digest="abc")
    second, _ = answer(digest="def", seed=9)
    assert {line["config_hash"] for line in second.values()} == {"def"}
    assert read(tmp_path / "earlier" / "answers.jsonl") == first
    monkeypatch.setattr(Speaker, "answer", refuse)
    assert answer(digest="abc")[0] == first


def spoil(path, change):
    """Change the first line of an answer file; without a checksum that fits."""
    first, *others = path.read_text().splitlines()
    path.write_text("".join(f"{line}\n" for line in [json.dumps(json.loads(first) | change), *others]))


@pytest.mark.parametrize("turns_now", [["another", "text"], ["", ""], None])
def test_an_answer_that_was_changed_is_done_again(turns_now, answer, tmp_path, caplog):
    first, _ = answer()
    spoil(tmp_path / "answers.jsonl", {"choices": [{"index": 0, "turns": turns_now}]})
    assert turns(answer()[0]) == turns(first)
    assert "1 lines are not believed, done again: it was changed after it was written" in caplog.text
    caplog.clear()
    answer()
    assert caplog.text == ""


ANSWER = {"question_id": 1, "config_hash": "abc", "model_id": "tiny", "choices": [{"turns": ["a", ""]}], "seconds": 1}
ANSWER |= {"prompt_tokens": [1, 2], "new_tokens": [1, 0], "cut": [False, True], "refused": [False, True]}


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({}, None),
        ({"model_id": "other"}, "an answer of 'other'"),
        ({"question_id": "1"}, "known by"),
        ({"config_hash": None}, "known by"),
        *(
            ({"choices": value}, "not two turns")
            for value in (None, [], [{"turns": ["a"]}], [{"turns": ["a", 1]}], "ab")
        ),
        *(({"new_tokens": value}, "not two turns") for value in (None, [1], [1, "1"], [True, 1], 2)),
        ({"cut": [0, 1]}, "not two turns"),
        *(({"seconds": value}, "seconds=") for value in (None, "1", float("nan"), float("inf"), -1)),
    ],
)
def test_a_line_that_is_no_answer(change, fault):
    found = answers.fault_of(ANSWER | change, "tiny")
    assert found is None if fault is None else fault in found


def test_a_line_without_a_checksum_is_done_again(answer, tmp_path):
    first, _ = answer()
    line = json.loads((tmp_path / "answers.jsonl").read_text().splitlines()[0])
    del line["line_sha256"]
    line["choices"][0]["turns"][0] = "another text"
    path = tmp_path / "answers.jsonl"
    path.write_text(json.dumps(line) + "\n" + path.read_text().partition("\n")[2])
    assert turns(answer()[0]) == turns(first)


# ---- the cell ----


@pytest.fixture
def cell(checkpoint, tmp_path):
    """``cell(seeds=[1, 2], methods=["lora"], **answers)``: answers of copies of the checkpoint; the folder of lora."""
    for seed in (1, 2):
        shutil.copytree(checkpoint, tmp_path / "models" / "lora" / f"seed{seed}")

    def run(seeds=(1, 2), methods=("lora",), **answering):
        config = config_for(checkpoint, tmp_path, **answering)
        answer_cells.answer_cells(config, methods, seeds, tmp_path / "models", tmp_path / "answers")
        return tmp_path / "answers" / "lora"

    return run


def refuse(*args):
    raise ValueError("nothing may be loaded")


def files(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_a_cell_leaves_answers_and_records_of_every_seed(cell, monkeypatch):
    folder = cell(batch_size=7)
    stems = ["tiny_llama-lora-seed1", "tiny_llama-lora-seed2"]
    assert files(folder) == ["cell.json", *(f"{stem}.{end}" for stem in stems for end in ("json", "jsonl"))]
    assert read_json(folder / "cell.json") == {"records": [f"{stem}.json" for stem in stems]}
    record, lines = read_json(folder / f"{stems[0]}.json"), read(folder / f"{stems[0]}.jsonl")
    expected = {"experiment": "test", "kind": "answers", "model": "tiny_llama", "method": "lora", "seed": 1}
    expected |= {"task": "mt_bench", "protocol": "sound", "scale": "smoke"}
    assert record["status"] == "finished" and record["run"].items() >= expected.items()
    assert record["tokens"]["new"] == sum(sum(line["new_tokens"]) for line in lines.values())
    assert {line["config_hash"] for line in lines.values()} == {record["run"]["config_hash"]}
    assert {line["model_id"] for line in lines.values()} == {stems[0]}
    assert (record["precision"], record["sampling"]["top_k"], record["template"]) == ("float32", 50, "llama-2")
    monkeypatch.setattr(models, "load_causal", refuse)  # finished: nothing is loaded
    cell(batch_size=2)
    with pytest.raises(ValueError, match="2 of 2 failed; tiny_llama-lora-seed1: nothing may be loaded"):
        cell(max_new_tokens=17)


def test_a_finished_cell_that_was_changed_is_done_again(cell):
    """Whole content, inner name, status and form of the record; a byte of the answers."""
    folder = cell([1])
    path = folder / "tiny_llama-lora-seed1.json"
    lines, record = path.with_suffix(".jsonl"), read_json(path)
    told = {name: record[name] for name in ("run", "answers", "counts", "status")}
    texts = turns(read(lines))
    changes = [{"status": "failed"}, {"run": record["run"] | {"seed": 2}}, {"answers": "none"}, {"run": None}]
    for change in changes:
        path.write_text(json.dumps(record | change))
        cell([1])
        assert {name: read_json(path)[name] for name in told} == told | {"answers": read_json(path)["answers"]}
    for torn in (None, '{"torn'):
        if torn is not None:
            path.write_text(torn)
        lines.write_bytes(lines.read_bytes().replace(b'"turns": ["', b'"turns": ["X', 1))
        cell([1])
        assert turns(read(lines)) == texts and read_json(path)["status"] == "finished"


@pytest.mark.parametrize("change", ["options", "questions", "weights", "tokenizer"])
def test_what_decides_answers_is_in_their_identity(change, cell, tmp_path, monkeypatch):
    folder = cell([1])
    path = folder / "tiny_llama-lora-seed1.json"
    before, models = read_json(path)["run"]["config_hash"], tmp_path / "models" / "lora" / "seed1"
    if change == "weights":
        tensors = load_file(models / "model.safetensors")
        tensors["model.norm.weight"] *= 2
        save_file(tensors, models / "model.safetensors", {"format": "pt"})
    if change == "tokenizer":
        (models / "tokenizer.json").write_text((models / "tokenizer.json").read_text() + "\n")
    if change == "questions":
        monkeypatch.setitem(QUESTIONS[0], "turns", ["One?", "Two?"])
    cell([1], **({"reserve": 17} if change == "options" else {}))
    assert read_json(path)["run"]["config_hash"] != before
    assert {line["config_hash"] for line in read(folder / "earlier/tiny_llama-lora-seed1.jsonl").values()} == {before}


def test_a_failed_seed_or_method_stops_no_other_and_is_not_listed(cell, tmp_path):
    shutil.copytree(tmp_path / "models/lora/seed2", tmp_path / "models/full/seed2")
    message = "4 of 6 failed; tiny_llama-full-seed3: .*seed3 holds no model: train seed 3"
    with pytest.raises(ValueError, match=message):
        cell([3, 2], methods=["full", "meprop", "lora"])
    listed = {path.parent.name: read_json(path)["records"] for path in (tmp_path / "answers").glob("*/cell.json")}
    assert listed == {"full": ["tiny_llama-full-seed2.json"], "meprop": [], "lora": ["tiny_llama-lora-seed2.json"]}
    assert read_json(tmp_path / "answers/full/tiny_llama-full-seed2.json")["run"]["method"] == "full"
    cell([1])
    assert read_json(tmp_path / "answers/lora/cell.json") == {"records": ["tiny_llama-lora-seed1.json"]}


def test_a_checkpoint_given_by_hand_is_answered_for_one_seed(checkpoint, tmp_path):
    config = config_for(checkpoint, tmp_path) | {"checkpoint": str(checkpoint)}
    answer_cells.answer_cells(config, ["lora"], [7], tmp_path / "none", tmp_path / "answers")
    assert (tmp_path / "answers" / "lora" / "tiny_llama-lora-seed7.jsonl").exists()
    with pytest.raises(ValueError, match=r"is one model, received \['lora'\] with seeds \[1, 2\]"):
        answer_cells.answer_cells(config, ["lora"], [1, 2], tmp_path / "none", tmp_path / "answers")


# ---- bad input ----


def test_a_model_that_cannot_answer_is_refused(answer, load, monkeypatch):
    with pytest.raises(ValueError, match="reserve=400 .* has 320 positions"):
        answer(reserve=400, max_new_tokens=400)
    model, _ = load()
    torch.nn.init.constant_(model.lm_head.weight, float("nan"))
    with pytest.raises(ValueError, match="questions 9.*, turn 1: .*NaN"):
        answer(model=model)
    monkeypatch.setattr(type(model), "get_input_embeddings", lambda self: types.SimpleNamespace(num_embeddings=100))
    with pytest.raises(ValueError, match="vocabulary 100 tokens: this is the tokenizer of another model"):
        answer()


def test_a_configuration_that_does_not_fit_is_refused(checkpoint, tmp_path):
    config = config_for(checkpoint, tmp_path)
    with pytest.raises(ValueError, match="no chat template named 'llama-9'"):
        answer_cells.answer_one(config | {"model": config["model"] | {"template": "llama-9"}}, 1, checkpoint, tmp_path)
    own = shutil.copytree(checkpoint, tmp_path / "own")
    files = {"config.json": sha256(own / "config.json")}
    write_json(own / "training.json", {"template": "zephyr", "files": files})
    with pytest.raises(ValueError, match="was trained with template 'zephyr', model.template is 'llama-2'"):
        answer_cells.answer_one(config, 1, own, tmp_path)
    write_json(own / "training.json", {"template": "llama-2", "files": files | {"tokenizer.json": "0" * 64}})
    with pytest.raises(ValueError, match="own/tokenizer.json is missing, or another than was written: train the model"):
        answer_cells.answer_one(config, 1, own, tmp_path)
    path = answer_cells.answer_one(config_for(checkpoint, tmp_path, dtype="bf16"), 1, checkpoint, tmp_path)
    assert (read_json(path)["precision"], read_json(path)["options"]["dtype"]) == ("bfloat16", "bf16")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "model.safetensors").unlink(), "has no .*safetensors file"),
        (
            lambda folder: (folder / "model.safetensors").write_bytes(b"1234"),
            "model.safetensors is damaged, or no safe",
        ),
        (lambda folder: (folder / "tokenizer.json").unlink(), "no tokenizer at"),
        (
            lambda folder: leave_out(folder / "model.safetensors", "lm_head.weight"),
            r"not those of a LlamaForCausalLM .*: 1 missing \(lm_head.weight\)",
        ),
        (lambda folder: shutil.rmtree(folder), "holds no model: train seed 1 first"),
    ],
)
def test_a_broken_checkpoint_is_refused(damage, message, cell, tmp_path):
    damage(tmp_path / "models" / "lora" / "seed1")
    with pytest.raises(ValueError, match=message):
        cell([1])
    assert not list(tmp_path.glob("answers/lora/*seed*"))


def leave_out(path, name):
    save_file({key: value for key, value in load_file(path).items() if key != name}, path, {"format": "pt"})


def test_exhausted_memory_is_told_and_what_was_answered_is_kept(answer, monkeypatch, tmp_path):
    reference, calls = answer(file="reference.jsonl", batch_size=3)[0], []

    def generate(*args):
        calls.append(1)
        if len(calls) > 2:  # both turns of the first batch
            raise torch.OutOfMemoryError("CUDA out of memory")
        return generation.generate(*args)

    monkeypatch.setattr(answers, "generate", generate)
    with pytest.raises(
        ValueError, match="out of memory with 3 questions.*scale.answers.batch_size lower and run again"
    ):
        answer(batch_size=3)
    assert len(read(tmp_path / "answers.jsonl")) == 3
    monkeypatch.undo()
    assert turns(answer(batch_size=1)[0]) == turns(reference)


# ---- a real model, real questions ----


def test_a_real_model_answers_real_questions(tmp_path):
    from finetune.mt_bench.questions import load_questions

    model_folder, file = DATA / "models" / "stories260K", DATA / "mt_bench" / "mt_bench_inf.jsonl"
    for path in (model_folder, file):
        if not path.exists():
            pytest.skip(f"{path} is not there; experiments/fetch.py and conf/model/stories260k.yaml say how to get it")
    model, tokenizer = load_checkpoint(model_folder)
    found = []
    for size in (1, 4):
        speaker = Speaker(model, tokenizer, LLAMA_2, AnswerOptions(max_new_tokens=16, batch_size=size, reserve=16))
        asked = load_questions(file)[::20]  # writing, reasoning, coding, stem; one longer than the window
        path = tmp_path / f"{size}.jsonl"
        facts = answer_questions(speaker, asked, path, model_id="stories", digest="abc", progress_bar=False)
        found.append(turns(read(tmp_path / f"{size}.jsonl")))
    assert found[0] == found[1] and facts["counts"]["questions"] == 4
    texts = [text for pair in found[0].values() for text in pair]
    assert all(text and "<unk>" not in text and "</s>" not in text for text in texts)
