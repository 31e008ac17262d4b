"""What the tests of the comparison share: composed configurations, tiny classifiers, tokenised tasks, methods."""

from copy import deepcopy
from pathlib import Path

import pytest
import torch

CONF = Path(__file__).parents[2] / "conf"
METHODS = ("full", "lora", "meprop", "sparsegrad")


@pytest.fixture(params=METHODS)
def method_name(request):
    return request.param


@pytest.fixture(scope="session")
def compose():
    """``compose("model=minilm", ..., config_name="glue")``: a composed configuration as plain dictionaries."""
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    made = {}

    def make(*overrides, config_name="glue"):
        key = (config_name, overrides)
        if key not in made:
            with initialize_config_dir(str(CONF), version_base=None):
                made[key] = OmegaConf.to_container(compose(config_name, list(overrides)), resolve=True)
        return deepcopy(made[key])

    return make


@pytest.fixture
def config(compose, tiny_checkpoint, glue_root, tmp_path):
    """``config("method=lora", ...)``: six steps of eight examples on the tiny checkpoint; files go to tmp_path."""

    def make(*overrides):
        found = compose(
            "model=tiny_bert",
            f"model.checkpoint={tiny_checkpoint}",
            f"data.root={glue_root}",
            "protocol.preliminary.steps=2",
            "protocol.preliminary.batch_size=8",
            "protocol.density=0.05",
            "scale=smoke",
            "scale.max_steps=6",
            "scale.evaluation_steps=3",
            "learning_rate=0.001",
            "batch_size=8",
            "device=cpu",
            "progress=false",
            "wandb.mode=disabled",
            *overrides,
        )
        # Not as overrides: what is composed is kept over tests.
        return found | {name: str(tmp_path / name) for name in ("output", "checkpoints")}

    return make


@pytest.fixture
def classifier(compose, tiny_checkpoint):
    """``classifier(num_labels=2, seed=0, dropout=True)``: the tiny checkpoint with a head drawn from the seed."""
    from finetune.models import load_classifier

    group = compose("model=tiny_bert", f"model.checkpoint={tiny_checkpoint}")["model"]

    def make(num_labels=2, seed=0, dropout=True):
        model = load_classifier(group, "", num_labels, seed)
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout) and not dropout:
                module.p = 0.0
        return model.eval()

    return make


@pytest.fixture(scope="session")
def tokenizer(tiny_checkpoint):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_checkpoint, local_files_only=True)


@pytest.fixture(scope="session")
def llama_tokenizer():
    """A tokenizer of LLaMA's kind, of 400 tokens, made from a few words."""
    from finetune.models.tokenizers import train_llama_tokenizer

    words = "where is the cat in house and dog bird on road I think why how so [INST] [/INST] . ? < > / s U N K S Y"
    return train_llama_tokenizer([words] * 4, 400, 256)


@pytest.fixture
def load(compose, tokenizer, glue_root):
    """``load("cola", root=..., padding="longest", max_length=32, limit=None)``: a task and its splits."""
    from finetune.data.glue import load_task

    def make(task, root=glue_root, max_length=32, padding="longest", limit=None, **data):
        group = compose(f"data.root={root}")["data"] | {"task": task} | data
        return load_task(group, tokenizer, max_length=max_length, padding=padding, limit=limit)

    return make


@pytest.fixture(scope="session")
def random_bases():
    """``random_bases(seed)``: orthogonal bases of the tiny checkpoint's layer kinds, float32."""
    from sparsegrad import Basis

    def orthogonal(size, generator):
        return torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64)).Q.float()

    def make(seed=0):
        generator = torch.Generator().manual_seed(seed)
        wide, narrow = orthogonal(64, generator), orthogonal(32, generator)
        return {"up": Basis(narrow, wide), "down": Basis(wide.T.contiguous(), narrow.T.contiguous())}

    return make


@pytest.fixture
def build(config, random_bases):
    """``build("lora", "protocol.train=mlp", one_backward=False)``: a method as the runs build it."""
    from finetune.methods import build_method

    def make(name, *overrides, one_backward=False, bases=None):
        found = config(f"method={name}", *overrides)
        selecting = one_backward and found["method"].get("form") is not None
        return build_method(
            found["method"] | ({"select_in": "backward"} if selecting else {}),
            found["model"],
            found["protocol"],
            bases=bases or random_bases(),
            one_backward_a_step=one_backward,
        )

    return make


@pytest.fixture
def options():
    """``options(max_steps=..., ...)``: training options with small values."""
    from finetune.training.options import TrainingOptions

    def make(**changes):
        values = {
            "learning_rate": 1e-3,
            "batch_size": 8,
            "epochs": 100,
            "max_steps": 10,
            "evaluation_steps": 5,
            "seed": 7,
            "checkpoint_seconds": 0.0,
        }
        return TrainingOptions(**values | changes)

    return make


@pytest.fixture
def run_training(load, options):
    """``run_training(model, optimizer, **options)``: the loop on CoLA (``task=...``), no checkpoints unless given."""
    import numpy as np

    from finetune.training.evaluation import Evaluation, evaluate
    from finetune.training.loop import Training, train
    from finetune.training.processes import make_accelerator

    def make(model, optimizer, task="cola", split=None, evaluation=None, files=None, **changes):
        named = ("on_evaluation", "digest", "refresh", "tracker", "deadline")
        extra = {name: changes.pop(name) for name in named if name in changes}
        facts, splits = load(task)

        def measured(model):
            if evaluation is None:
                return evaluate(model, splits["validation"], facts, 16, torch.device("cpu"))
            found = evaluation(model)
            return found if isinstance(found, Evaluation) else Evaluation(found, np.zeros(0), np.zeros(0))

        training = Training(
            model,
            optimizer,
            splits["train"] if split is None else split,
            measured,
            facts.metric,
            options(**changes),
            make_accelerator("cpu", "fp32"),
            checkpoints=files,
            **extra,
        )
        return train(training)

    return make


@pytest.fixture
def chat_config(compose, chat_root, tmp_path):
    """``chat_config("method=lora", ...)``: six steps of eight packed blocks on the tiny LLaMA; files go to tmp_path."""

    def make(*overrides):
        found = compose(
            "model=llama2_7b",
            "model.name=tiny",
            "model.folder=models/tiny",
            "model.layers_to_transform=[0,3]",
            "model.lora_rank=2",
            "model.k=40",
            "chat=generated_chat",
            f"chat.root={chat_root}",
            "protocol.preliminary.steps=3",
            "scale=llama/smoke",
            "scale.max_length=32",
            "scale.batch_size=8",
            "scale.micro_batch_size=3",
            "scale.max_steps=6",
            "scale.warmup_steps=2",
            "scale.evaluation_steps=3",
            "learning_rate=0.005",
            "device=cpu",
            "progress=false",
            "wandb.mode=disabled",
            *overrides,
            config_name="chat",
        )
        return found | {name: str(tmp_path / name) for name in ("output", "checkpoints")}

    return make


@pytest.fixture
def believed(monkeypatch):
    """Records that a test makes up are read unchecked; what the check refuses is tested in store/test_checks.py."""
    from finetune.store import records

    monkeypatch.setattr(records, "check_record", lambda path, record: None)
