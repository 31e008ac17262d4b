"""transformers' Trainer: checkpoints, resume bit for bit, the best model, clipping, accumulation, evaluation."""

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from sparsegrad import SparseGradAdamW, clip_grad_norm_, merge, param_groups, sparsegrad_layers

OPTIONS = [
    {"form": "folded"},
    {"form": "folded", "select_in": "backward"},
    {"form": "rotated"},
    {"form": "truncated", "update": "in_place"},
    {"form": "truncated", "update": "side"},
    {"form": "truncated", "keep": 4},
]
WAYS = {"lr_scheduler_type": "cosine", "warmup_steps": 1, "max_grad_norm": 0.5}


def assert_same_run(one, other):
    """Weights, moments and what was logged, to the bit."""
    assert one.state.log_history[:-1] == other.state.log_history[:-1]
    for (name, tensor), found in zip(one.model.state_dict().items(), other.model.state_dict().values(), strict=True):
        assert torch.equal(found, tensor), name
    first, second = (each.optimizer.state_dict()["state"] for each in (one, other))
    assert first.keys() == second.keys()
    for index, state in first.items():
        assert state.keys() == second[index].keys()
        assert all(torch.equal(torch.as_tensor(second[index][key]), torch.as_tensor(state[key])) for key in state)


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(map(str, o.values())))
def test_a_run_goes_on_from_a_checkpoint_bit_for_bit(options, sparse, trainer, tmp_path):
    """With a schedule, clipping, dropout, and two micro-batches a step where the form sums them."""
    given = WAYS | {"gradient_accumulation_steps": 1 if "select_in" in options else 2, "max_steps": 3}
    whole = trainer(sparse(options), **given)
    whole.train()
    resumed = trainer(sparse(options), **given)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_same_run(whole, resumed)
    assert whole.state.log_history[0]["learning_rate"] != whole.state.log_history[2]["learning_rate"]


def test_a_run_that_was_stopped_early_goes_on_by_itself(sparse, trainer, callback):
    """In bfloat16 under autocast, with gradient checkpointing; ``resume_from_checkpoint=True`` finds the place."""

    def stop(args, state, control, **_):
        control.should_training_stop = state.global_step == 3

    given = WAYS | {"bf16": True, "activation_checkpointing": True}
    whole = trainer(sparse(OPTIONS[0]), "whole", **given)
    whole.train()
    stopped = trainer(sparse(OPTIONS[0]), "other", [callback(on_step_end=stop)], **given)
    stopped.train()
    assert stopped.state.global_step == 3
    resumed = trainer(sparse(OPTIONS[0]), "other", **given)
    resumed.train(resume_from_checkpoint=True)
    assert_same_run(whole, resumed)


@pytest.mark.parametrize("options", [OPTIONS[2], OPTIONS[4]], ids=lambda o: o["form"])
def test_the_best_model_is_loaded_at_the_end(options, sparse, trainer):
    """The rate is such that the last one is not the best."""
    best = {"load_best_model_at_end": True, "eval_strategy": "steps", "save_steps": 1, "eval_steps": 1}
    run = trainer(sparse(options), lr=1.0, metric_for_best_model="eval_loss", **best)
    run.train()
    losses = [entry["eval_loss"] for entry in run.state.log_history if "eval_loss" in entry]
    assert run.state.best_metric == min(losses) < losses[-1]
    state, saved = run.model.state_dict(), load_file(f"{run.state.best_model_checkpoint}/model.safetensors")
    assert all(torch.equal(state[name], tensor) for name, tensor in saved.items())
    assert run.evaluate()["eval_loss"] == pytest.approx(min(losses), abs=1e-6)


def test_evaluation_is_that_of_the_merged_model(sparse, trainer, rows):
    run = trainer(sparse(OPTIONS[2]), max_steps=2, save_strategy="no")
    run.train()
    found = run.predict(rows).predictions
    merge(run.model)
    torch.testing.assert_close(torch.tensor(run.predict(rows).predictions), torch.tensor(found), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "options", [OPTIONS[0], OPTIONS[1], OPTIONS[5] | {"keep": 1}], ids=["step", "backward", "keep"]
)
def test_the_trainers_norm_counts_whole_gradients_where_they_are_held(options, sparse, trainer, callback, rows):
    """Without ``select_in="backward"`` more than is kept. A callback clips what is kept, whatever the form."""
    model, norms = sparse(options).requires_grad_(False), []
    for layer in sparsegrad_layers(model).values():
        layer.trained.requires_grad_()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0

    def clip(args, state, control, model, **_):
        norms.append(clip_grad_norm_(model, 0.5).item())

    given = {"max_steps": 1, "save_strategy": "no", "lr": 0.0, "train_sampling_strategy": "sequential"}
    theirs = trainer(model, **given)
    theirs.train()
    trainer(model, "", [callback(on_pre_optimizer_step=clip)], max_grad_norm=0.0, **given).train()
    model.zero_grad()
    model(**{name: torch.tensor([row[name] for row in rows[:4]]) for name in rows[0]}).loss.backward()
    held = nn.utils.clip_grad_norm_(model.parameters(), torch.inf).item()
    kept = clip_grad_norm_(model, torch.inf).item()
    assert theirs.state.log_history[0]["grad_norm"] == pytest.approx(held, rel=1e-5)
    assert norms == [pytest.approx(kept, rel=1e-5)]
    assert held == pytest.approx(kept, rel=1e-5) if "select_in" in options else held > 1.05 * kept


def test_the_trainer_makes_the_optimizer_from_its_class(sparse, trainer):
    """The groups go in as ``params``; its own grouping would train the weights in full, and is refused."""
    one, other = sparse(OPTIONS[0]), sparse(OPTIONS[0])
    given = {"save_strategy": "no", "max_steps": 2}
    trainer(one, **given).train()
    trainer(other, kind=(SparseGradAdamW, {"params": param_groups(other), "lr": 1e-2}), **given).train()
    for p, q in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)
    with pytest.raises(ValueError, match=r"give the optimizer sparsegrad\.param_groups\(model\)"):
        trainer(other, kind=(SparseGradAdamW, {"lr": 1e-2}), **given).train()


def test_the_trainers_own_adamw_is_refused_before_its_first_step(sparse, trainer):
    model = sparse(OPTIONS[0])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"to a Trainer as optimizers="):
        trainer(model, optimizers=(None, None), save_strategy="no").train()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_accumulation_with_selection_in_the_backward_pass_is_refused(sparse, trainer):
    with pytest.raises(RuntimeError, match="use select_in='step' to accumulate gradients"):
        trainer(sparse(OPTIONS[1]), gradient_accumulation_steps=2, save_strategy="no").train()
