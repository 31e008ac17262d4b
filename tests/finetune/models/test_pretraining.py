"""Tokenizers and tiny models made from text: special ids, whole folders, and fine-tuning against a bag of words."""

import pyarrow.parquet as pq
import pytest
import torch

from finetune.data.generated import write_corpus, write_task
from finetune.models.pretraining import mask_tokens, pretrain, train_tokenizer

SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 256}
BERT = {"model_type": "bert", "max_position_embeddings": 64, "type_vocab_size": 2} | SIZES
ROBERTA = {
    "model_type": "roberta",
    "max_position_embeddings": 66,
    "type_vocab_size": 1,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
} | SIZES
ARCHITECTURES = {"bert": BERT, "roberta": ROBERTA}
FIRST, SECOND = "the old dogs help a cat", "a king calls the boys today"


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "corpus.txt"
    write_corpus(file, 6000, seed=0)
    return file


def run(corpus, folder, architecture=BERT, **changes):
    settings = {"vocab_size": 400, "steps": 3, "batch_size": 8, "learning_rate": 2e-3, "seed": 0} | changes
    return pretrain(corpus, folder, architecture, device=torch.device("cpu"), progress_bar=False, **settings)


@pytest.fixture(scope="module", params=sorted(ARCHITECTURES))
def made(request, corpus, tmp_path_factory):
    """A model type, and the folder of a model pretrained for three steps."""
    folder = tmp_path_factory.mktemp("models") / request.param
    run(corpus, folder, ARCHITECTURES[request.param])
    return request.param, folder


def test_the_saved_tokenizer_puts_special_ids_where_the_real_one_does(made):
    from transformers import AutoTokenizer

    kind, folder = made
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
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


def test_the_saved_tokenizer_round_trips(made):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(made[1], local_files_only=True)
    for text in (FIRST, SECOND):
        assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True).strip() == text
    padded = tokenizer([FIRST, "a cat"], padding=True)["input_ids"]
    assert padded[1][-1] == tokenizer.pad_token_id


def test_the_saved_model_is_loaded_by_the_classifier_and_takes_pairs(made):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    kind, folder = made
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3, local_files_only=True)
    assert model.config.model_type == kind
    assert model.config.vocab_size == len(tokenizer)
    assert model(**tokenizer([FIRST, SECOND], [SECOND, FIRST], return_tensors="pt", padding=True)).logits.shape == (
        2,
        3,
    )


def test_the_seed_decides_the_weights(corpus, tmp_path):
    from safetensors.torch import load_file

    for name, seed in (("first", 1), ("again", 1), ("other", 2)):
        run(corpus, tmp_path / name, seed=seed)
    first, again, other = (load_file(tmp_path / name / "model.safetensors") for name in ("first", "again", "other"))
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert any(not torch.equal(first[key], other[key]) for key in first)


def test_masking_spares_special_tokens_and_keeps_the_shares():
    ids = torch.full((400, 50), 7)
    special = torch.zeros_like(ids, dtype=torch.bool)
    special[:, 0] = True
    masked, labels = mask_tokens(ids, special, 4, 100, torch.Generator().manual_seed(0))
    chosen = labels != -100
    assert not chosen[:, 0].any()
    assert torch.equal(labels[chosen], ids[chosen])
    assert torch.equal(masked[~chosen], ids[~chosen])
    assert abs(chosen[:, 1:].float().mean() - 0.15) < 0.01
    assert abs((masked[chosen] == 4).float().mean() - 0.8) < 0.03


def test_an_unknown_model_type_says_what_there_is(corpus, tmp_path):
    with pytest.raises(ValueError, match=r"model_type='gpt2'; tiny models are made for: bert, roberta"):
        train_tokenizer([FIRST], "gpt2", 100, 62)
    with pytest.raises(ValueError, match="model_type='gpt2'"):
        run(corpus, tmp_path / "model", BERT | {"model_type": "gpt2"})
    assert not list(tmp_path.iterdir())


def test_a_missing_corpus_names_the_stage(tmp_path):
    with pytest.raises(ValueError, match="generate stage"):
        run(tmp_path / "none.txt", tmp_path / "model")


@pytest.mark.parametrize("before", [False, True])
def test_a_failed_save_leaves_no_half_written_folder(corpus, tmp_path, monkeypatch, before):
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path / "model"
    if before:
        run(corpus, folder)
        old = {file.name: file.read_bytes() for file in folder.iterdir()}

    def fail(*_, **__):
        raise OSError("disk full")

    monkeypatch.setattr(PreTrainedTokenizerFast, "save_pretrained", fail)
    with pytest.raises(OSError, match="disk full"):
        run(corpus, folder, seed=5)
    assert [path.name for path in tmp_path.iterdir()] == (["model"] if before else [])
    if before:
        assert {file.name: file.read_bytes() for file in folder.iterdir()} == old


def bag_of_words(train, validation):
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression

    counts = CountVectorizer(token_pattern=r"\b\w+\b")
    model = LogisticRegression(max_iter=2000).fit(counts.fit_transform(train["sentence"]), train["label"])
    return model.score(counts.transform(validation["sentence"]), validation["label"])


def fine_tune(folder, train, validation, steps, learning_rate=5e-4):
    """Accuracy on CoLA after full fine-tuning at batch 32."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
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


@pytest.fixture(scope="module")
def scores(corpus, tmp_path_factory):
    """Accuracy on the generated CoLA: of the larger class, of a bag of words, of full fine-tuning."""
    folder = tmp_path_factory.mktemp("scores")
    write_task("cola", folder, 6000, 500, seed=0)
    train, validation = (
        pq.read_table(folder / "cola" / f"{split}-00000-of-00001.parquet").to_pydict()
        for split in ("train", "validation")
    )
    run(corpus, folder / "model", steps=300, batch_size=32)
    share = sum(validation["label"]) / len(validation["label"])
    return {
        "majority": max(share, 1 - share),
        "bag of words": bag_of_words(train, validation),
        "full": fine_tune(folder / "model", train, validation, steps=300),
    }


def test_full_fine_tuning_beats_the_majority_and_a_bag_of_words(scores):
    assert scores["full"] > scores["majority"] + 0.1
    assert scores["full"] > scores["bag of words"] + 0.1


def test_full_fine_tuning_does_not_saturate(scores):
    assert scores["full"] < 0.97
