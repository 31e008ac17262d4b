"""What these tests share: a tiny BERT, rows for it, and a Trainer of it, which is imported where it is asked for."""

import gc

import pytest
import torch

from sparsegrad import SparseGradAdamW, param_groups, sparsify


@pytest.fixture
def sparse(tiny_transformer, transformer_bases):
    """``sparse(options)``: a sparsified BERT in float32."""

    def make(options):
        model, patterns, _ = tiny_transformer("bert", dtype=torch.float32)
        return sparsify(model, transformer_bases(), 9, patterns, **options)

    return make


@pytest.fixture
def rows():
    """24 labelled sequences of four tokens."""
    return [{"input_ids": [1, 2, 3 + i % 9, i % 7], "attention_mask": [1] * 4, "labels": i % 2} for i in range(24)]


@pytest.fixture
def callback():
    """``callback(on_step_end=function, ...)``: a callback of the Trainer."""

    def make(**events):
        from transformers import TrainerCallback

        return type("Callback", (TrainerCallback,), {name: staticmethod(event) for name, event in events.items()})()

    return make


@pytest.fixture
def trainer(rows, tmp_path):
    """``trainer(model, folder, **arguments)``: four steps on batches of four rows, with SparseGradAdamW."""
    gc.freeze()  # a Trainer collects garbage as it begins, which takes half a second of what all imports have made

    def make(model, folder="", callbacks=(), lr=1e-2, optimizers=None, kind=None, **given):
        from transformers import Trainer, TrainingArguments

        given = {"max_steps": 4, "save_steps": 2, "logging_steps": 1, "per_device_train_batch_size": 4} | given
        quiet = {"report_to": [], "use_cpu": True, "disable_tqdm": True, "dataloader_pin_memory": False}
        if kind is None and optimizers is None:
            optimizers = (SparseGradAdamW(param_groups(model), lr=lr), None)
        return Trainer(
            model,
            TrainingArguments(str(tmp_path / folder), **given, **quiet),
            train_dataset=rows,
            eval_dataset=rows[:8],
            callbacks=[*callbacks],
            optimizers=optimizers or (None, None),
            optimizer_cls_and_kwargs=kind,
        )

    yield make
    gc.unfreeze()
