"""The plan of a whole experiment: operations, rates, memory and sizes against what is counted or done by hand."""

import json
import math
import re
import runpy
import shutil
import socket
from dataclasses import astuple, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from torch.utils.flop_counter import FlopCounterMode

from finetune.efficiency.variants import VARIANTS, Build, make_trainee, random_bases, train_step
from finetune.methods import build_method, with_own_choices
from finetune.plan.actual import taken
from finetune.plan.detectable import detectable_differences
from finetune.plan.estimate import plan_experiment
from finetune.plan.experiment import Experiment
from finetune.plan.flops import Cost, cost_of, hosvd_operations
from finetune.plan.inputs import chat_blocks, padded_tokens, stopping_epochs, task_rows
from finetune.plan.memory import meta_model
from finetune.plan.text import plan_text
from finetune.plan.throughput import Fact, Processor, Throughput, published_facts, recorded_facts
from finetune.plan.work import Decoding, Decomposition, Training
from finetune.published import released_scores
from finetune.store import records
from finetune.store.experiment import expand
from sparsegrad import core_shape

pytestmark = pytest.mark.usefixtures("believed")

ROOT = Path(__file__).resolve().parents[3]
TINY = {
    "model_type": "bert",
    "vocab_size": 100,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "max_position_embeddings": 64,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "attn_implementation": "eager",  # the counter does not see the fused one on a CPU
}


def read(group, name):
    path = ROOT / "conf" / group / f"{name}.yaml"
    if not path.is_file():
        raise FileNotFoundError(path)
    return yaml.safe_load(path.read_text())


MODEL = read("model", "tiny_bert") | {"architecture": TINY, "k": 41, "lora_rank": 2}
PROTOCOL = read("protocol", "sound")
SETTINGS = {name: value for name, value in read("", "plan").items() if name not in ("hydra", "data_root")}
CPU = torch.device("cpu")


def cost(name, protocol=PROTOCOL, **options):
    group = name if isinstance(name, dict) else read("method", name)
    protocol = with_own_choices({"method": group, "protocol": protocol})["protocol"]
    method = build_method(group, MODEL, protocol, bases={}, one_backward_a_step=True)
    return cost_of(meta_model(TINY, causal=False), method, **options)


@pytest.mark.parametrize(
    "name", ["full", "lora", "meprop", "folded", "rotated_regular", "truncated", "truncated_input"]
)
def test_operations_are_those_that_torch_counts(name):
    """A real step under torch's counter; it also counts pooler and head, which see one token."""
    protocol = PROTOCOL | {"density": 0.1}  # 409 entries: a core of all 128 outputs needs as many at least
    variant = next(v for v in VARIANTS if v.name == name)
    bases = random_bases(MODEL, protocol, seed=0, device=CPU)
    trainee = make_trainee(variant, MODEL, protocol, bases, Build(CPU, learning_rate=1e-3))
    rows, tokens = 4, 32
    ids = torch.randint(1, 100, (rows, tokens))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.zeros(rows, dtype=torch.long)}
    in_place = {torch.ops.aten.addmm_: lambda _, a, b, **__: 2 * a[0] * a[1] * b[1]}  # the counter leaves it out
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        train_step(trainee, batch)
    method = {"name": name, "base": variant.method, "form": variant.form, "matmul": "regular", "core": variant.core}
    found = cost(method, protocol)
    ratio = counter.get_total_flops() / found.training(rows, tokens)
    assert ratio == pytest.approx(1.0, abs=0.005)


def test_operations_by_hand():
    """One block of BERT: four matrices h x h and two h x 4h; 2 o i forward, and as much for each of two gradients."""
    h, blocks = 32, 2
    linear = blocks * (4 * h * h + 2 * 4 * h * h)
    full, lora, folded, truncated = (cost(name) for name in ("full", "lora", "sparsegrad", "truncated"))
    assert full.forward == 2 * linear and full.train == 6 * linear and full.step == 0
    assert full.attention == 4 * h * blocks and full.blocks == blocks
    matrix, matrices = 4 * h * h, 2 * blocks
    assert lora.train == full.train - 2 * matrices * matrix + matrices * 6 * 2 * (h + 4 * h)
    assert folded.train == full.train and folded.step == 2 * matrices * 2 * matrix * (5 * h)  # there and back
    assert folded.training(3, 10) == full.training(3, 10) + folded.step
    shapes = [(4 * h, h), (h, 4 * h)] * blocks
    cores = [(*core_shape(41, shape), *shape) for shape in shapes]
    expected = sum(2 * (c * i + r * o + r * c) for r, c, o, i in cores)
    assert truncated.train == full.train - 2 * matrices * matrix + expected
    assert full.training(3, 10) == 30 * (full.train + 3 * full.attention * 10)
    assert full.evaluation(3, 10) == 30 * (full.forward + full.attention * 10)
    checkpointed = cost("full", checkpointing=True)
    assert checkpointed.train == full.train + full.forward and checkpointed.attention_passes == 4
    only_mlp = cost("full", PROTOCOL | {"train": "mlp"})
    assert only_mlp.train == full.train - 2 * blocks * 4 * h * h
    assert hosvd_operations({"up": (2, 3)}) == 9 * (8 + 27)


# Rates


CARD = Processor("card", peak={"fp32": 1e12}, match="Card 1", block_seconds=0.5)
UNIT = Cost(forward=1.0, train=3.0, step=0.0, attention=0.0, attention_passes=3, blocks=2, parameters=1)


WHERE = {"stage": "train", "model": "m", "method": "full", "task": "cola"}


def fact(**changes):
    values = {"card": "card", "model": "m", "method": "full", "task": "cola", "batch": 10, "tokens": 10.0}
    return Fact(**values | {"precision": "fp32", "steps_per_second": 2.0, "source": "a record"} | changes)


ASSUMED = {"utilisation": {"fp32": 0.5, "bandwidth": 0.5, "fixed": 0.25}, "seconds": {"capture": 0.0}}


def speed(*facts, **options):
    return Throughput(facts, lambda *_: UNIT, lambda model, task: 10.0, ASSUMED, **options)


def test_the_best_rate_is_taken_and_named():
    own, other_task = fact(), fact(task="mrpc", steps_per_second=4.0)
    other_model = fact(model="n", steps_per_second=8.0, source="another")
    everything = speed(own, other_task, other_model)
    rates = [everything.rate(CARD, "m", "full", task, "fp32") for task in ("cola", "mrpc", "rte")]
    assert [(r.value, r.kind) for r in rates] == [(600, "measured"), (1200, "measured"), (900, "measured")]
    lora = everything.rate(CARD, "m", "lora", "cola", "fp32")
    assert (lora.value, lora.kind, lora.source) == (900, "scaled", "a record")
    assert everything.rate(CARD, "x", "lora", "cola", "fp32").kind == "scaled"
    assert speed(other_model).rate(CARD, "m", "full", "cola", "fp32").source == "another"
    nothing = speed(fact(card="another card")).rate(CARD, "m", "full", "cola", "fp32")
    assert (nothing.value, nothing.kind) == (5e11, "calculated") and "fp32 peak 1 TFLOP/s x 0.5" in nothing.source
    assert speed().rate(CARD, "m", "full", "cola", "bf16").kind == "unknown"
    # A GPU's bf16 says nothing of its fp32; a CPU's says more than nothing.
    assert speed(fact(precision="bf16")).rate(CARD, "m", "full", "cola", "fp32").kind == "calculated"
    cpu = Processor("card", match="cpu")
    assert speed(fact(precision="bf16")).rate(cpu, "m", "full", "cola", "fp32").kind == "scaled"


def test_a_model_that_was_not_measured_takes_the_rate_of_one_of_its_size():
    sizes = {"tiny": 10, "small": 1000, "large": 10**6, "new": 5000}
    facts = [fact(model=name, steps_per_second=size / 100) for name, size in sizes.items() if name != "new"]
    costs = lambda model, *_: replace(UNIT, parameters=sizes[model])  # noqa: E731
    found = Throughput(facts, costs, lambda *_: 10.0, ASSUMED).rate(CARD, "new", "full", "cola", "fp32")
    assert (found.value, found.kind) == (300 * 10, "scaled")


def test_a_rate_is_measured_only_in_the_mode_that_the_runs_take():
    eager, graphs = fact(), fact(graphs=True, steps_per_second=8.0)
    both = speed(eager, graphs)
    rates = [both.rate(CARD, "m", "full", "cola", "fp32", graphs=mode) for mode in (False, True)]
    assert [(r.value, r.kind) for r in rates] == [(600, "measured"), (2400, "measured")]
    other = both.rate(CARD, "m", "lora", "cola", "fp32", graphs=True)
    assert (other.value, other.kind) == (2400, "scaled")
    assert speed(eager).rate(CARD, "m", "full", "cola", "fp32", graphs=True).kind == "scaled"
    cpu = Processor("card", match="cpu")  # has no graphs
    assert speed(eager).rate(cpu, "m", "full", "cola", "fp32", graphs=True).kind == "measured"
    sizes = {"runs": 1, "steps": 20, "batch": 10, "tokens": 10.0, "precision": "fp32", "cost": UNIT}
    assert Training(**WHERE, **sizes, graphs=True).seconds(CARD, both).value == pytest.approx(20 * 300 / 2400)


def test_steps_of_several_sizes_give_a_fixed_time_and_a_rate():
    """Steps of 300 and 3,000 operations, 2 blocks: 0.1 s a block, and 1,000 operations a second, are 0.5 and 3.2 s."""
    facts = [fact(graphs=True, tokens=t, steps_per_second=1 / s, task="a") for t, s in ((10.0, 0.5), (100.0, 3.2))]
    lora = [replace(f, method="lora", steps_per_second=f.steps_per_second / 2) for f in facts]
    kin = {"full": ("full", "Full"), "lora": ("lora", "LoRA", "PEFT"), "dora": ("dora", "peft", "PEFT")}
    kin |= {"random": ("random", "full", "Full"), "other": ("other",)}
    both = speed(*facts, *lora, kin=kin.__getitem__)
    own = both.rate(CARD, "m", "full", "cola", "fp32", graphs=True)
    assert (own.kind, own.block, own.value) == ("measured", pytest.approx(0.1), pytest.approx(1000))
    for method, of in (("random", own), ("dora", both.rate(CARD, "m", "lora", "cola", "fp32", graphs=True))):
        found = both.rate(CARD, "m", method, "cola", "fp32", graphs=True)
        assert (found.kind, found.block, found.value) == ("scaled", of.block, of.value)
    assert 0.1 < both.rate(CARD, "m", "other", "cola", "fp32", graphs=True).block < 0.2  # all there is
    flat = speed(*(replace(f, steps_per_second=5.0) for f in facts)).rate(
        CARD, "m", "full", "cola", "fp32", graphs=True
    )
    assert flat.block == pytest.approx(0.1) and flat.value == 1e12  # the peak
    work = Training(
        **WHERE, runs=3, steps=20, batch=10, tokens=50.0, precision="fp32", cost=UNIT, graphs=True,
        passes=2, interval=8, evaluated=100, evaluation_batch=30,
    )  # fmt: skip
    found = work.seconds(CARD, both)
    step, evaluation = 2 * 2 * 0.1 + 1.5, 4 * 2 * 0.1 / 3 + 5.0  # 4 batches of an evaluation, 5,000 operations
    assert found.value == pytest.approx(3 * (20 * step + 3 * evaluation))
    fixed = 20 * 0.4 + 3 * 0.8 / 3
    assert found.busy == pytest.approx(found.value - 0.75 * 3 * fixed)
    both.assumed = ASSUMED | {"seconds": {"capture": 7.0}}
    assert work.seconds(CARD, both).value == pytest.approx(found.value + 3 * 7)
    assert work.seconds(CARD, both).busy == pytest.approx(found.busy)  # another run may use the card then
    new = Processor("new", peak={"fp32": 1e3}, match="new", block_seconds=9.0, graph_seconds=0.1)
    rate = both.rate(new, "m", "full", "cola", "fp32", graphs=True)
    assert (rate.kind, rate.value, rate.block, rate.least) == ("calculated", 500, 0.1, 0)


def test_time_of_runs_with_their_evaluations():
    sizes = {"runs": 3, "steps": 20, "stopped": 5.0, "batch": 10, "tokens": 10.0, "interval": 8, "evaluated": 100}
    work = Training(**WHERE, **sizes, precision="fp32", cost=UNIT)
    whole = work.seconds(CARD, speed(fact()))
    assert whole.kind == "measured" and whole.value == whole.busy == pytest.approx(3 * (20 * 300 + 3 * 1000) / 600)
    stopped = work.seconds(CARD, speed(fact()), stopped=True)
    assert stopped.value == pytest.approx(3 * (5 * 300 + 1 * 1000) / 600)
    # Nothing measured: 9,000 operations are nothing to a card of a TFLOP/s, but 20 steps of 2 blocks take 20 s, and
    # 3 evaluations of 2 batches a third of as many steps.
    eager = work.seconds(CARD, speed())
    assert (eager.value, eager.kind) == (3 * (20 + 3 * 2 / 3) * 2 * 0.5, "calculated") and eager.busy < 1e-6
    never = replace(work, stopped=None)
    assert never.seconds(CARD, speed(fact()), stopped=True) == never.seconds(CARD, speed(fact()))
    unknown = work.seconds(Processor("nothing known"), speed())
    assert (unknown.value, unknown.kind) == (None, "unknown")


def test_time_of_decompositions_and_answers():
    hosvd = Decomposition(**WHERE | {"stage": "basis"}, runs=4, each=1e9)
    assert hosvd.seconds(replace(CARD, eigh=1e8), speed()).value == 40.0
    assert hosvd.seconds(CARD, speed()).value is None
    answers = Decoding(**WHERE | {"stage": "answers"}, runs=2, steps=100, weights=1e9, blocks=2)
    fast = replace(CARD, bandwidth=1e9, block_seconds=0.0)
    assert answers.seconds(fast, speed()).value == pytest.approx(2 * 100 * 2.0)
    assert answers.seconds(replace(fast, block_seconds=300.0), speed()).value == pytest.approx(2 * 100 * 200.0)


def test_published_facts_leave_out_what_is_inflated():
    facts = published_facts()
    authors = [f for f in facts if f.card == "authors"]
    assert {(f.method, f.steps_per_second) for f in authors} == {("full", 4.24), ("lora", 4.49), ("sparsegrad", 1.74)}
    assert all(f.source for f in facts)


def run_record(**changes):
    run = {"experiment": "e", "kind": "train", "model": "m", "method": "lora", "task": "cola", "seed": 1}
    return {
        "status": "finished",
        "run": run,
        "hyperparameters": {"batch_size": 8},
        "treatment": {"precision": "fp32"},
        "device": {"type": "cuda", "name": "Big Card 1 (80 GB)"},
        "training": {"seconds": 50.0, "steps": 100, "step_seconds_median": 0.25},
        "memory": {"peak_training": 123},
    } | changes


@pytest.fixture
def results(tmp_path):
    """Runs of two experiments, ``e`` and ``other``; a search of ``e``."""
    root = tmp_path / "results"
    for name in ("e", "other"):
        folder = root / name / "runs/m/lora"
        records.write_json(folder / "a.json", run_record())
        records.write_json(folder / "b.json", run_record(status="failed"))
        records.write_json(folder / "cell.json", {"records": ["a.json", "b.json"]})
    trials = [{"seconds": 10.0, "intermediate": {"5": 0.1, "10": 0.2}}, {"seconds": None, "intermediate": {}}]
    content = {"run": {"model": "m", "method": "lora"}, "best": {"batch_size": 32}, "trials": trials}
    records.write_json(root / "e/search/m/lora/cola.json", content)
    return root


def test_an_experiments_own_runs_do_not_estimate_it(results):
    for planned, there in (("e", ["other"]), ("other", ["e"]), ("new", ["e", "other"])):
        facts = list(recorded_facts(results, [CARD], planned))
        assert [Path(f.source).relative_to(results).parts[0] for f in facts] == there
    assert facts[0].steps_per_second == 4 and (facts[0].card, facts[0].batch) == ("card", 8)
    assert list(recorded_facts(results, [Processor("cpu", match="cpu")], "new")) == []


def test_what_was_taken_is_read_from_records(results):
    found = taken(results, "e", [CARD])
    train, search = found["train", "m", "lora"], found["search", "m", "lora"]
    assert (train.runs, train.seconds, train.steps, train.peak, train.devices) == (1, 50.0, 100, 123, {"card"})
    assert (search.runs, search.seconds, search.steps, search.devices) == (2, 10.0, 10, set())
    assert taken(results, "none", [CARD]) == {}


def efficiency_record(how, model="m", device="Big Card 1 (80 GB)", names=("folded",)):
    return {
        "run": {"model": model, "task": "cola"},
        "treatment": {"batch_size": 32, "precision": "bf16", "padding": "longest"} | how,
        "lengths": {"mean_slots": 512.0},
        "device": {"type": "cuda", "name": device},
        "variants": [{"name": name, "status": "finished", "steps_per_second": 4.0} for name in names],
    }


def test_a_cards_records_are_rates_of_their_mode(tmp_path):
    for folder, how in (("m-sound-graphs", {"graphs": "auto"}), ("m-checkpointing", {"checkpointing": True})):
        record = efficiency_record(how)
        records.write_json(tmp_path / f"paper/efficiency/{folder}/cola.json", record)
        records.write_json(tmp_path / f"paper/before/efficiency/{folder}/cola.json", record)
    again, graphs = recorded_facts(tmp_path, [CARD], "paper")  # what was before is no rate of today's
    assert (graphs.graphs, graphs.checkpointing, again.graphs, again.checkpointing) == (True, False, False, True)
    assert (graphs.method, graphs.batch, graphs.tokens, graphs.steps_per_second) == ("sparsegrad", 32, 16.0, 4.0)
    asked = []
    Throughput([again, graphs], lambda *names: asked.append(names) or UNIT, lambda *_: 1.0, {})
    assert asked == [("m", "sparsegrad", True), ("m", "sparsegrad", False)]


# Sizes


def test_rows_come_from_files_then_from_the_table(tmp_path, glue_root):
    data = read("data", "glue")
    sizes = SETTINGS["rows"]
    train, held, source = task_rows(data | {"root": str(glue_root)}, sizes, "cola")
    assert source.startswith("files in") and (train, held) != (8551, 1043) and train > 0
    half = tmp_path / "half" / "glue" / "cola"
    half.mkdir(parents=True)
    (half / "train-00000-of-00002.parquet").touch()
    with pytest.raises(ValueError, match=r"each shard 0 to 1 is needed once, wrong: \[1\]"):
        task_rows(data | {"root": str(tmp_path / "half")}, sizes, "cola")
    assert task_rows(data | {"root": str(tmp_path)}, sizes, "cola") == (8551, 1043, "dataset card of nyu-mll/glue")
    with pytest.raises(ValueError, match="rows of cola are not known: add rows.cola to conf/plan.yaml"):
        task_rows(data | {"root": str(tmp_path)}, {}, "cola")
    assert set(read("", "plan")["rows"]) - {"source"} == set(data["tasks"])


def test_stopping_epochs_are_means_of_the_logs():
    epochs = stopping_epochs()
    assert epochs["bert_base", "full", "stsb"] == pytest.approx((4.72 + 3.89 + 8.61 + 5.00 + 2.78) / 5)
    three = [epochs["bert_base", method, "stsb"] for method in ("full", "lora", "sparsegrad")]
    assert epochs["bert_base", "meprop", "stsb"] == pytest.approx(sum(three) / 3)
    assert ("llama2_7b", "full", "stsb") not in epochs


def test_tokens_of_a_row(tmp_path):
    model = {"name": "m", "architecture": {"max_position_embeddings": 64}}

    def tokens(padding):
        return padded_tokens(tmp_path, tmp_path / "lengths", model, PROTOCOL | {"padding": padding}, "cola", 2)

    assert tokens("max_length")[0] == 64
    longest, source = tokens("longest")
    assert longest == 64 and "an upper bound" in source
    counts = {"task": "cola", "source": "counted", "counts": {"4": 3, "100": 1}}
    records.write_json(tmp_path / "lengths/another/cola.json", counts)
    longest, source = tokens("longest")  # of two rows both are short in 9 of 16 batches; 64 positions cut the long ones
    assert longest == pytest.approx(9 / 16 * 4 + 7 / 16 * 64) and "another" in source
    record = {"treatment": {"padding": "longest", "batch_size": 32}, "lengths": {"mean_slots": 320}}
    for folder, name in (("m", "another"), ("m-sound", "m")):
        records.write_json(tmp_path / f"any/efficiency/{folder}/cola.json", record | {"run": {"model": name}})
    found, source = tokens("longest")
    assert found == 10 and "m-sound" in source


def test_blocks_come_from_a_record_then_from_the_assumption(tmp_path):
    assumed = {"oasst1": {"train": 7, "validation": 3, "source": "assumption"}}
    assert chat_blocks(tmp_path, "oasst1", "m", assumed) == (7, 3, "assumption")
    with pytest.raises(ValueError, match="add blocks.mine to conf/plan.yaml"):
        chat_blocks(tmp_path, "mine", "m", assumed)
    folder = tmp_path / "e/runs/m/full"
    records.write_json(folder / "a.json", {"data": {"rows": {"train": 90, "validation": 9}}})
    records.write_json(folder / "cell.json", {"records": ["a.json"]})
    assert chat_blocks(tmp_path, "oasst1", "m", assumed)[:2] == (90, 9)


# The whole


LISTS = {
    "name": "e",
    "protocol": "printed",
    "scale": "paper",
    "tasks": ["rte", "mnli"],
    "seeds": [1, 2, 3],
    "methods": ["full", "sparsegrad"],
    "models": ["bert_base"],
    "ablations": ["sparsegrad_22k"],
}


def experiment_of(tmp_path, lists=LISTS, read=read, settings=SETTINGS, conf=ROOT / "conf"):
    base = yaml.safe_load((ROOT / "experiments/base.yaml").read_text())
    return Experiment(expand(base | lists, conf), read, settings, tmp_path / "results", str(tmp_path / "data"))


def planned(tmp_path, lists=LISTS, cards=None, **changes):
    settings = SETTINGS | changes
    cards = cards or [Processor(name=name, **values) for name, values in settings["cards"].items()]
    return plan_experiment(experiment_of(tmp_path, lists, settings=settings), cards, settings)


def row_of(plan, stage, method=""):
    (found,) = [row for row in plan["stages"] if (row["stage"], row["method"]) == (stage, method)]
    return found


def test_every_cell_is_counted(tmp_path):
    plan = planned(tmp_path)
    assert [(row["stage"], row["method"]) for row in plan["stages"]] == [
        ("gradients", ""),
        ("basis", ""),
        *((stage, method) for method in ("full", "sparsegrad") for stage in ("search", "train")),
        ("search", "sparsegrad_22k"),
        ("train", "sparsegrad_22k"),
        ("efficiency", ""),
    ]
    train, search = row_of(plan, "train", "full"), row_of(plan, "search", "full")
    steps = 20 * (math.ceil(2490 / 16) + math.ceil(392702 / 16))
    assert (train["runs"], train["steps"]) == (2 * 3, 3 * steps) and train["longest"] == 20 * math.ceil(392702 / 16)
    assert (search["runs"], search["steps"]) == (2 * 40, 40 * steps)
    epochs = stopping_epochs()
    stopped = sum(epochs["bert_base", "full", task] * n / 16 for task, n in (("rte", 2490), ("mnli", 392702)))
    assert train["may_stop"] and train["steps_if_stopped"] == pytest.approx(3 * stopped)
    a40 = train["cards"]["A40"]
    assert a40["kinds"] == ["calculated"] and a40["if_stopped"] < a40["seconds"]
    assert a40["sources"] == ["fp32 peak 37.4 TFLOP/s x 0.4"]
    assert row_of(plan, "efficiency")["runs"] == 2 * len(VARIANTS)
    json.dumps(plan)


def test_extensions_of_a_grid_are_at_most_and_runs_side_by_side_share_a_card(tmp_path):
    def other(group, name):
        found = read(group, name)
        return found | ({"search": found["search"] | {"extend": 3}} if (group, name) == ("scale", "paper") else {})

    card = Processor("card", peak={"fp32": 1e12}, match="card", eigh=1e12, graph_seconds=1e-3)
    lists, settings = LISTS | {"methods": ["full"], "ablations": [], "efficiency_models": []}, SETTINGS | {"workers": 3}
    plan = plan_experiment(experiment_of(tmp_path, lists, other), [card], settings)
    search, train = row_of(plan, "search", "full"), row_of(plan, "train", "full")
    plain = row_of(planned(tmp_path, lists, [card]), "search", "full")
    assert (search["runs"], search["jobs"], train["jobs"]) == (2 * 43, 2, 2 * 3)
    assert search["steps_if_stopped"] == plain["steps_if_stopped"] and search["steps"] * 40 == plain["steps"] * 43
    assert search["cards"]["card"]["if_stopped"] == pytest.approx(plain["cards"]["card"]["if_stopped"])
    total, rows = plan["totals"]["card"], plan["stages"]
    alone = {row["stage"]: row["cards"]["card"]["seconds"] + row["overhead"] for row in rows}
    busy = {row["stage"]: row["cards"]["card"]["busy_seconds"] for row in rows}
    assert total["hours"] == pytest.approx(sum(alone.values()) / 3600)
    shared = {stage: max(alone[stage] / count, busy[stage]) for stage, count in (("search", 2), ("train", 3))}
    assert total["hours_beside"] == pytest.approx(sum((alone | shared).values()) / 3600) and shared != alone
    assert "3 runs side by side" in plan_text(plan, [])


def test_least_differences_that_seeds_and_rows_find(tmp_path):
    assumed = SETTINGS["detectable"]
    rte, _, both = detectable_differences(experiment_of(tmp_path), assumed)
    assert (rte["seeds"], rte["rows"], rte["metric"], rte["measured"]) == (3, 277, "accuracy", True)
    assert both["task"] is None and both["least"] < rte["least"]
    scores = [
        [*released_scores(model, method, "rte").values()]
        for model in ("bert_base", "roberta_base")
        for method in ("full", "lora", "sparsegrad")
    ]
    assert {len(cell) for cell in scores} == {5}
    spread = np.sqrt(np.var(scores, axis=1, ddof=1).mean())
    assert (rte["score"], rte["spread"]) == (pytest.approx(np.mean(scores)), pytest.approx(spread))
    # Three pairs find 3.264 standard deviations with 80 % power (statsmodels), a normal test 2.8016 standard errors.
    by_seeds = 3.264044 * math.sqrt(2) * spread
    by_rows = 2.801585 * math.sqrt(2 * (1 - 0.5) * rte["score"] * (100 - rte["score"]) / 277)
    assert rte["least"] == pytest.approx(math.hypot(by_seeds, by_rows), rel=1e-5)
    lists = LISTS | {"seeds": [1], "decoders": ["stories260k"], "decoder_seeds": [1, 2]}
    *encoder, decoder = detectable_differences(experiment_of(tmp_path, lists), assumed)
    assert [row["least"] for row in encoder] == [None, None, None]
    assert decoder["metric"] == "loss" and 0.01 < decoder["least"] < 0.2


def test_a_half_that_reports_has_half_the_rows(tmp_path):
    def halved(group, name):
        return read(group, name) | ({"selection": "half"} if group == "scale" else {})

    assumed = SETTINGS["detectable"]
    whole, half = (detectable_differences(experiment_of(tmp_path, read=one), assumed)[0] for one in (read, halved))
    assert (whole["rows"], half["rows"]) == (277, 138) and half["least"] > whole["least"]


def test_money_only_where_prices_are_set(tmp_path):
    plan = planned(tmp_path)
    assert all(total["money"] is None for total in plan["totals"].values())
    assert "No money: prices are not set" in plan_text(plan, [])
    cards = [Processor("A40", memory=48e9, peak={"fp32": 1e12, "bf16": 1e12}, eigh=1e9, price=0.5)]
    lists = LISTS | {"decoders": ["stories260k"], "decoder_seeds": [1, 2], "chat": "oasst1"}
    judge = {"prompt_tokens": 1000, "completion_tokens": 500, "prompt_price": 2.0, "completion_price": 4.0}
    judge |= {"weights": 1e9}
    plan = planned(tmp_path, lists, cards, currency="EUR", judge=judge)
    total = plan["totals"]["A40"]
    assert total["hours"] is None  # no bandwidth: the time of answers is not known, and not left out
    plan = planned(tmp_path, lists, [replace(cards[0], bandwidth=1e12)], currency="EUR", judge=judge)
    total = plan["totals"]["A40"]
    assert total["money"] == pytest.approx(0.5 * total["hours"]) and total["hours_if_stopped"] < total["hours"]
    calls = 80 * 2 * 2 * 3 * 2  # questions, turns, seeds, repeats, methods
    assert plan["judging"]["calls"] == calls
    judged = row_of(plan, "judgments", "full")  # 60 rounds of 8 calls, 500 tokens each, at half the bandwidth
    assert judged["cards"]["A40"]["seconds"] == pytest.approx(2 * 60 * 500 * 1e9 / 0.5e12)
    hosted = experiment_of(tmp_path, lists | {"judge": "openai"}).work()
    assert not [work for work in hosted if work.stage == "judgments"]
    (row,) = [row for row in plan["memory"] if (row["model"], row["method"]) == ("stories260k", "full")]
    numbers = row["components"]["trained"] / row["share"]
    assert plan["disk"]["merged models"] == pytest.approx(2 * numbers * 2 * 2)  # bfloat16, methods, seeds
    assert plan["disk"]["moments"] == 2 * plan["disk"]["bases"]
    assert plan["disk"]["total"] == sum(size for kind, size in plan["disk"].items() if kind != "total")
    assert plan["judging"]["money"] == pytest.approx(calls * (1000 * 2.0 + 500 * 4.0) / 1e6)
    assert "EUR, at most" in plan_text(plan, [])


def test_a_card_that_is_too_small_is_said(tmp_path):
    small = Processor("small", memory=4e9, reserve=1e9, peak={"fp32": 1e12}, eigh=1e9)
    plan = planned(tmp_path, cards=[small])
    assert {row["fits"]["small"] for row in plan["memory"]} == {False}
    peak = plan["memory"][0]["peak"]
    for memory, fits in ((peak + 1e9, True), (peak + 1e9 - 1, False)):  # beside the reserve
        assert replace(small, memory=memory).fits(peak) is fits
    text = plan_text(plan, ["pretrain"])
    assert re.search(r"bert_base +mean over tasks +3 +[\d.]+\n", text)
    assert "NO" in text and "no run stops early" in text and "dataset card of nyu-mll/glue" in text
    assert "Not estimated (minutes): pretrain." in text


@pytest.mark.parametrize(
    ("protocol", "method"),
    [("released", "sparsegrad"), ("printed", "truncated_own_basis")],
    ids=["protocol", "variant"],
)
def test_bases_of_every_run_cost_time_and_are_no_runs(protocol, method, tmp_path):
    base = "sparsegrad" if method == "sparsegrad" else "truncated"
    lists = LISTS | {"methods": ["full", method], "ablations": [], "efficiency_models": []}
    own = planned(tmp_path, lists | {"protocol": protocol})
    stage = planned(tmp_path, lists | {"methods": ["full", base], "protocol": "printed"})
    found, reference = row_of(own, "train", method), row_of(stage, "train", base)
    assert found["runs"] == reference["runs"] == 6
    assert found["cards"]["A40"]["seconds"] > reference["cards"]["A40"]["seconds"]
    assert row_of(own, "train", "full")["cards"] == row_of(stage, "train", "full")["cards"]


def test_sizes_of_a_run_come_from_scale_then_protocol(tmp_path):
    over = {"batch_size": 5, "max_length": 16, "precision": "bf16", "frozen_dtype": "fp32", "micro_batch_size": 8}
    over |= {"max_steps": None, "evaluation_steps": None}

    def other(group, name):
        return read(group, name) | (over if (group, name) == ("scale", "llama/paper") else {})

    lists = LISTS | {"models": [], "ablations": [], "decoders": ["stories260k"], "methods": ["full"]}
    for reading, expected in ((read, (2, 512, 32, "bf16", "bf16", True)), (other, (5, 16, 1, "bf16", "fp32", True))):
        setup = experiment_of(tmp_path, lists, reading).setup("stories260k", "full")
        assert astuple(setup)[:6] == expected
    encoder = experiment_of(tmp_path).setup("bert_base", "full")
    assert (encoder.micro_batch, encoder.tokens) == (32, 128)  # the largest of the search


def test_what_was_taken_stands_beside_the_estimate(tmp_path):
    folder = tmp_path / "results/e/runs/bert_base/full"
    record = run_record(
        run={"model": "bert_base", "method": "full", "task": "rte"}, device={"type": "cpu", "name": "1"}
    )
    for name in ("a.json", "b.json"):
        records.write_json(folder / name, record)
    records.write_json(folder / "cell.json", {"records": ["a.json", "b.json"]})
    cpu = Processor("CPU", match="cpu", peak={"fp32": 1e12}, eigh=1e9)
    plan = planned(tmp_path, LISTS | {"efficiency_models": []}, [cpu, replace(cpu, name="card", match="Card")])
    (row,) = plan["actual"]
    estimate = row_of(plan, "train", "full")["cards"]["CPU"]["seconds"] * 2 / 6
    assert (row["card"], row["runs"], row["of"], row["actual_seconds"]) == ("CPU", 2, 6, 100.0)
    assert row["estimated_seconds"] == pytest.approx(estimate) and row["ratio"] == pytest.approx(100 / estimate)
    assert "actual / estimated" in plan_text(plan, [])
    assert planned(tmp_path, LISTS | {"name": "not run"})["actual"] == []


# The script


@pytest.fixture
def script(compose, monkeypatch):
    """``script("experiment=...")``: experiments/plan.py's main in this process, without a network."""

    def refuse(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    main = runpy.run_path(str(ROOT / "experiments/plan.py"))["main"].__wrapped__
    return lambda *overrides: main(compose(*overrides, config_name="plan"))


def test_it_runs_without_a_gpu_and_a_network_and_names_its_sources(script, caplog, tmp_path):
    lists = yaml.safe_load((ROOT / "experiments/paper.yaml").read_text())
    lists |= {"models": ["bert_base"], "ablations": [], "ablation_models": [], "methods": ["full", "sparsegrad"]}
    (tmp_path / "paper.yaml").write_text(yaml.safe_dump(lists))
    shutil.copy(ROOT / "experiments/base.yaml", tmp_path)
    caplog.set_level("INFO")
    places = [f"results={tmp_path}", f"data_root={tmp_path}", f"json={tmp_path}/plan.json"]
    of_none = efficiency_record({}, "bert_base", "H100", ["folded_backward", "full"])  # the first is no method
    records.write_json(tmp_path / "paper/efficiency/bert_base/cola.json", of_none)
    script(f"experiment={tmp_path}/paper.yaml", *places)
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert {row["stage"] for row in plan["stages"]} >= {"search", "train", "efficiency", "answers"}
    assert {row["model"] for row in plan["memory"]} == {"bert_base", "llama2_7b"}
    assert all(row["fits"]["A40"] for row in plan["memory"]) and plan["judging"]["calls"] == 80 * 2 * 3 * 3 * 2
    assert {row["phase"] for row in plan["preparing"]} == {"preliminary", "hosvd"}
    for source in ("released logs", "dataset card of nyu-mll/glue", "fp32 peak 37.4 TFLOP/s", "assumption in conf"):
        assert source in caplog.text
    assert "tables" in caplog.text  # among the stages that are not estimated


def test_an_experiment_of_nothing_is_refused(script, tmp_path):
    shutil.copy(ROOT / "experiments/base.yaml", tmp_path)
    (tmp_path / "empty.yaml").write_text("name: empty\n")
    with pytest.raises(ValueError, match="an experiment needs models .encoders. or decoders"):
        script(f"experiment={tmp_path}/empty.yaml")
