"""The training loop against plain torch, cut in any way, and where it ends."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from finetune.training.evaluation import evaluate
from finetune.training.loop import NonFiniteLoss, Progress, median_step_seconds
from finetune.training.losses import summed_loss
from finetune.training.options import learning_rate_factor, planned_steps
from sparsegrad import CompactGradient, sparsegrad_layers

CPU = torch.device("cpu")


def weights(model):
    """Without keys' biases: they cancel in the softmax, their gradient is rounding noise, which Adam blows up."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if not name.endswith("key.bias")}


def assert_equal_weights(found, expected, atol):
    assert found.keys() == expected.keys()
    for name, weight in found.items():
        torch.testing.assert_close(
            weight, expected[name], rtol=0, atol=atol, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.fixture
def fit(classifier, build, run_training):
    """``fit("lora", one_backward=True, ...)``: prepare and train; gives weights and progress. No dropout."""

    def make(name, one_backward=False, overrides=(), **changes):
        method = build(name, *overrides, one_backward=one_backward)
        model = method.prepare(classifier(dropout=False))
        options = {"learning_rate": 1e-3} | changes
        optimizer = method.optimizer(model, options["learning_rate"], options.get("weight_decay", 0.0))
        progress = run_training(model, optimizer, **options)
        return weights(model), progress

    return make


@pytest.fixture
def adamw(classifier, run_training):
    """``adamw(scores, ...)``: plain AdamW with an evaluation that gives these scores in turn; gives the progress."""

    def make(scores, **changes):
        left, model = list(scores), classifier()

        def evaluation(_):
            return {"loss": 0.5, "matthews_correlation": left.pop(0)}

        return run_training(model, torch.optim.AdamW(model.parameters()), evaluation=evaluation, **changes)

    return make


# What is learnt


def test_loss_goes_down_and_the_score_up(method_name, classifier, build, run_training, load):
    method = build(method_name, one_backward=True)
    model = method.prepare(classifier())
    facts, splits = load("cola")
    progress = run_training(
        model,
        method.optimizer(model, 2e-3, 0.0),
        evaluation=lambda m: evaluate(m, splits["train"], facts, 16, CPU),
        max_steps=60,
        evaluation_steps=15,
        learning_rate=2e-3,
    )
    losses = [evaluation["loss"] for evaluation in progress.evaluations]
    assert losses[-1] < 0.6 * losses[0] and progress.score > 0.8


@pytest.mark.parametrize(("task", "criterion"), [("cola", F.cross_entropy), ("stsb", F.mse_loss)])
@pytest.mark.parametrize("clip", [None, 0.01])
def test_full_fine_tuning_is_the_plain_loop(task, criterion, clip, classifier, build, run_training, spy):
    labels, steps = 1 if task == "stsb" else 2, 12 if clip is None else 5
    model, reference, split = classifier(labels, dropout=False), classifier(labels, dropout=False).train(), spy(task)
    optimizers = []
    for one in (build("full").prepare(model), reference):
        adamw = torch.optim.AdamW(one.parameters(), lr=1e-3, weight_decay=0.01)
        optimizers.append(adamw if clip is None else torch.optim.SGD(one.parameters(), lr=0.1))
    changes = {"max_steps": steps, "evaluation_steps": 100, "max_grad_norm": clip}
    run_training(model, optimizers[0], task=task, split=split, learning_rate=1e-3 if clip is None else 0.1, **changes)
    assert len(split.rows) == steps and {len(rows) for rows in split.rows} == {8}
    for rows in split.rows:
        batch = split.split.batch(rows)
        expected = batch.pop("labels")
        logits = reference(**batch).logits
        optimizers[1].zero_grad()
        criterion(logits.squeeze(-1) if task == "stsb" else logits, expected).backward()
        if clip is not None:
            assert torch.nn.utils.clip_grad_norm_(reference.parameters(), clip) > clip
        optimizers[1].step()
    assert_equal_weights(weights(model), weights(reference), atol=1e-6)


def test_the_optimizer_of_full_fine_tuning_is_adamw(classifier, build):
    optimizer = build("full").optimizer(classifier(), 1e-3, 0.01)
    assert type(optimizer) is torch.optim.AdamW and optimizer.defaults["weight_decay"] == 0.01


def test_summed_loss_is_the_sum():
    logits, labels = torch.randn(5, 3), torch.tensor([0, 1, 2, 1, 0])
    torch.testing.assert_close(summed_loss(logits, labels), 5 * F.cross_entropy(logits, labels))
    values, targets = torch.randn(5, 1), torch.randn(5)
    torch.testing.assert_close(summed_loss(values, targets), ((values[:, 0] - targets) ** 2).sum())


# Which rows


def test_every_epoch_holds_every_row_once_in_an_order_of_its_own(classifier, run_training, spy):
    found = []
    for seed in (1, 1, 2):
        model, split = classifier(), spy()
        optimizer = torch.optim.AdamW(model.parameters())
        run_training(model, optimizer, split=split, seed=seed, batch_size=12, max_steps=8, evaluation_steps=100)
        found.append(split.rows)
    first, again, other = found
    assert [len(rows) for rows in first] == [12, 12, 12, 4] * 2
    epochs = [[*itertools.chain(*first[:4])], [*itertools.chain(*first[4:])]]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(40)) and epochs[0] != epochs[1]
    assert first == again != other


@pytest.mark.parametrize(("epochs", "max_steps", "expected"), [(2, None, 8), (2, 100, 8), (100, 7, 7), (1, 1, 1)])
def test_epochs_and_max_steps_end_the_run(epochs, max_steps, expected, fit, options):
    changes = {"epochs": epochs, "max_steps": max_steps, "batch_size": 12}
    assert planned_steps(40, options(**changes)) == expected
    _, progress = fit("full", evaluation_steps=3, **changes)
    assert progress.step == expected and progress.stopped == "all steps done"
    assert progress.evaluations[-1]["step"] == expected


# How a batch is cut


@pytest.mark.parametrize(
    ("name", "form", "accumulation", "changes"),
    [(name, None, 4, {"batch_size": 12}) for name in ("full", "lora", "meprop", "sparsegrad")]
    + [("sparsegrad", form, 4, {"max_grad_norm": 0.5}) for form in ("folded", "rotated", "truncated")]
    + [("full", None, size, {"batch_size": 10}) for size in (3, 8, 50)],  # unequal micro-batches, and single rows
)
def test_accumulation_does_not_change_the_steps(name, form, accumulation, changes, fit):
    changes |= {"max_steps": 6, "overrides": (f"method.form={form}",) if form else ()}
    whole, before = fit(name, one_backward=True, **changes)
    cut, after = fit(name, accumulation_steps=accumulation, **changes)
    assert_equal_weights(cut, whole, atol=1e-5 if form else 1e-6)
    losses = [[evaluation["loss"] for evaluation in progress.evaluations] for progress in (before, after)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)


def test_padding_does_not_change_the_steps(method_name, classifier, build, run_training, load):
    found = []
    for padding in ("longest", "max_length"):
        method = build(method_name)
        model = method.prepare(classifier(dropout=False))
        split = load("cola", padding=padding)[1]["train"]
        run_training(model, method.optimizer(model, 1e-3, 0.0), split=split, max_steps=6, accumulation_steps=2)
        found.append(weights(model))
    assert_equal_weights(*found, atol=1e-6)


# Learning rate and clipping


def test_constant_linear_and_cosine_factors():
    def shape(schedule, warmup=0, total=8):
        return [learning_rate_factor(schedule, step, warmup, total) for step in range(total)]

    assert shape("constant") == [1.0] * 8
    assert shape("constant", warmup=4) == [0.25, 0.5, 0.75] + [1.0] * 5
    assert shape("linear") == pytest.approx([1 - step / 8 for step in range(8)])
    assert shape("linear", warmup=4) == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0, 0.75, 0.5, 0.25])
    assert shape("cosine") == pytest.approx([(1 + math.cos(math.pi * step / 8)) / 2 for step in range(8)])
    assert shape("cosine", warmup=4)[4:] == pytest.approx([(1 + math.cos(math.pi * s / 4)) / 2 for s in range(4)])
    for schedule, warmup in itertools.product(("constant", "linear", "cosine"), (8, 20)):  # the whole run, and more
        assert all(0 < factor <= 1 for factor in shape(schedule, warmup))


@pytest.mark.parametrize("method_name", ["full", "sparsegrad"])
def test_every_group_follows_the_schedule(method_name, classifier, build, run_training):
    method = build(method_name)
    model = method.prepare(classifier())
    optimizer, seen = method.optimizer(model, 1e-3, 0.0), []
    optimizer.register_step_pre_hook(lambda o, *_: seen.append([group["lr"] for group in o.param_groups]))
    run_training(model, optimizer, schedule="linear", warmup_steps=2, max_steps=6, evaluation_steps=100)
    expected = [1e-3 * factor for factor in (0.5, 1.0, 1.0, 0.75, 0.5, 0.25)]
    assert len(seen[0]) == (2 if method_name == "sparsegrad" else 1)
    for lr, found in zip(expected, seen, strict=True):
        assert found == pytest.approx([lr] * len(found))


def test_clipping_limits_what_sparsegrad_steps_with(classifier, build, run_training):
    method = build("sparsegrad", one_backward=True)
    model = method.prepare(classifier())
    optimizer, norms = method.optimizer(model, 1e-3, 0.0), []

    def note(*_):
        kept = [layer.weight.grad.entries for layer in sparsegrad_layers(model).values()]
        dense = [p.grad.flatten() for p in model.parameters() if not isinstance(p.grad, CompactGradient | None)]
        norms.append(float(torch.cat([*kept, *dense]).norm()))

    optimizer.register_step_pre_hook(note)
    run_training(model, optimizer, max_steps=3, evaluation_steps=100, max_grad_norm=0.05)
    assert norms == pytest.approx([0.05] * 3, rel=1e-3)


# Where a run ends, and with which weights


@pytest.mark.parametrize(
    ("scores", "patience", "every", "expected"),
    [
        ((0.1, 0.3, 0.2, 0.3, 0.25, 0.9), 3, 2, (10, 4, 0.3, "no improvement in 3 evaluations")),
        ((0.1, 0.0, 0.2, 0.0, 0.3, 0.0), 2, 1, (6, 5, 0.3, "all steps done")),  # an improvement renews it
        (range(10, 0, -1), None, 1, (10, 1, 10, "all steps done")),
    ],
)
def test_patience_counts_evaluations_without_improvement(scores, patience, every, expected, adamw):
    steps = 60 if every == 2 else len(scores)
    progress = adamw(scores, patience=patience, max_steps=steps, evaluation_steps=every)
    assert (progress.step, progress.best_step, progress.score, progress.stopped) == expected
    assert [e["step"] for e in progress.evaluations] == list(range(every, expected[0] + 1, every))


def test_best_weights_are_left_in_the_model(method_name, classifier, build, run_training):
    method, seen = build(method_name), []
    model = method.prepare(classifier())

    def evaluation(m):
        seen.append(weights(m))
        return {"loss": 0.5, "matthews_correlation": {1: 0.9}.get(len(seen), 0.1)}

    optimizer = method.optimizer(model, 1e-2, 0.0)
    progress = run_training(model, optimizer, evaluation=evaluation, max_steps=9, evaluation_steps=3)
    assert progress.best_step == 3
    assert_equal_weights(weights(model), seen[0], atol=0)
    assert any(not torch.equal(seen[0][name], seen[-1][name]) for name in seen[0])


def test_score_is_that_of_the_weights_left(method_name, classifier, build, run_training, load):
    method = build(method_name)
    model = method.prepare(classifier())
    facts, splits = load("cola")
    progress = run_training(model, method.optimizer(model, 5e-3, 0.0), max_steps=30, evaluation_steps=5)
    assert progress.score == max(e[facts.metric] for e in progress.evaluations)
    for found in (model, method.merge(model)):
        assert evaluate(found, splits["validation"], facts, 16, CPU)[facts.metric] == progress.score


def test_callback_sees_every_evaluation_and_may_end_the_run(adamw):
    seen = []

    def on_evaluation(step, score):
        seen.append((step, score))
        if step == 4:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        adamw([0.1, 0.2, 0.3], evaluation_steps=2, on_evaluation=on_evaluation)
    assert seen == [(2, 0.1), (4, 0.2)]


@pytest.mark.parametrize("training", [True, False])
def test_evaluation_leaves_the_mode_and_the_random_generator(training, classifier, load):
    facts, splits = load("cola")
    model, state = classifier().train(training), torch.get_rng_state()
    evaluate(model, splits["validation"], facts, 16, CPU)
    assert model.training is training and torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("batch_size", [1, 7, 24, 100])
@pytest.mark.parametrize("task", ["cola", "stsb"])
def test_evaluation_does_not_depend_on_its_batches(task, batch_size, classifier, load):
    facts, splits = load(task)
    split, model = splits["validation"], classifier(facts.num_labels)
    batch = split.batch(range(24))
    labels = batch.pop("labels")
    with torch.no_grad():
        logits = model(**batch).logits
    found = evaluate(model, split, facts, batch_size, CPU)
    assert found["loss"] == pytest.approx(float(summed_loss(logits, labels)) / 24, abs=1e-6)
    if task == "stsb":
        expected = torch.corrcoef(torch.stack([logits[:, 0], labels]))[0, 1]
        assert found["pearson"] == pytest.approx(float(expected), abs=1e-3)  # almost constant predictions


@pytest.mark.parametrize(
    ("task", "names"), [("mrpc", {"loss", "accuracy", "f1"}), ("cola", {"loss", "matthews_correlation"})]
)
def test_f1_stands_beside_accuracy_of_two_classes(task, names, classifier, load):
    facts, splits = load(task)
    assert set(evaluate(classifier(), splits["validation"], facts, 16, CPU).values) == names


# What does not converge


@pytest.mark.parametrize("one_backward", [True, False])
def test_diverging_run_is_a_non_finite_loss(method_name, one_backward, fit):
    with pytest.raises(NonFiniteLoss, match=r"at step \d+; lower learning_rate=1e\+30 or check the data\."):
        fit(method_name, one_backward=one_backward, learning_rate=1e30, max_steps=30, evaluation_steps=30)


def test_loss_that_is_not_finite_says_the_step(classifier, run_training):
    model = classifier()
    with torch.no_grad():
        model.classifier.bias.fill_(float("nan"))
    with pytest.raises(NonFiniteLoss, match=r"loss is nan at step 3; lower learning_rate=0.001 or check the data\."):
        run_training(model, torch.optim.AdamW(model.parameters()), evaluation_steps=3)


@pytest.mark.parametrize("task", ["cola", "stsb"])
def test_weights_that_the_last_step_destroys_are_a_non_finite_loss(task, classifier, build, run_training):
    model, method = classifier(1 if task == "stsb" else 2), build("full")
    optimizer = method.optimizer(method.prepare(model), 1e38, 0.0)
    with pytest.raises(NonFiniteLoss, match="at step 1; lower learning_rate=3e"):
        run_training(model, optimizer, task=task, learning_rate=3e38, max_steps=1, evaluation_steps=1)


# Options


def test_step_time_leaves_out_the_first_five():
    assert median_step_seconds(Progress(step_seconds=[9.0] * 5 + [1.0, 2.0, 3.0])) == 2.0
    assert median_step_seconds(Progress(step_seconds=[4.0, 2.0])) == 3.0
    assert median_step_seconds(Progress()) is None
