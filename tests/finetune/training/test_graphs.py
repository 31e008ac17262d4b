"""What is captured when, and what a replay does, with a stand-in for CUDA's recorder; on a device the real one.

Imports torch, transformers, peft and accelerate alone, so that a card without the rest can run it.
"""

import logging
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from finetune.training.capture import CUDARecorder, Graphs
from finetune.training.graphs import Passes
from finetune.training.padding import padded
from sparsegrad import Basis, NonFiniteGradient, SparseGradAdamW, param_groups, sparsify

PATTERNS = {
    "up": r"roberta\.encoder\.layer\.(?P<layer>\d+)\.intermediate\.dense",
    "down": r"roberta\.encoder\.layer\.(?P<layer>\d+)\.output\.dense",
}
EPS = 1e-4  # gradients that are zero but for rounding, as those of key biases, move nothing
KINDS = ("full", "lora", "folded", "truncated")


class StandIn:
    """Records nothing: a repeat runs the call again. Fails from the given recording on."""

    def __init__(self, fails_at=None):
        self.records, self.recovered, self.fails_at = 0, 0, fails_at

    def record(self, call):
        if self.records == self.fails_at:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")
        self.records += 1
        result = []

        def replay():
            result[:] = flat(call())

        return replay, Result(result)

    def recover(self):
        self.recovered += 1


class Result:
    """Stands for the tensors that a replay fills: one of them, or a tuple."""

    def __init__(self, values):
        self.values = values

    def clone(self):
        return self.values[0].clone()

    def __iter__(self):
        return iter(self.values)


def flat(result):
    return [] if result is None else list(result) if isinstance(result, tuple) else [result]


def encoder(kind, device="cpu", dropout=0.1, seed=0):
    """A tiny RoBERTa whose MLPs train as the kind says, and its optimizer."""
    import peft
    from transformers import RobertaConfig, RobertaForSequenceClassification

    torch.manual_seed(seed)
    config = RobertaConfig(
        vocab_size=40, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=34, pad_token_id=1, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout,
    )  # fmt: skip
    model = RobertaForSequenceClassification(config).to(device)
    if kind == "lora":
        targets = r".*(intermediate|(?<!attention\.)output)\.dense"
        model = peft.get_peft_model(model, peft.LoraConfig(r=3, target_modules=targets, lora_dropout=dropout))
    elif kind in ("folded", "truncated"):
        wide, narrow = (torch.linalg.qr(torch.randn(n, n)).Q.contiguous() for n in (64, 32))
        bases = {"up": Basis(narrow, wide), "down": Basis(wide.clone(), narrow.clone())}
        sparsify(model, bases, {"up": 100, "down": 100}, PATTERNS, form=kind)
    if kind in ("folded", "truncated"):
        optimizer = SparseGradAdamW(param_groups(model, 0.01), lr=1e-3, eps=EPS, fused=True)
    else:
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.01, eps=EPS, fused=True)
    return model.train(), optimizer


def batches(lengths, rows=4, seed=1):
    """Rows of the given lengths, all but the first a token shorter."""
    generator = torch.Generator().manual_seed(seed)
    for length in lengths:
        ids = torch.randint(2, 40, (rows, length), generator=generator)
        mask = torch.ones_like(ids)
        ids[1:, -1], mask[1:, -1] = 1, 0
        labels = torch.randint(0, 2, (rows,), generator=generator)
        yield {"input_ids": ids, "attention_mask": mask, "labels": labels}


class Split:
    """Rows of the given lengths, filled up batch by batch."""

    def __init__(self, lengths, rows):
        self.rows = list(batches(lengths, rows))

    def __len__(self):
        return len(self.rows)

    def targets(self, indices):
        return len(indices)

    def batch(self, indices):
        rows = [self.rows[index] for index in indices]
        longest = max(row["input_ids"].shape[1] for row in rows)
        model = SimpleNamespace(config=SimpleNamespace(pad_token_id=1, max_position_embeddings=longest, model_type=""))
        filled = [padded(row, model, longest) for row in rows]
        return {name: torch.cat([row[name] for row in filled]) for name in filled[0]}


def loss_of(model, precision=None):
    def loss(batch):
        inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
        device = batch["labels"].device.type
        with torch.autocast(device, precision, enabled=precision is not None):
            logits = model(**inputs).logits
        return nn.functional.cross_entropy(logits.float(), batch["labels"])

    return loss


def trained(kind, lengths, *, device="cpu", parts=1, rates=(1e-3, 5e-4), dropout=0.1, setup=None, **options):
    """Losses of steps on batches of these lengths, the weights after them, and the passes."""
    model, optimizer = encoder(kind, device, dropout)
    passes = Passes(model, loss_of(model, options.pop("precision", None)), optimizer, **options)
    torch.manual_seed(3)
    losses = []
    for number, batch in enumerate(batches(lengths)):
        for group in optimizer.param_groups:
            group["lr"] = rates[number % len(rates)]
        for part in range(parts):
            rows = slice(part, None, parts)
            losses.append(passes.backward({name: tensor[rows] for name, tensor in batch.items()}))
        passes.step()
        if setup is not None:
            setup(number, passes)
    weights = {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}
    return torch.stack([loss.cpu() for loss in losses]), weights, passes


def assert_same(found, expected, **tolerance):
    torch.testing.assert_close(found[0], expected[0], **tolerance)
    for name, tensor in expected[1].items():
        if name.endswith(".moved"):  # it holds a hash of the weight
            continue
        torch.testing.assert_close(found[1][name], tensor, **tolerance, msg=lambda text, name=name: f"{name}: {text}")


@pytest.fixture
def device():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return torch.device("cuda")


def test_a_batch_is_filled_up_to_a_multiple_or_to_all_that_the_model_takes():
    model = encoder("full")[0]  # takes 32 tokens
    (batch,) = batches([11])
    found = padded(batch | {"token_type_ids": torch.ones(4, 11, dtype=torch.int64)}, model, 8)
    assert {name: tuple(t.shape) for name, t in found.items()} == {
        "input_ids": (4, 16), "attention_mask": (4, 16), "token_type_ids": (4, 16), "labels": (4,),
    }  # fmt: skip
    assert (found["input_ids"][:, 11:] == 1).all() and not found["attention_mask"][:, 11:].any()
    assert torch.equal(found["input_ids"][:, :11], batch["input_ids"])
    assert padded(next(batches([30])), model, 24)["input_ids"].shape == (4, 32)
    causal = padded({"input_ids": batch["input_ids"], "labels": batch["input_ids"]}, model, 8)
    assert (causal["labels"][:, 11:] == -100).all()
    values = {"x": torch.ones(2, 3)}
    assert padded(values, nn.Identity(), 8)["x"] is values["x"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("parts", [1, 2])
def test_replayed_steps_are_those_of_eager_ones(kind, parts):
    lengths = [8, 11, 16, 5, 16, 7]
    eager = trained(kind, lengths, parts=parts, dropout=0.0)
    recorder = StandIn()
    found = trained(kind, lengths, parts=parts, dropout=0.0, recorder=recorder)
    assert found[2].captured == 6 * parts
    # Two lengths, the first and the other parts of a step apart; a step of dense parameters is static.
    assert recorder.records == 2 * parts + (kind != "folded")
    assert_same(found, eager, atol=1e-6, rtol=1e-5)


def test_dropout_does_not_tell_when_something_was_captured():
    lengths = [8, 16, 8, 16]
    found = trained("full", lengths, recorder=StandIn())
    again = trained("full", lengths, recorder=StandIn(), setup=lambda number, passes: passes.forget())
    assert_same(found, again, atol=0, rtol=0)


def test_off_and_a_cpu_are_plain_passes():
    model, optimizer = encoder("full")
    torch.manual_seed(3)
    losses = []
    for number, batch in enumerate(batches([5, 5, 6])):
        optimizer.param_groups[0]["lr"] = (1e-3, 5e-4)[number % 2]
        loss = loss_of(model)(batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    plain = torch.stack(losses), {name: t.clone() for name, t in model.state_dict().items()}
    for options in ({}, {"mode": "off"}, {"mode": "off", "recorder": StandIn()}):
        found = trained("full", [5, 5, 6], **options)
        assert_same(found, plain, atol=0, rtol=0)
        assert found[2].captured == 0


def test_the_least_recently_used_graph_is_dropped():
    recorder = StandIn()
    graphs = Graphs(torch.device("cpu"), keep=2, recorder=recorder)

    def run(n):
        return list(graphs.run((), {"x": torch.ones(n)}, lambda b: b["x"].sum(), warm_up=lambda b: None)[0])

    for n, records in ((1, 1), (2, 2), (1, 2), (3, 3), (1, 3), (2, 4)):
        assert run(n) == [n] and recorder.records == records


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("at", [0, 1])
def test_after_a_failed_capture_all_is_eager_with_one_warning(caplog, parts, at):
    eager = trained("full", [8, 16, 24], parts=parts, dropout=0.0)
    recorder = StandIn(fails_at=at)
    with caplog.at_level(logging.WARNING):
        found = trained("full", [8, 16, 24], parts=parts, dropout=0.0, recorder=recorder)
    assert_same(found, eager, atol=1e-6, rtol=1e-5)
    (record,) = caplog.records
    assert "RuntimeError: operation not permitted when stream is capturing" in record.getMessage()
    assert (found[2].captured, recorder.recovered) == (at, 1)


def test_gradients_that_are_selected_in_the_backward_pass_are_no_graphs(caplog):
    def run(**options):
        model, _ = encoder("full", dropout=0.0)
        sparsify(model, None, {"up": 100, "down": 100}, PATTERNS, select_in="backward")
        optimizer = SparseGradAdamW(param_groups(model), lr=1e-3, fused=True)
        passes = Passes(model, loss_of(model), optimizer, **options)
        losses = []
        for batch in batches([8, 8, 8]):
            losses.append(passes.backward(batch))
            passes.step()
        return torch.stack(losses), model.state_dict(), passes

    eager = run()
    found = run(recorder=StandIn())
    assert "selected in the backward pass" in caplog.text and found[2].captured == 0
    assert_same(found, eager, atol=1e-6, rtol=1e-5)


def test_a_schedule_is_followed_and_groups_keep_plain_numbers():
    model, optimizer = encoder("truncated", dropout=0.0)
    passes = Passes(model, loss_of(model), optimizer, recorder=StandIn())
    for batch in batches([8, 8, 8]):
        for group in optimizer.param_groups:
            group["lr"] = 1e-3
        passes.backward(batch)
        passes.step()
    assert [group["lr"] for group in optimizer.param_groups] == [1e-3] * 2
    before = {name: t.clone() for name, t in model.state_dict().items()}
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    passes.backward(batch)
    passes.step()
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_a_captured_step_refuses_what_is_not_finite():
    model, optimizer = encoder("truncated", dropout=0.0)
    scale = torch.ones(())
    passes = Passes(model, lambda batch: scale * loss_of(model)(batch), optimizer, recorder=StandIn())
    *first, last = batches([8, 8, 8])
    for batch in first:
        passes.backward(batch)
        passes.step()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    scale.fill_(float("nan"))
    passes.backward(last)
    with pytest.raises(NonFiniteGradient):
        passes.step()
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


@pytest.mark.parametrize("options", [{"mode": "on"}, {"keep": 1}])
def test_unknown_options_are_refused(options):
    model, optimizer = encoder("full")
    with pytest.raises(ValueError, match="allowed"):
        Passes(model, loss_of(model), optimizer, **options)


LENGTHS = [8, 11, 16, 5, 24, 7, 16, 8, 19, 8, 8, 11, 16, 5, 24, 7, 16, 8, 19, 8]


@pytest.mark.cuda
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("parts", [1, 2])
def test_on_cuda_losses_and_weights_are_those_of_eager_steps(device, kind, parts, caplog):
    eager = trained(kind, LENGTHS, device=device, parts=parts, dropout=0.0, mode="off")
    found = trained(kind, LENGTHS, device=device, parts=parts, dropout=0.0)
    assert found[2].captured == 20 * parts and not caplog.records
    # Folded chooses entries: one at the border may change places with another of the same size but for rounding.
    assert_same(found, eager, atol=2e-3 if kind == "folded" else 2e-4, rtol=1e-3)


@pytest.mark.cuda
@pytest.mark.parametrize("kind", ("full", "lora", "truncated"))
@pytest.mark.parametrize("precision", [None, torch.bfloat16])
def test_on_cuda_dropout_does_not_tell_when_something_was_captured(device, kind, precision):
    """Lengths that are multiples already, so that eager passes see the same batches."""
    lengths = [8, 16, 24, 16, 8, 8, 24, 16]
    options = {"device": device, "precision": precision}
    found = trained(kind, lengths, **options)
    assert found[2].captured == len(lengths)
    again = trained(kind, lengths, **options, setup=lambda number, passes: number % 3 == 1 and passes.forget())
    eager = trained(kind, lengths, **options, mode="off")
    assert_same(found, again, atol=0, rtol=0)
    assert_same(found, eager, atol=2e-3 if precision else 1e-5, rtol=1e-2 if precision else 1e-4)


@pytest.mark.cuda
def test_on_cuda_a_failed_capture_leaves_a_sound_device(device, caplog):
    def waits(number, passes):
        if number == 2:
            loss = passes._loss
            passes._loss = lambda batch: loss(batch) * (1.0 if float(batch["labels"].sum()) >= 0 else 2.0)

    lengths = [8, 8, 8, 16, 16, 8]
    eager = trained("full", lengths, device=device, mode="off")
    found = trained("full", lengths, device=device, setup=waits)  # the capture of 16 tokens fails
    assert found[2].captured == 3 and len(caplog.records) == 1
    assert_same(found, eager, atol=1e-5, rtol=1e-4)
    after = trained("full", lengths, device=device)  # and others can be captured after it
    assert after[2].captured == 6
    assert_same(after, eager, atol=1e-5, rtol=1e-4)
    torch.cuda.empty_cache()


@pytest.mark.cuda
def test_on_cuda_a_failed_capture_spoils_no_graphs_of_others(device):
    def waiting(model):
        return lambda batch: loss_of(model)(batch) * (1.0 if float(batch["labels"].sum()) >= 0 else 2.0)

    def run(mode):
        other, optimizer = encoder("full", device)
        fails = Passes(other, waiting(other), optimizer, mode)
        (batch,) = batches([8])
        found = trained("full", [8] * 6, device=device, setup=lambda number, _: number == 2 and fails.backward(batch))
        assert found[2].captured == 6 and not fails.captured
        return found

    assert_same(run("auto"), run("off"), atol=0, rtol=0)  # dropout goes on where it was


@pytest.mark.cuda
def test_on_cuda_a_run_that_goes_on_ends_as_one_that_was_not_stopped(device, tmp_path):
    from finetune.training import checkpoint

    lengths = [8, 16, 8, 24, 16, 8, 24, 8]

    def run(stop=None, go_on=False):
        model, optimizer = encoder("full", device)
        passes = Passes(model, loss_of(model), optimizer)
        torch.manual_seed(3)
        done = 0
        if go_on:
            progress, _, _ = checkpoint.load_checkpoint(tmp_path, "digest", model, optimizer)
            done = progress["step"]
        for number, batch in enumerate(batches(lengths)):
            if done <= number < (stop or len(lengths)):
                optimizer.param_groups[0]["lr"] = 1e-3 / (number + 1)
                passes.backward(batch)
                passes.step()
        if stop:
            checkpoint.save_checkpoint(tmp_path, stop, "digest", model, optimizer, {"step": stop}, None)
        # Which entries moved is in no checkpoint of a run: it writes no adapter.
        return {name: tensor.cpu() for name, tensor in model.state_dict().items() if not name.endswith(".moved")}

    whole = run()
    run(stop=5)
    for name, tensor in run(go_on=True).items():
        assert torch.equal(tensor, whole[name]), name


@pytest.mark.cuda
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_on_cuda_the_loop_trains_as_without_graphs(device, precision):
    """What the first step counts is counted eagerly; clipping and accumulation come between passes and step."""
    from finetune.training.evaluation import evaluate_causal
    from finetune.training.loop import Training, train
    from finetune.training.options import TrainingOptions
    from finetune.training.processes import make_accelerator

    def run(graphs):
        accelerator = make_accelerator("cuda", precision)
        model, optimizer = encoder("full", device, dropout=0.0)
        options = TrainingOptions(
            1e-3, 8, 1, 4, 7, accumulation_steps=2, max_grad_norm=0.5, schedule="linear", graphs=graphs
        )
        held = Graphs(device, graphs)
        split = Split([5, 11, 16] * 32, rows=1)
        training = Training(
            model, optimizer, split, lambda m: evaluate_causal(m, split, 4, device, held), "loss", options, accelerator
        )
        return train(training)

    off, auto = run("off"), run("auto")
    assert (off.captured, auto.captured) == (0, 11)  # of twelve steps the first is eager
    assert auto.memory["saved_activations"] == pytest.approx(off.memory["saved_activations"], rel=0.5)
    found, expected = ([e["loss"] for e in progress.evaluations] for progress in (auto, off))
    assert found == pytest.approx(expected, rel=2e-2 if precision == "bf16" else 1e-3)


@pytest.mark.cuda
def test_on_cuda_an_evaluation_is_that_of_eager_passes(device):
    from finetune.training.evaluation import evaluate_causal

    split = Split([5, 7, 16, 5, 16, 16], rows=1)
    model = encoder("full", device)[0]
    graphs = Graphs(device)
    for change in (0.0, 0.1):  # replays see the weights as they are
        with torch.no_grad():
            model.classifier.dense.weight.add_(change)
        eager = evaluate_causal(model, split, 2, device)["loss"]
        assert evaluate_causal(model, split, 2, device, graphs)["loss"] == pytest.approx(eager, rel=1e-4)
    assert model.training and isinstance(graphs._recorder, CUDARecorder) and graphs.active and len(graphs._held) == 2
