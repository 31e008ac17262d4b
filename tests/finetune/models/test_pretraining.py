"""Tokenizers and tiny models made from text: special ids, whole folders, what is learned."""

import json

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)

from finetune.data.chat import chat_template
from finetune.data.generated import write_corpus, write_task
from finetune.data.generated_chat import write_chat
from finetune.models import pretraining
from finetune.models.pretraining import Pretraining, pretrain, pretrain_causal
from finetune.models.tokenizers import train_llama_tokenizer, train_tokenizer
from finetune.store.files import read_text, write_text

SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 256}
BERT = {"model_type": "bert", "max_position_embeddings": 64, "type_vocab_size": 2} | SIZES
ROBERTA = {"model_type": "roberta", "max_position_embeddings": 66, "type_vocab_size": 1} | SIZES
ROBERTA |= {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
LLAMA = {
    "model_type": "llama", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 2, "intermediate_size": 48, "max_position_embeddings": 96, "tie_word_embeddings": True,
}  # fmt: skip
ARCHITECTURES = {"bert": BERT, "llama": LLAMA, "roberta": ROBERTA}
FIRST, SECOND = "the old dogs help a cat", "a king calls the boys today"
LLAMA_2 = chat_template("llama-2")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A folder with ``corpus.txt`` and ``text/dialogues.txt``."""
    folder = tmp_path_factory.mktemp("text")
    write_corpus(folder / "corpus.txt", 6000, seed=0)
    write_chat(folder, trees=1, dialogues=400, seed=0)
    return folder


def run(text, folder, architecture=BERT, length=64, **changes):
    """Pretrain on the texts of a folder, for three steps unless told otherwise."""
    causal = architecture["model_type"] not in ("bert", "roberta")
    settings = {"vocab_size": 420 if causal else 400, "learning_rate": 1e-2 if causal else 2e-3, "steps": 3}
    settings |= {"batch_size": 8, "seed": 0, "progress_bar": False} | changes
    options = Pretraining(device=torch.device("cpu"), **settings)
    if causal:
        return pretrain_causal(text / "text/dialogues.txt", folder, architecture, LLAMA_2, length, options)
    return pretrain(text / "corpus.txt", folder, architecture, options)


def saved_tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


@pytest.fixture(scope="module", params=["bert", "roberta"])
def made(request, text, tmp_path_factory):
    """A model type, and the folder of a model pretrained for three steps."""
    folder = tmp_path_factory.mktemp("models") / request.param
    run(text, folder, ARCHITECTURES[request.param])
    return request.param, folder


@pytest.fixture(scope="module")
def llama(text, tmp_path_factory):
    """The folder of a tiny LLaMA pretrained for sixty steps, and what its pretraining says."""
    folder = tmp_path_factory.mktemp("models") / "llama"
    return folder, run(text, folder, LLAMA, steps=60)


@pytest.fixture(scope="module")
def tokenizer(llama):
    return saved_tokenizer(llama[0])


# ---- encoders ----


def test_the_saved_tokenizer_puts_special_ids_where_the_real_one_does(made):
    kind, folder = made
    tokenizer = saved_tokenizer(folder)
    first, second = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (FIRST, SECOND))
    pair = tokenizer(FIRST, SECOND)
    cls, sep = tokenizer.cls_token_id, tokenizer.sep_token_id
    assert tokenizer(FIRST)["input_ids"] == [cls, *first, sep]
    between = [sep] if kind == "bert" else [sep, sep]
    assert pair["input_ids"] == [cls, *first, *between, *second, sep]
    assert tokenizer.unk_token_id not in pair["input_ids"]
    if kind == "bert":
        assert pair["token_type_ids"] == [0] * (len(first) + 2) + [1] * (len(second) + 1)
        assert tokenizer.pad_token_id == 0
    else:
        assert "token_type_ids" not in pair
        assert (cls, tokenizer.pad_token_id, sep) == (0, 1, 2)
    for text in (FIRST, SECOND):
        assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True).strip() == text
    assert tokenizer([FIRST, "a cat"], padding=True)["input_ids"][1][-1] == tokenizer.pad_token_id


def test_the_saved_model_is_loaded_by_the_classifier_and_takes_pairs(made):
    kind, folder = made
    tokenizer = saved_tokenizer(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3, local_files_only=True)
    assert (model.config.model_type, model.config.vocab_size) == (kind, len(tokenizer))
    rows = tokenizer([FIRST, SECOND], [SECOND, FIRST], return_tensors="pt", padding=True)
    assert model(**rows).logits.shape == (2, 3)


# ---- the decoder ----


def test_special_ids_bytes_and_padding_are_llamas(tokenizer):
    assert tokenizer.convert_ids_to_tokens([0, 1, 2, 3, 258]) == ["<unk>", "<s>", "</s>", "<0x00>", "<0xFF>"]
    assert (tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert (tokenizer.pad_token_id, tokenizer.padding_side) == (2, "left")
    assert tokenizer.is_fast and len(tokenizer) <= 420 and tokenizer.model_max_length == 96
    batch = tokenizer(["the cat", FIRST], padding=True)
    assert batch["attention_mask"][0][0] == 0 and batch["input_ids"][0][0] == 2
    assert batch["attention_mask"][1] == [1] * len(batch["input_ids"][1])


def test_a_beginning_is_added_no_end_and_marks_are_parsed(tokenizer):
    ids = tokenizer("[INST] a [/INST] the cat </s><s>[INST] b [/INST]").input_ids
    at = ids.index(2)
    assert ids[0] == 1 and ids[at : at + 2] == [2, 1] and (ids.count(1), ids.count(2)) == (2, 1)
    assert tokenizer("</s>", add_special_tokens=False).input_ids == [2]
    marks = tokenizer("[INST] x [/INST]", add_special_tokens=False).tokens()
    assert (marks[0], marks[-1]) == ("▁[INST]", "▁[/INST]")


@pytest.mark.parametrize("written", [FIRST, "é 😀 xyz\n\tQ", "two  spaces", "a"])
def test_what_the_vocabulary_lacks_is_written_in_bytes_and_read_back(written, tokenizer):
    ids = tokenizer(written).input_ids
    assert 0 not in ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == written


def test_the_saved_model_is_a_llama_of_the_given_sizes(llama, tokenizer):
    folder, facts = llama
    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    config = json.loads((folder / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("llama", ["LlamaForCausalLM"])
    assert [config[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")] == [1, 2, 2]
    assert {name: config[name] for name in LLAMA} == LLAMA
    assert model.config.vocab_size == len(tokenizer)
    assert set(facts) == {"loss", "steps", "seconds"} and facts["steps"] == 60


def test_pretraining_lowers_the_loss_of_answers(llama, text, tmp_path):
    before = run(text, tmp_path / "model", LLAMA, steps=1)["loss"]
    assert before > 5 and llama[1]["loss"] < 0.6 * before


def test_answers_alone_are_learned(text, tmp_path, monkeypatch):
    """Questions are in the rows and not in the labels."""
    seen = []
    packed = pretraining.pack
    monkeypatch.setattr(pretraining, "pack", lambda *given: seen.append(packed(*given)) or seen[-1])
    run(text, tmp_path / "model", LLAMA, steps=1)
    tokenizer, (rows,) = saved_tokenizer(tmp_path / "model"), seen
    learned = tokenizer.decode(rows.labels[rows.labels >= 0])
    assert "[INST]" not in learned and "name the" not in learned and "</s>" in learned
    assert "name the" in tokenizer.decode(rows.input_ids.flatten())


# ---- both ----


@pytest.mark.parametrize("architecture", [BERT, LLAMA], ids=["encoder", "decoder"])
def test_the_seed_decides_the_weights(architecture, text, tmp_path):
    for name, seed in (("first", 1), ("again", 1), ("other", 2)):
        run(text, tmp_path / name, architecture, seed=seed)
    first, again, other = (load_file(tmp_path / name / "model.safetensors") for name in ("first", "again", "other"))
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert any(not torch.equal(first[key], other[key]) for key in first)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": LLAMA | {"model_type": "lama"}}, "lama"),
        (
            {"architecture": LLAMA | {"vocab_size": 9, "bos_token_id": 0}},
            "gives bos_token_id, vocab_size, which pretrain",
        ),
        ({"architecture": LLAMA, "length": 97}, "length=97; the model has 96 positions"),
        ({"architecture": LLAMA, "vocab_size": 100}, "vocab_size=100; 259 special tokens and bytes"),
    ],
)
def test_settings_that_do_not_fit_are_refused(changes, message, text, tmp_path):
    with pytest.raises(ValueError, match=message):
        run(text, tmp_path / "model", **changes)
    assert not list(tmp_path.iterdir())


def test_tokenizers_that_cannot_be_made_are_refused():
    with pytest.raises(ValueError, match="'gpt2'; tiny encoders are made for: bert, roberta"):
        train_tokenizer([FIRST], "gpt2", 100, 62)
    with pytest.raises(ValueError, match="vocab_size=260; 259 special tokens and bytes and 4 characters need more"):
        train_llama_tokenizer(["abc"], 260, 64)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "the generate stage"),
        ("a\tb\na\tb\tc\n", "line 2: needs turns of user and assistant in pairs"),
        ("a\t\n", "line 1: needs turns of user and assistant in pairs"),
        ("a\tb\n", "the dialogues have .+ tokens, too few for one row of 64"),
        ("", "the dialogues have 0 tokens, too few for one row of 64"),
    ],
)
def test_text_that_is_no_dialogues_is_refused(content, message, tmp_path):
    file = tmp_path / "text/dialogues.txt"
    file.parent.mkdir()
    if content is not None:
        file.write_text(content)
    with pytest.raises(ValueError, match=message):
        run(tmp_path, tmp_path / "model", LLAMA)
    with pytest.raises(ValueError, match="the generate stage"):
        run(tmp_path, tmp_path / "model", BERT)


@pytest.mark.parametrize("architecture", [BERT, LLAMA], ids=["encoder", "decoder"])
def test_a_failed_save_leaves_the_old_folder_or_none(architecture, text, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise OSError("disk full")

    run(text, tmp_path / "old", architecture)
    old = {file.name: file.read_bytes() for file in (tmp_path / "old").iterdir()}
    monkeypatch.setattr(PreTrainedTokenizerFast, "save_pretrained", fail)
    for name in ("old", "new"):
        with pytest.raises(OSError, match="disk full"):
            run(text, tmp_path / name, architecture, seed=5)
    assert [path.name for path in tmp_path.iterdir()] == ["old"]
    assert {file.name: file.read_bytes() for file in (tmp_path / "old").iterdir()} == old


# ---- the generated CoLA ----


def bag_of_words(train, validation):
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression

    counts = CountVectorizer(token_pattern=r"\b\w+\b")
    model = LogisticRegression(max_iter=2000).fit(counts.fit_transform(train["sentence"]), train["label"])
    return model.score(counts.transform(validation["sentence"]), validation["label"])


def fine_tune(folder, train, validation, steps, learning_rate=5e-4):
    """Accuracy on CoLA after full fine-tuning at batch 32."""
    torch.manual_seed(0)
    tokenizer = saved_tokenizer(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2, local_files_only=True).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
    inputs, held_out = (tokenizer(part["sentence"], padding=True, return_tensors="pt") for part in (train, validation))
    labels, truth = (torch.tensor(part["label"]) for part in (train, validation))
    for rows in torch.randint(len(labels), (steps, 32)):
        logits = model(**{name: value[rows] for name, value in inputs.items()}).logits
        torch.nn.functional.cross_entropy(logits, labels[rows]).backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        predicted = model.eval()(**held_out).logits.argmax(-1)
    return (predicted == truth).float().mean().item()


def test_full_fine_tuning_beats_the_majority_and_a_bag_of_words_and_does_not_saturate(text, tmp_path):
    write_task("cola", tmp_path, 6000, 500, seed=0)
    train, validation = (
        pq.read_table(tmp_path / "cola" / f"{split}-00000-of-00001.parquet").to_pydict()
        for split in ("train", "validation")
    )
    run(text, tmp_path / "model", steps=300, batch_size=32)
    share = sum(validation["label"]) / len(validation["label"])
    full = fine_tune(tmp_path / "model", train, validation, steps=300)
    assert 0.97 > full > 0.1 + max(share, 1 - share, bag_of_words(train, validation))


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_a_tokenizer_is_the_same_whenever_it_is_learned(kind):
    """The trainer's hash tables begin anew in every call."""
    lines = [
        "the old dogs help a cat today",
        "a teacher visits the angry kings",
        "now the farmer thanks a small girl",
    ] * 3
    first, *others = (train_tokenizer(lines, kind, 320, 64).backend_tokenizer.to_str() for _ in range(4))
    assert others == [first] * 3


@pytest.mark.parametrize("name", ["corpus.txt", "dialogues.txt"])
@pytest.mark.parametrize(
    ("content", "told"),
    [(b"another text\n", "is not what"), (b"", "is not what"), (None, "does not exist"), (b"\xff", "is not what")],
)
def test_a_text_that_was_written_is_read_whole_or_refused(name, content, told, tmp_path):
    path = tmp_path / name
    write_text(path, "one\ntwo\n")
    assert read_text(path) == "one\ntwo\n"
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=told):
        read_text(path)


def test_a_users_own_text_needs_no_checksum_but_utf_8(tmp_path):
    (tmp_path / "mine.txt").write_text("a line\n")
    assert read_text(tmp_path / "mine.txt") == "a line\n"
    (tmp_path / "mine.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="is no UTF-8 text"):
        read_text(tmp_path / "mine.txt")
