"""What the tests of the comparison and of the pipeline share: a tiny BERT checkpoint, tiny tasks in GLUE's layout."""

import json
import os
import random
import socket
from contextlib import suppress
from pathlib import Path

import pytest

with suppress(ImportError):  # the tests of a card need it not
    import hypothesis

    hypothesis.settings.register_profile("tests", deadline=None, derandomize=True, database=None, max_examples=30)
    hypothesis.settings.load_profile("tests")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny tensors: more threads only wait for each other

WORDS = (
    "the a cat dog bird fish sees eats likes finds big small red blue old new house tree river road in on under by "
    "and not very never ##s ##ed"
).split()
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
COLUMNS = {
    "cola": ["sentence"],
    "stsb": ["sentence1", "sentence2"],
    "mnli": ["premise", "hypothesis"],
    "mrpc": ["sentence1", "sentence2"],
    "qnli": ["question", "sentence"],
    "qqp": ["question1", "question2"],
    "rte": ["sentence1", "sentence2"],
    "sst2": ["sentence"],
}
VALIDATION = {"mnli": "validation_matched"}


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory):
    """A folder in the hub's layout: BERT of random weights, hidden size 32, two blocks, and its WordPiece tokenizer."""
    import torch
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import BertConfig, BertForSequenceClassification

    folder = tmp_path_factory.mktemp("checkpoint")
    vocabulary = {word: number for number, word in enumerate(SPECIAL + WORDS)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(word, vocabulary[word]) for word in ("[CLS]", "[SEP]")],
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    settings = {"tokenizer_class": "BertTokenizer", "do_lower_case": True, "mask_token": "[MASK]"} | names
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=40,
    )
    torch.manual_seed(0)
    model = BertForSequenceClassification(config)
    model.bert.save_pretrained(folder)
    return folder


def sentences(number, seed):
    """Sentences of three to nine words."""
    draw = random.Random(seed)
    words = [word for word in WORDS if not word.startswith("##")]
    return [" ".join(draw.choices(words, k=draw.randint(3, 9))) for _ in range(number)]


def rows(task, number, seed):
    """Columns of a split: labels say whether the first text begins with one of the first half of its words."""
    texts = {name: sentences(number, seed + place) for place, name in enumerate(COLUMNS[task])}
    first = [text.split()[0] for text in next(iter(texts.values()))]
    signal = [WORDS.index(word) % 6 for word in first]
    labels = {"stsb": [float(value) for value in signal], "mnli": [value % 3 for value in signal]}
    return texts | {"label": labels.get(task, [int(value < 3) for value in signal]), "idx": list(range(number))}


@pytest.fixture(scope="session")
def write_task():
    """``write_task(root, task, train=40, validation=24, seed=0, **columns)``: parquet in the hub's layout.

    Columns replace the training split's; None leaves one out. Returns the task's folder.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    def write(root, task, train=40, validation=24, seed=0, **columns):
        folder = Path(root) / "glue" / task
        folder.mkdir(parents=True, exist_ok=True)
        content = {k: v for k, v in (rows(task, train, seed) | columns).items() if v is not None}
        pq.write_table(pa.table(content), folder / "train-00000-of-00001.parquet")
        held_out = pa.table(rows(task, validation, seed + 1000))
        pq.write_table(held_out, folder / f"{VALIDATION.get(task, 'validation')}-00000-of-00001.parquet")
        return folder

    return write


@pytest.fixture(scope="session")
def glue_root(tmp_path_factory, write_task):
    """``data.root`` with CoLA, MRPC and STS-B: 40 training and 24 validation rows each. Read only."""
    root = tmp_path_factory.mktemp("data")
    for task in ("cola", "mrpc", "stsb"):
        write_task(root, task)
    return root


@pytest.fixture(scope="session")
def chat_root(tmp_path_factory):
    """``chat.root``: 24 generated message trees, a LLaMA of random weights and its tokenizer. Read only."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from finetune.data.generated_chat import write_chat
    from finetune.models.tokenizers import train_llama_tokenizer

    root = tmp_path_factory.mktemp("chat")
    write_chat(root, trees=24, dialogues=20, seed=0)
    tokenizer = train_llama_tokenizer((root / "text" / "dialogues.txt").read_text().splitlines(), 400, 128)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 2}
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=128, bos_token_id=1, eos_token_id=2, **sizes)
    )
    model.save_pretrained(root / "models" / "tiny")
    tokenizer.save_pretrained(root / "models" / "tiny")
    return root


@pytest.fixture
def ranks():
    """``ranks(0)``: the environment of one of two processes, as torchrun and ``accelerate launch`` set it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    return lambda rank: common | {"RANK": str(rank), "LOCAL_RANK": str(rank), "ACCELERATE_USE_CPU": "true"}
