"""Evaluation on halves, predictions in progress, and logits in chunks, against whole tensors and sklearn."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

from finetune.data.oasst import PackedSplit
from finetune.store.arrays import unpack_array
from finetune.training.evaluation import evaluate, evaluate_causal, report_half
from finetune.training.losses import causal_outputs, row_losses, summed_loss

CPU = torch.device("cpu")


def test_half_the_rows_report_and_they_are_the_same_each_time():
    for rows in (2, 7, 277, 1043):
        half = report_half(rows)
        assert half.sum() == rows // 2 and (half == report_half(rows)).all()
    assert not np.array_equal(report_half(100), np.arange(100) < 50)


@pytest.mark.parametrize("task", ["cola", "mrpc"])
def test_halves_are_measured_as_splits_of_their_own(task, classifier, load):
    facts, splits = load(task)
    split, model = splits["validation"], classifier()
    half = report_half(len(split))
    whole, found = (evaluate(model, split, facts, 7, CPU, report=report) for report in (None, half))
    assert np.array_equal(whole.predictions, found.predictions)
    labels, predicted = split.labels.numpy(), whole.predictions
    for prefix, rows in (("", ~half), ("report_", half)):
        if task == "cola":
            expected = {"matthews_correlation": matthews_corrcoef(labels[rows], predicted[rows])}
        else:
            expected = {"accuracy": accuracy_score(labels[rows], predicted[rows])}
            expected["f1"] = f1_score(labels[rows], predicted[rows], zero_division=0.0)
        for name, value in expected.items():
            assert found[prefix + name] == pytest.approx(value, abs=1e-12)
    mean = (found["loss"] * (~half).sum() + found["report_loss"] * half.sum()) / len(split)
    assert mean == pytest.approx(whole["loss"], abs=1e-12)


def test_progress_holds_the_predictions_of_the_best_and_of_the_last_evaluation(classifier, run_training, load):
    facts, splits = load("cola")
    model, seen = classifier(), []

    def evaluation(m):
        seen.append(evaluate(m, splits["validation"], facts, 16, CPU, report=report_half(24)))
        return seen[-1]

    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    progress = run_training(model, optimizer, evaluation=evaluation, max_steps=30, evaluation_steps=3)
    best = [entry["step"] for entry in progress.evaluations].index(progress.best_step)
    found = progress.predictions
    assert best < len(seen) - 1 and not np.array_equal(seen[best].predictions, seen[-1].predictions)
    assert np.array_equal(unpack_array(found["best"]), seen[best].predictions)
    assert np.array_equal(unpack_array(found["last"]), seen[-1].predictions)
    assert found["rows"] == 24 and np.array_equal(unpack_array(found["labels"]), splits["validation"].labels)
    assert np.array_equal(unpack_array(found["report"]), report_half(24))
    assert progress.score == seen[best]["matthews_correlation"]


@pytest.fixture
def causal():
    """A tiny causal model with an untied head, and rows with something to learn."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=50, **sizes)).double()
    ids = torch.randint(0, 50, (6, 9))
    labels = torch.where(torch.rand(6, 9) < 0.4, ids, -100)
    labels[:, 4] = ids[:, 4]
    return model, PackedSplit(ids, labels, "")


@pytest.mark.parametrize("chunk", [1, 5, 48, 1000])
def test_losses_and_gradients_in_chunks_are_those_of_all_logits(chunk, causal):
    model, split = causal
    batch = split.batch(range(6))
    labels = batch.pop("labels")
    expected = F.cross_entropy(
        model(**batch).logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="none"
    ).view(6, -1)
    gradients = {}
    for size in (None, chunk):
        model.zero_grad()
        losses = causal_outputs(model, model, batch, labels, size)
        torch.testing.assert_close(losses.double(), expected.sum(1), rtol=1e-5, atol=1e-6)
        losses.sum().backward()
        gradients[size] = {name: p.grad.clone() for name, p in model.named_parameters()}
    for name, gradient in gradients[None].items():
        torch.testing.assert_close(gradients[chunk][name], gradient, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(model(**batch).logits.shape, (6, 9, 50))  # the head is back in its place


def test_no_chunk_holds_more_logits_than_it_may(causal):
    model, split = causal
    seen = []
    model.lm_head.register_forward_hook(lambda module, inputs, output: seen.append(len(output)))
    head, batch = model.lm_head, split.batch(range(6))
    causal_outputs(model, model, batch, batch.pop("labels"), 10).sum().backward()
    assert head is model.lm_head and len(seen) > 5 and max(seen) <= 10


@pytest.mark.parametrize("chunk", [None, 7])
def test_halves_of_dialogues_are_means_over_their_own_tokens(chunk, causal):
    model, split = causal
    half = report_half(6)
    found = evaluate_causal(model, split, 4, CPU, report=half, chunk=chunk)
    batch = split.batch(range(6))
    labels = batch.pop("labels")
    with torch.no_grad():
        losses = row_losses(model(**batch).logits, labels).numpy()
        total = float(summed_loss(model(**batch).logits, labels))
    counts = (labels[:, 1:] != -100).sum(1).numpy()
    assert found["loss"] == pytest.approx(losses[~half].sum() / counts[~half].sum(), rel=1e-6)
    assert found["report_loss"] == pytest.approx(losses[half].sum() / counts[half].sum(), rel=1e-6)
    assert losses.sum() == pytest.approx(total, rel=1e-9)
    assert np.array_equal(unpack_array(found.packed_rows()["labels"]), counts)
    assert unpack_array(found.packed_predictions()) == pytest.approx(losses, rel=1e-6)


def test_a_model_that_changes_its_logits_is_refused_in_chunks(causal):
    model, split = causal
    model.config.final_logit_softcapping = 30.0
    batch = split.batch(range(2))
    with pytest.raises(ValueError, match=r"logits_chunk: config\.final_logit_softcapping .*set it to null"):
        causal_outputs(model, model, batch, batch.pop("labels"), 4)
