"""The Trainer on ``get_sparsegrad_model``: checkpoints, resume bit for bit, the best model, its adapter."""

import pytest
import torch

from sparsegrad import (
    SparseGradAdamW,
    SparseGradConfig,
    SparseGradModel,
    get_sparsegrad_model,
    param_groups,
    sparsegrad_layers,
)

FORMS = ["folded", "rotated", "truncated"]


@pytest.fixture
def wrapped(tiny_transformer, transformer_bases):
    """``wrapped(form)``: a BERT in float32 with an adapter, its classifier trained too."""

    def make(form):
        model, patterns, _ = tiny_transformer("bert", dtype=torch.float32)
        config = SparseGradConfig(k=9, form=form, target_modules=patterns, task_type="SEQ_CLS")
        return get_sparsegrad_model(model, config, transformer_bases())

    return make


@pytest.mark.parametrize("form", FORMS)
def test_a_run_goes_on_and_its_adapter_is_the_one_of_a_run_that_was_not_cut(
    form, wrapped, trainer, tiny_transformer, tmp_path
):
    given = {"max_steps": 3, "max_grad_norm": 0.5, "lr_scheduler_type": "cosine", "gradient_accumulation_steps": 2}
    whole = trainer(wrapped(form), **given)
    whole.train()
    resumed = trainer(wrapped(form), **given)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert whole.state.log_history[:-1] == resumed.state.log_history[:-1]
    for (name, tensor), found in zip(
        whole.model.state_dict().items(), resumed.model.state_dict().values(), strict=True
    ):
        assert torch.equal(tensor, found), name
    for name, run in (("whole", whole), ("resumed", resumed)):
        run.model.save_pretrained(tmp_path / name)
    sizes = [(tmp_path / name / "adapter_model.safetensors").stat().st_size for name in ("whole", "resumed")]
    assert sizes[0] == sizes[1]
    base, _, tokens = tiny_transformer("bert", dtype=torch.float32)
    loaded = SparseGradModel.from_pretrained(base, tmp_path / "resumed")
    torch.testing.assert_close(loaded(tokens).logits, whole.model.eval()(tokens).logits, rtol=1e-5, atol=1e-6)


def test_only_what_the_configuration_says_trains_and_the_best_is_loaded(wrapped, trainer):
    model = wrapped("truncated")
    before = {name: tensor.clone() for name, tensor in model.base_model.state_dict().items()}
    best = {"load_best_model_at_end": True, "eval_strategy": "steps", "save_steps": 1, "eval_steps": 1}
    run = trainer(model, lr=1.0, metric_for_best_model="eval_loss", **best)
    run.train()
    losses = [entry["eval_loss"] for entry in run.state.log_history if "eval_loss" in entry]
    assert run.evaluate()["eval_loss"] == pytest.approx(min(losses), abs=1e-6) and min(losses) < losses[-1]
    targets = tuple(f"{name}." for name in sparsegrad_layers(model.base_model))
    changed = {n for n, t in model.base_model.state_dict().items() if not torch.equal(t, before[n])}
    assert changed and all(name.startswith(("classifier.", *targets)) for name in changed)


def test_a_model_that_was_frozen_afterwards_trains_all_the_same(wrapped, trainer):
    model = wrapped("folded").requires_grad_(False)
    run = trainer(model, max_steps=1, save_strategy="no")
    layer = next(iter(sparsegrad_layers(model.base_model).values()))
    before = layer.weight.detach().clone()
    run.train()
    assert isinstance(run.optimizer.optimizer, SparseGradAdamW) and len(param_groups(model)) == 2
    assert not torch.equal(layer.weight, before)
