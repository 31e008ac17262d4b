"""Measuring speed and memory: never how fast, only that what is measured is what is said."""

import dataclasses
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml

from finetune.efficiency import cell, footprint, machine, task, timing, variant_memory, variants
from finetune.efficiency.__main__ import main
from finetune.efficiency.lengths import Lengths, make_batches, read_lengths, rows_of
from finetune.efficiency.stage import Stage
from finetune.efficiency.task import EfficiencyOptions, measure_task
from finetune.efficiency.variants import (
    VARIANTS,
    Build,
    make_method,
    make_model,
    make_trainee,
    random_bases,
    select_variants,
    train_step,
)
from finetune.methods import build_method
from finetune.methods.costs import RESIDENT, predicted_peaks
from finetune.store.records import config_hash, read_json

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[3]
SRC = ROOT / "src"
NAMES = [variant.name for variant in VARIANTS]
LENGTHS = Lengths("cola", "made up", (3, 5, 9, 12, 12, 7))


@pytest.fixture
def protocol(compose):
    return compose()["protocol"]


@pytest.fixture
def model(compose):
    """``model(hidden_size=...)``: the group of a tiny BERT."""

    def make(**changes):
        group = compose("model=tiny_bert")["model"]
        group["architecture"] |= {"vocab_size": 300} | changes
        return group

    return make


@pytest.fixture
def options():
    def make(**changes):
        values = {"batch_size": 4, "batches": 2, "rounds": 2, "warmup_steps": 1, "device": "cpu"}
        return EfficiencyOptions(**values | changes)

    return make


@pytest.fixture
def fast(monkeypatch):
    """Memory is not measured: what the profiler takes is most of a record's time."""
    parts = dict.fromkeys((*RESIDENT, "gradients", "saved_activations"), 8)
    found = {"components": parts, "peak_training": 100, "peak_evaluation": 90}
    monkeypatch.setattr(variant_memory, "measure_memory", lambda make, *_, **__: (found, make()))


@pytest.fixture
def measure(model, protocol, options, tmp_path):
    """``measure(variants=["full"], lengths=LENGTHS)``: the record of a tiny BERT."""

    def make(lengths=LENGTHS, **changes):
        stage = Stage(tmp_path / "cola.json", experiment="e", scale="smoke")
        return measure_task(model(), protocol, lengths, options(**changes), stage)

    return make


@pytest.fixture
def batches():
    """``batches(size=4, count=2)``: batches for a vocabulary of 300."""

    def make(size=4, count=2, vocabulary=300, lengths=LENGTHS):
        sizes = {"batch_size": size, "batches": count, "padding": "longest", "max_length": 64}
        return make_batches(lengths, **sizes, vocabulary=vocabulary, padding_id=0, num_labels=2, seed=0)[0]

    return make


@pytest.fixture
def maker(model, protocol):
    """``maker("lora", **architecture)``: what builds a variant."""

    def make(name, precision="fp32", **changes):
        group = model(**changes)
        (variant,) = select_variants([name])
        bases, build = random_bases(group, protocol, seed=0, device=CPU), how(precision)
        return partial(make_trainee, variant, group, protocol | size_for(name), bases, build)

    return make


def how(precision="fp32"):
    return Build(CPU, learning_rate=1e-3, precision=precision)


def size_for(name):
    """A core of all outputs needs more entries than one percent of the smallest model has."""
    return {"density": 0.1} if name == "truncated_input" else {}


# Lengths and batches


def test_a_lengths_file_is_read_back(tmp_path):
    path = tmp_path / "cola.json"
    path.write_text(json.dumps(LENGTHS.content()))
    found = read_lengths(path)
    assert sorted(found.values) == sorted(LENGTHS.values) and found.task == "cola" and found.source == "made up"
    assert found.facts()["sha256"] == LENGTHS.facts()["sha256"]
    assert LENGTHS.facts()["mean"] == 8 and LENGTHS.facts()["quantiles"]["1.0"] == 12


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ({"task": "x", "source": "s"}, "needed are task, source and counts"),
        ({"source": "s", "counts": {"3": 1}}, "needed are task"),
        ({"task": "x", "source": "s", "counts": {}}, "none"),
        ({"task": "x", "source": "s", "counts": {"0": 2}}, "at least 1"),
        ({"task": "../x", "source": "s", "counts": {"3": 2}}, "task='../x'; allowed: a name"),
        ({"task": "x", "source": "s", "counts": {"three": 2}}, "can't be read"),
    ],
)
def test_a_wrong_lengths_file_is_refused(content, text, tmp_path):
    path = tmp_path / "x.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=text):
        read_lengths(path)


@pytest.mark.parametrize(("padding", "width"), [("longest", 12), ("max_length", 16)])
def test_batches_have_the_lengths_and_the_padding(padding, width):
    sizes = {"batch_size": 6, "batches": 1, "vocabulary": 10, "padding_id": 3, "num_labels": 3, "seed": 1}
    (batch,), facts = make_batches(LENGTHS, **sizes, padding=padding, max_length=16)
    assert sorted(batch["attention_mask"].sum(1).tolist()) == sorted(LENGTHS.values)
    assert batch["input_ids"].shape == (6, width)
    assert torch.equal(batch["input_ids"] == 3, batch["attention_mask"] == 0)
    assert batch["input_ids"].max() < 10 and set(batch["labels"].tolist()) <= {0, 1, 2}
    assert facts["padded_share"] == pytest.approx(1 - 48 / (6 * width)) and facts["mean_slots"] == 6 * width


def test_long_inputs_are_cut_and_regression_has_float_targets():
    sizes = {"batch_size": 4, "batches": 2, "vocabulary": 10, "padding_id": 0, "num_labels": 1, "seed": 1}
    made, _ = make_batches(LENGTHS, **sizes, padding="longest", max_length=8)
    assert max(batch["input_ids"].shape[1] for batch in made) == 8 and made[0]["labels"].is_floating_point()


# Options and devices


@pytest.mark.parametrize("name", ["batch_size", "batches", "rounds", "warmup_steps"])
@pytest.mark.parametrize("value", [0, -1, True, 1.5])
def test_zero_steps_and_other_nonsense_are_refused(name, value, options):
    with pytest.raises(ValueError, match=f"{name}=.*at least 1"):
        options(**{name: value})


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"variants": ["adapter"]}, "allowed, each once: full, lora"),
        ({"variants": []}, "allowed, each once"),
        ({"variants": ["full", "full"]}, "each once"),
        ({"padding": "none"}, "padding='none'; allowed: longest"),
        ({"precision": "fp8"}, "precision='fp8'; allowed: fp32, bf16"),
        ({"keep": "never"}, "keep='never'; allowed: auto"),
    ],
)
def test_unknown_options_are_refused(changes, text, options):
    with pytest.raises(ValueError, match=text):
        options(**changes)


def test_cuda_without_a_device_is_refused(monkeypatch, measure):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="torch sees no CUDA device"):
        measure(device="cuda")
    assert machine.find_device("auto") == CPU


def test_a_shared_device_is_refused_and_a_busy_cpu_is_noted(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a card")
    assert machine.check_alone(torch.device("cuda"), {"other_bytes": 400e6}) == []
    with pytest.raises(ValueError, match="other processes hold 600 MB of a card"):
        machine.check_alone(torch.device("cuda"), {"other_bytes": 600e6})
    assert machine.check_alone(CPU, {"load_average": 0.0}) == []
    (warning,) = machine.check_alone(CPU, {"load_average": 99.0})
    assert "load average 99.0" in warning


def test_inputs_longer_than_the_model_takes_are_refused(measure):
    with pytest.raises(ValueError, match="inputs of 70 tokens; this model has 64 positions"):
        measure(Lengths("x", "s", (70,)))


# Memory


def test_components_of_full_and_lora_are_the_bytes_counted_by_hand(maker, batches):
    made = [footprint.measure_memory(maker(n), batches()[0], how(), warmup_steps=1) for n in ("full", "lora")]
    full, lora = (found["components"] for found, _ in made)
    h, inner, layers = 64, 256, 2
    embeddings = (300 + 64 + 2) * h + 2 * h
    block = 4 * (h * h + h) + 2 * h + (h * inner + inner) + (inner * h + h) + 2 * h
    total = embeddings + layers * block + (h * h + h) + (2 * h + 2)
    assert full["parameters"] == full["gradients"] == 4 * total
    assert full["optimizer_state"] == 8 * total and full["bases"] == 0
    adapters, frozen = layers * 2 * (h + inner), layers * 2 * h * inner  # rank 1
    assert lora["parameters"] == 4 * (total + adapters)
    assert lora["gradients"] == 4 * (total - frozen + adapters)
    assert lora["optimizer_state"] == 8 * (total - frozen + adapters)


@pytest.mark.parametrize(
    ("name", "precision"),
    [(name, "fp32") for name in NAMES] + [(n, "bf16") for n in ("full", "lora", "rotated_regular", "folded")],
)
def test_measured_peak_holds_the_resident_parts_and_is_predicted(name, precision, maker, batches):
    architecture = {"vocab_size": 500, "hidden_size": 128, "num_hidden_layers": 1, "intermediate_size": 512}
    make = maker(name, precision, **architecture)
    (batch,) = batches(4, 1, vocabulary=500, lengths=Lengths("x", "s", tuple(range(20, 60))))
    found, _ = footprint.measure_memory(make, batch, how(precision), warmup_steps=1)
    components = found["components"]
    resident = sum(components[part] for part in RESIDENT)
    assert found["peak_training"] > found["peak_evaluation"] > resident
    assert found["peak_training"] >= resident + components["gradients"]
    sizes = {"positions": batch["input_ids"].numel(), "width": 2 if precision == "bf16" else 4}
    method = make_method(select_variants([name])[0], *make.args[1:4])
    for peak, value in predicted_peaks(method, components, [(512, 128)], **sizes).items():
        assert value == pytest.approx(found[peak], rel=0.1), peak


RECORDS = sorted((ROOT / "results/local/efficiency").glob("*/*.json"))


@pytest.mark.skipif(not RECORDS, reason="results/local/efficiency is not there: make repro EXPERIMENT=local")
def test_predictions_are_those_of_the_committed_records():
    """Of the variants that select no entries: those that do have been rewritten since."""
    same, compared = ("full", "lora", "truncated", "truncated_input"), 0
    for record in map(read_json, RECORDS):
        model, protocol = (
            yaml.safe_load((ROOT / f"conf/{path}.yaml").read_text())
            for path in (f"model/{record['run']['model']}", f"protocol/{record['run']['protocol']}")
        )
        width = 2 if record["treatment"]["precision"] == "bf16" else 4
        for entry in (entry for entry in record["variants"] if entry["name"] in same):
            group = {"name": entry["method"]} | {key: entry[key] for key in ("form", "matmul", "core")}
            method = build_method(group, model, protocol, bases={}, one_backward_a_step=True)
            plain = make_model(record["model"], "meta")
            shapes = [tuple(target.module.weight.shape) for target in method.targets.find(plain)]
            memory = entry["memory"]
            how = {"positions": memory["batch"][0] * memory["batch"][1], "width": width}
            assert predicted_peaks(method, memory["components"], shapes, **how) == memory["predicted"], entry["name"]
            compared += 1
    assert compared >= 8


def test_peaks_in_a_trace_written_by_hand():
    def changed(time, size):
        return {"name": "[memory]", "ph": "i", "ts": time, "args": {"Bytes": size}}

    events = [
        {"name": "a", "ph": "X", "ts": 10.0, "dur": 10.0},
        {"name": "b", "ph": "X", "ts": 30.0, "dur": 10.0},
        *(changed(*pair) for pair in [(32, -20), (5, 100), (12, 50), (13, -50), (14, 20), (25, 500), (26, -500)]),
    ]
    assert footprint.peaks_in_trace(events, ("a", "b")) == {"a": 150, "b": 120}
    with pytest.raises(ValueError, match="no block 'c'"):
        footprint.peaks_in_trace(events, ("c",))


def test_on_cuda_the_peak_is_the_allocators_over_what_was_there_before(maker, batches, monkeypatch):
    """Without a card: the calls of torch.cuda are answered here."""
    answers, asked = {"memory_allocated": 70, "max_memory_allocated": 170, "memory_reserved": 200}, []
    for name in (*answers, "synchronize", "reset_peak_memory_stats", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda *_, name=name: asked.append(name) or answers.get(name))
    build = dataclasses.replace(how(), device=torch.device("cuda"))
    found, _ = footprint.measure_memory(maker("full"), batches()[0], build, warmup_steps=1)
    assert found["peak_training"] == found["peak_evaluation"] == 100 and found["reserved"] == 0
    measured = ["synchronize", "reset_peak_memory_stats", "synchronize", "max_memory_allocated"]
    before = ["empty_cache", "memory_allocated", "memory_reserved", "reset_peak_memory_stats"]
    assert asked == [*before, *measured, *measured, "memory_reserved", "empty_cache"]
    assert found["components"]["gradients"] == found["components"]["parameters"] > 0


def test_on_cuda_steps_are_timed_by_events(monkeypatch):
    asked, now = [], iter([1.0, 3.0, 4.0, 9.0])

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.time = next(now)

        def elapsed_time(self, end):
            return 1000 * (end.time - self.time)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: asked.append("synchronize"))
    calls = [lambda: asked.append("step")] * 2
    assert machine.seconds_of(calls, torch.device("cuda")) == [2.0, 5.0]
    assert asked == ["synchronize", "step", "step", "synchronize"]


# Times


def test_rounds_go_forwards_and_backwards():
    order = list(timing.interleaved(["a", "b", "c"], 3))
    assert order == [(0, "a"), (0, "b"), (0, "c"), (1, "c"), (1, "b"), (1, "a"), (2, "a"), (2, "b"), (2, "c")]


@pytest.mark.parametrize("together", [True, False])
def test_every_variant_trains_the_same_batches(together):
    built, trained = [], []

    def make(name):
        built.append(name)
        return name

    batches = [{"number": number} for number in range(3)]
    seconds = timing.time_variants(
        {name: partial(make, name) for name in ("a", "b")},
        batches,
        rounds=2,
        warmup_steps=2,
        device=CPU,
        together=together,
        step=lambda name, batch: trained.append((name, batch["number"])),
    )
    assert built == (["a", "b"] if together else ["a", "b", "b", "a"])
    again = [0] if together else [0, 1]
    turns = [("a", [0, 1]), ("b", [0, 1]), ("b", again), ("a", again)]
    assert trained == [(name, number) for name, warm in turns for number in (*warm, 0, 1, 2)]
    assert {name: [len(times) for times in rounds] for name, rounds in seconds.items()} == {"a": [3, 3], "b": [3, 3]}


def test_summaries_are_medians_and_ratios_are_paired():
    found = timing.summarise([[1.0, 2.0, 9.0], [4.0, 4.0, 4.0]])
    assert found["rounds"] == [0.5, 0.25] and found["steps_per_second"] == 0.375
    assert found["step_seconds"] == {"median": 4.0, "q25": 2.5, "q75": 4.0, "mean": 4.0, "min": 1.0, "n": 6}
    ratio = timing.ratio([[1.0, 2.0, 9.0]], [[2.0, 4.0, 9.0]])
    assert ratio == {"mean": 0.5, "rounds": [0.5]}
    assert timing.summarise([[2.0]])["step_seconds"]["q75"] == 2.0


@pytest.mark.parametrize("name", NAMES)
def test_a_step_moves_the_weights_as_training_does(name, maker, batches):
    """All variants start from the same function, and a step on one batch lowers its loss."""
    trainee, reference = maker(name)(), maker("full")()
    batch = batches(count=1)[0]
    for one in (trainee, reference):
        one.model.eval()
    with torch.no_grad():
        before = variants.mean_loss(trainee.model, batch, "fp32")
        torch.testing.assert_close(before, variants.mean_loss(reference.model, batch, "fp32"), rtol=1e-4, atol=1e-5)
    for _ in range(3):
        train_step(trainee, batch)
    with torch.no_grad():
        assert variants.mean_loss(trainee.model, batch, "fp32") < before
    assert all(parameter.grad is None for parameter in trainee.model.parameters())


# The record


def test_the_record_says_what_was_measured(measure):
    wanted = ["full", "rotated_sparse_by_dense", "folded"]
    record = measure(variants=wanted)
    json.dumps(record, allow_nan=False)
    assert record["run"] | {"config_hash": ""} == {
        "experiment": "e",
        "kind": "efficiency",
        "model": "tiny_bert",
        "task": "cola",
        "protocol": "sound",
        "scale": "smoke",
        "config_hash": "",
    }
    assert record["schema"] == 1 and record["status"] == "finished"
    assert record["treatment"]["batch_size"] == 4 and "random orthogonal" in record["treatment"]["bases"]
    assert record["treatment"]["kept"] == "all variants in memory"
    assert record["device"]["type"] == "cpu" and record["device"]["threads"] == torch.get_num_threads()
    assert 0 < record["lengths"]["padded_share"] < 1 and record["lengths"]["source"] == "made up"
    widths = [batch["tokens"] for batch in record["lengths"]["batches"]]
    assert widths == sorted(widths, reverse=True) and len(widths) == 2
    assert [entry["name"] for entry in record["variants"]] == wanted
    for entry in record["variants"]:
        assert entry["status"] == "finished" and entry["step_seconds"]["n"] == 4 and len(entry["rounds"]) == 2
        assert entry["memory"]["batch"] == [4, widths[0]]
        assert set(entry["memory"]["predicted_over_measured"]) == {"peak_training", "peak_evaluation"}
        assert entry["parameters"]["trainable"] > 0
    full = record["variants"][0]
    assert full["ratio_to_full"] == {"mean": 1.0, "rounds": [1.0, 1.0]}
    assert record["variants"][1]["matmul"] == "sparse_by_dense"


def test_a_core_of_all_outputs_that_the_budget_cannot_pay_is_skipped_with_a_reason(measure, fast):
    full, skipped = measure(variants=["truncated_input", "full"])["variants"]
    assert skipped["status"] == "skipped" and "needs as many entries at least" in skipped["reason"]
    assert "rounds" not in skipped and "memory" not in skipped and full["reason"] is None


def test_a_variant_that_does_not_fit_is_said_and_the_others_go_on(monkeypatch, measure, fast):
    real, calls = variant_memory.measure_memory, iter([torch.OutOfMemoryError("tried to allocate 1 TB\nmore")])

    def first_does_not_fit(*arguments, **keywords):
        for error in calls:
            raise error
        return real(*arguments, **keywords)

    monkeypatch.setattr(variant_memory, "measure_memory", first_does_not_fit)
    full, lora = measure(variants=["full", "lora"])["variants"]
    assert (full["status"], lora["status"]) == ("failed", "finished") and "ratio_to_full" not in lora
    assert full["reason"] == "out of memory: tried to allocate 1 TB"


@pytest.mark.parametrize(
    ("keep", "free", "kept"),
    [
        ("auto", 1e12, "all variants in memory"),
        ("auto", 1, "each variant built anew in every round"),
        ("each_round", 1e12, "each variant built anew in every round"),
    ],
)
def test_variants_stay_in_memory_if_they_fit(keep, free, kept, monkeypatch, measure, fast):
    monkeypatch.setattr(machine, "free_memory", lambda device: free)
    record = measure(variants=["full"], keep=keep)
    assert record["treatment"]["kept"] == kept


def test_a_record_is_found_again_by_what_decides_its_numbers(model, protocol, options, measure, fast, monkeypatch):
    def content(group=None, lengths=LENGTHS, **changes):
        return json.dumps(task.identity(group or model(), protocol, lengths, options(**changes)))

    others = [
        content(batch_size=5),
        content(variants=["full"]),
        content(model(hidden_size=32)),
        content(lengths=Lengths("cola", "made up", (4, 4))),
        content(precision="bf16"),
    ]
    assert content() == content(model() | {"title": "another"}) and len({content(), *others}) == 6
    record = measure(variants=["full"])
    monkeypatch.setattr(task, "_measure", None)
    assert measure(variants=["full"]) == record


@pytest.mark.skipif(not RECORDS, reason="results/local/efficiency is not there: make repro EXPERIMENT=local")
@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.stem)
def test_committed_records_are_found_again(path, compose):
    """On their machine, with their torch: by the hash of today's configuration."""
    record = read_json(path)
    run, device, torch_version = record["run"], record["device"], record["provenance"]["packages"]["torch"]
    names = {"model": run["model"], "protocol": run["protocol"], "scale": f"efficiency/{run['scale']}"}
    config = compose(*(f"{key}={value}" for key, value in names.items()), config_name="efficiency")

    class Known(Lengths):
        def facts(self):
            return record["lengths"]

    kept = {name: record["treatment"][name] for name in ("num_labels", "device", "learning_rate")}
    made = dataclasses.replace(cell._options(config, kept["num_labels"]), device=kept["device"])
    content = task.identity(config["model"], config["protocol"], Known(run["task"], "", (1,)), made)
    own = {"version": record["version"], "device": [device["type"], device["name"]], "torch": torch_version}
    assert config_hash(own | content) == run["config_hash"]


# Graphs and decoders


class Captures:
    """Passes whose graphs are there from the second pass of a token length on."""

    def __init__(self):
        self.seen, self.captured = [], 0

    def backward(self, batch):
        self.captured += self.seen.count(batch) >= 1
        self.seen.append(batch)

    def step(self):
        pass


@pytest.mark.parametrize(("works", "steps"), [(True, 6), (False, 3)])
def test_warm_up_goes_on_until_all_passes_come_from_graphs(works, steps):
    passes = Captures()
    trainee = variants.Trainee(None, None, passes)
    passes.seen += ["a"]
    if not works:
        passes.seen = Never()
    variants.settle(trainee, ["a", "b", "c"])
    assert len(passes.seen) - works == steps


class Never(list):
    def count(self, batch):
        return 0


def test_what_came_later_than_committed_records_is_in_the_identity_where_it_is_asked_for(options):
    assert "graphs" not in options().content() and options(graphs="auto").content()["graphs"] == "auto"
    assert options(checkpointing=True).content()["checkpointing"] is True
    backward, rotated = select_variants(["folded_tf32", "folded_backward"])
    assert backward.content()["select_in"] == "backward" and "rotation" not in backward.content()
    assert rotated.content()["rotation"] == "tf32" and "select_in" not in rotated.content()
    assert [variant.name for variant in select_variants(None)] == NAMES


@pytest.fixture
def decoder(compose):
    group = compose("model=tiny_llama", config_name="chat")["model"]
    group["architecture"] |= {"vocab_size": 300}
    return group | {"k": 400}, compose("protocol=llama/sound", config_name="chat")["protocol"]


@pytest.mark.parametrize("name", ["full", "lora", "folded", "truncated_input"])
def test_a_decoder_stores_what_it_trains_in_float32_and_the_rest_in_bfloat16(name, decoder):
    bases, (variant,) = random_bases(*decoder, seed=0, device=CPU), select_variants([name])
    trainee = make_trainee(variant, *decoder, bases, dataclasses.replace(how("bf16"), checkpointing=True))
    for parameter in trainee.model.parameters():
        assert parameter.dtype == (torch.float32 if parameter.requires_grad else torch.bfloat16)
    ids = torch.randint(300, (2, 8), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    before = variants.mean_loss(trainee.model, batch, "bf16").detach()
    for _ in range(3):
        train_step(trainee, batch)
    assert variants.mean_loss(trainee.model, batch, "bf16").detach() < before


def test_a_decoder_is_drawn_in_its_own_precision(decoder):
    plain = make_model(decoder[0], "meta", dtype=torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in plain.parameters()} == {("meta", torch.bfloat16)}


def test_a_decoders_record_has_no_predicted_peak(decoder, options, tmp_path, fast):
    made = options(variants=["full"], batch_size=2, batches=1, precision="bf16", checkpointing=True, max_length=8)
    record = measure_task(*decoder, rows_of(2, 8), made, Stage(tmp_path / "rows2.json"))
    (full,) = record["variants"]
    assert full["memory"]["batch"] == [2, 8] and "predicted" not in full["memory"] and full["steps_per_second"] > 0
    assert record["run"]["task"] == "rows2" and record["treatment"]["checkpointing"]


# The command line


@pytest.fixture
def files(tmp_path, model, protocol):
    places = {name: tmp_path / name for name in ("model.yaml", "protocol.yaml", "cola.json")}
    places["model.yaml"].write_text(yaml.safe_dump(model()))
    places["protocol.yaml"].write_text(yaml.safe_dump(protocol))
    places["cola.json"].write_text(json.dumps(LENGTHS.content()))
    sizes = ["--batch-size", "4", "--batches", "1", "--rounds", "1", "--warmup", "1", "--device", "cpu"]
    named = ["--model", places["model.yaml"], "--protocol", places["protocol.yaml"], "--lengths", places["cola.json"]]
    return [str(part) for part in (*named, "--output", tmp_path / "out", *sizes)]


def test_the_command_line_needs_four_packages_alone(files, tmp_path):
    """In a fresh interpreter where every other package of the project can't be imported."""
    blocked = ("hydra", "omegaconf", "datasets", "optuna", "pyarrow", "sklearn", "scipy", "wandb", "dvc", "pandas")
    blocked += ("pydantic", "tensorly", "fastchat", "hypothesis")
    code = (
        "import runpy, sys\n"
        "class Blocking:\n"
        "    def __init__(self, finder): self.finder = finder\n"
        "    def __getattr__(self, name): return getattr(self.finder, name)\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        blocked = name.partition('.')[0] in {blocked}\n"
        "        return None if blocked else self.finder.find_spec(name, path, target)\n"
        "sys.meta_path[:] = [Blocking(finder) for finder in sys.meta_path]\n"
        "import finetune.efficiency.card\n"
        "sys.argv = ['efficiency', *sys.argv[1:]]\n"
        "runpy.run_module('finetune.efficiency', run_name='__main__')\n"
    )
    environment = os.environ | {"PYTHONPATH": str(SRC), "HF_HUB_OFFLINE": "1"}
    arguments = [*files, "--variants", "full", "lora", "folded"]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "out" / "cola.json").read_text())
    assert [entry["status"] for entry in record["variants"]] == ["finished"] * 3
    assert "steps/s" in done.stderr and done.stdout == ""


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--variants", "nope"], "allowed, each once"),
        (["--rounds", "0"], "rounds=0"),
        (["--threads", "0"], "threads=0; it must be a whole number, at least 1"),
        (["--seed", "-1"], "seed=-1; it must be a whole number, at least 0"),
        (["--model", "/no/such.yaml"], "there is no /no/such.yaml"),
        (["--lengths", "/no/such.json"], "/no/such.json does not exist"),
    ],
)
def test_wrong_arguments_end_with_one_line(arguments, text, files):
    with pytest.raises(SystemExit, match=text) as exit:
        main([*files, *arguments])
    assert str(exit.value).startswith("error: ") and "\n" not in str(exit.value)
