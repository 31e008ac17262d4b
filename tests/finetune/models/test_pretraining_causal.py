"""The tiny LLaMA's tokenizer is of LLaMA's kind, and its pretraining teaches dialogues and saves a whole folder."""

import json

import pytest
import torch

from finetune.data.chat import chat_template
from finetune.data.generated_chat import write_chat
from finetune.models.pretraining_causal import pretrain_causal, train_llama_tokenizer

LLAMA_2 = chat_template("llama-2")
ARCHITECTURE = {
    "model_type": "llama", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 2, "intermediate_size": 48, "max_position_embeddings": 96, "tie_word_embeddings": True,
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chat")
    write_chat(folder, trees=1, dialogues=400, seed=0)
    return folder / "text" / "dialogues.txt"


def run(text, folder, architecture=ARCHITECTURE, **changes):
    settings = {"vocab_size": 420, "length": 64, "steps": 3, "batch_size": 8, "learning_rate": 1e-2, "seed": 0}
    return pretrain_causal(
        text, folder, architecture, LLAMA_2, device=torch.device("cpu"), progress_bar=False, **settings | changes
    )


@pytest.fixture(scope="module")
def made(text, tmp_path_factory):
    """The folder of a model pretrained for sixty steps, and what its pretraining says."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    return folder, run(text, folder, steps=60)


@pytest.fixture(scope="module")
def tokenizer(made):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(made[0], local_files_only=True)


def test_special_ids_and_bytes_are_llamas(tokenizer):
    assert tokenizer.convert_ids_to_tokens([0, 1, 2, 3, 258]) == ["<unk>", "<s>", "</s>", "<0x00>", "<0xFF>"]
    assert (tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert (tokenizer.pad_token_id, tokenizer.padding_side) == (2, "left")
    assert tokenizer.is_fast and len(tokenizer) <= 420 and tokenizer.model_max_length == 96


def test_a_beginning_is_added_and_no_end(tokenizer):
    ids = tokenizer("the cat").input_ids
    assert ids[0] == 1 and 2 not in ids and ids.count(1) == 1


def test_special_tokens_inside_a_text_are_parsed(tokenizer):
    ids = tokenizer("[INST] a [/INST] the cat </s><s>[INST] b [/INST]").input_ids
    at = ids.index(2)
    assert ids[at : at + 2] == [2, 1] and ids.count(1) == 2
    assert tokenizer("</s>", add_special_tokens=False).input_ids == [2]


@pytest.mark.parametrize("written", ["the old dogs help a cat", "é 😀 xyz\n\tQ", "two  spaces", "a"])
def test_what_the_vocabulary_lacks_is_written_in_bytes_and_read_back(written, tokenizer):
    ids = tokenizer(written).input_ids
    assert 0 not in ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == written


def test_the_marks_of_turns_are_single_tokens(tokenizer):
    marks = tokenizer("[INST] x [/INST]", add_special_tokens=False).tokens()
    assert (marks[0], marks[-1]) == ("▁[INST]", "▁[/INST]")


def test_batches_are_padded_on_the_left(tokenizer):
    batch = tokenizer(["the cat", "the old dogs help a cat"], padding=True)
    assert batch["attention_mask"][0][0] == 0 and batch["input_ids"][0][0] == 2
    assert batch["attention_mask"][1] == [1] * len(batch["input_ids"][1])


def test_a_vocabulary_without_room_is_refused():
    with pytest.raises(ValueError, match="vocab_size=260; 259 special tokens and bytes and 4 characters need more"):
        train_llama_tokenizer(["abc"], 260, 64)


def test_the_saved_model_is_a_llama_of_the_given_sizes(made, tokenizer):
    from transformers import AutoModelForCausalLM

    folder, facts = made
    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    config = json.loads((folder / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("llama", ["LlamaForCausalLM"])
    assert [config[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")] == [1, 2, 2]
    assert {name: config[name] for name in ARCHITECTURE} == ARCHITECTURE
    assert model.config.vocab_size == len(tokenizer)
    assert set(facts) == {"loss", "tokens", "steps", "seconds"} and facts["steps"] == 60


def test_pretraining_lowers_the_loss_of_answers(made, text, tmp_path):
    before = run(text, tmp_path / "model", steps=1)["loss"]
    assert before > 5 and made[1]["loss"] < 0.6 * before


def test_the_loss_is_that_of_the_answers_alone(text, tmp_path, monkeypatch):
    """Questions are in the rows and not in the labels."""
    from finetune.models import pretraining_causal

    seen = []
    pack = pretraining_causal.pack

    def spy(ids, trained, length):
        seen.append(pack(ids, trained, length))
        return seen[-1]

    monkeypatch.setattr(pretraining_causal, "pack", spy)
    run(text, tmp_path / "model")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model", local_files_only=True)
    learned = tokenizer.decode(seen[0].labels[seen[0].labels >= 0])
    assert "[INST]" not in learned and "name the" not in learned and "</s>" in learned
    assert "name the" in tokenizer.decode(seen[0].input_ids.flatten())


def test_the_seed_decides_the_weights(text, tmp_path):
    from safetensors.torch import load_file

    for name, seed in (("first", 1), ("again", 1), ("other", 2)):
        run(text, tmp_path / name, seed=seed)
    first, again, other = (load_file(tmp_path / name / "model.safetensors") for name in ("first", "again", "other"))
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert any(not torch.equal(first[key], other[key]) for key in first)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"architecture": ARCHITECTURE | {"model_type": "gpt2"}},
            "model_type='gpt2'; tiny decoders are made for: llama",
        ),
        ({"length": 97}, "length=97; the model has 96 positions: choose at most so many"),
        ({"vocab_size": 100}, "vocab_size=100; 259 special tokens and bytes"),
    ],
    ids=str,
)
def test_settings_that_do_not_fit_are_refused(changes, message, text, tmp_path):
    with pytest.raises(ValueError, match=message):
        run(text, tmp_path / "model", **changes)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist; the generate_chat stage writes it"),
        ("a\tb\na\tb\tc\n", "line 2: needs turns of user and assistant in pairs"),
        ("a\t\n", "line 1: needs turns of user and assistant in pairs"),
        ("a\tb\n", "the dialogues have .+ tokens, too few for one row of 64"),
        ("", "the dialogues have 0 tokens, too few for one row of 64"),
    ],
)
def test_text_that_is_no_dialogues_is_refused(content, message, tmp_path):
    text = tmp_path / "dialogues.txt"
    if content is not None:
        text.write_text(content)
    with pytest.raises(ValueError, match=message):
        run(text, tmp_path / "model")


def test_a_failed_save_leaves_no_half_written_folder(text, tmp_path, monkeypatch):
    from transformers import PreTrainedTokenizerFast

    def fail(*_, **__):
        raise OSError("disk full")

    monkeypatch.setattr(PreTrainedTokenizerFast, "save_pretrained", fail)
    with pytest.raises(OSError, match="disk full"):
        run(text, tmp_path / "model")
    assert not list(tmp_path.iterdir())
