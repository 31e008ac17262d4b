"""How large an adapter's file is and how long it takes to save and load, beside peft's LoRA and SHiRA.

    python experiments/adapter_sizes.py sizes        # results/library/adapters.json; about five minutes on two cores
    python experiments/adapter_sizes.py steps --checkpoint data/models/minilm --glue data/glue/mrpc

``sizes`` has random weights at true size. ``steps`` fine-tunes a checkpoint on MRPC, the MLP's entries and the head
alone, and writes what more steps make of the file (results/library/adapter_steps.json).
"""

import argparse
import copy
import logging
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

import peft
import torch
import yaml
from torch import Tensor, nn

import sparsegrad as sg
from finetune.efficiency import machine
from finetune.store import records

log = logging.getLogger(__name__)
ROOT = Path(__file__).parents[1]
HEAD = "classifier"
DENSITY, MOVED, LARGEST = (
    0.01,
    0.1,
    2.5,
)  # k; entries moved after some steps; largest differences held, as multiples of k
RANKS = {"lora": 7, "shira": 6}  # about k numbers a matrix


@dataclass(frozen=True)
class Way:
    """An adapter, how it is written to a path, and how it comes on a base model."""

    name: str
    model: nn.Module
    save: Callable[[Path], None]
    load: Callable[[Path, nn.Module], nn.Module]


# ---- sizes ----


def sizes(options: argparse.Namespace) -> dict[str, Any]:
    """The record of ``sizes``."""
    from transformers import AutoConfig, AutoModelForSequenceClassification

    described = yaml.safe_load(options.model.read_text())
    patterns = described["target_modules"]
    config = AutoConfig.for_model(**described["architecture"])
    base = AutoModelForSequenceClassification.from_config(config).eval()
    shapes = {target.kind: target.shape for target in sg.find_targets(base, patterns)}
    bases = {kind: random_basis(*shape) for kind, shape in shapes.items()}
    k = {kind: sg.entries_for_density(DENSITY, shape) for kind, shape in shapes.items()}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "bases.safetensors"
        sg.save_bases(path, bases)
        ways = [*sparsegrad_ways(base, patterns, bases, k, path), *peft_ways(base, patterns)]
        before = machine.others(torch.device("cpu"))
        rows = measured(ways, base, Path(folder), options.repeats)
        return {
            "device": machine.facts(torch.device("cpu")),
            "before": before,
            "model": described["name"],
            "matrices": len(sg.find_targets(base, patterns)),
            "k": k,
            "ranks": RANKS,
            "repeats": options.repeats,
            "model_bytes": sum(t.nbytes for t in base.state_dict().values()),
            "bases_bytes": path.stat().st_size,
            "rows": rows,
        }


def sparsegrad_ways(
    base: nn.Module, patterns: Mapping[str, str], bases: Mapping[str, sg.Basis], k: Mapping[str, int], path: Path
) -> Iterator[Way]:
    """The forms, as they are after one step and after some."""

    def trained(form: str, share: float) -> nn.Module:
        model = copy.deepcopy(base)
        train_alone(model, patterns)
        sg.sparsify(model, bases, dict(k), patterns, form=form)
        for layer in sg.sparsegrad_layers(model).values():
            entries = layer.core.numel() if form == "truncated" else layer.weight.numel()
            count = entries if form == "truncated" else round(share * entries)
            places = torch.randperm(entries)[:count].sort().values
            layer.add_(places, 1e-4 * torch.randn(count))
        moved(model)
        return model

    def way(name: str, model: nn.Module, **options: Any) -> Way:
        given = path if options.get("bases") == "reference" else None
        return Way(
            name,
            model,
            lambda file: sg.save_adapter(file, model, **options),
            lambda file, plain: sg.load_adapter(file, plain, bases=given),
        )

    early, late = trained("folded", DENSITY), trained("folded", MOVED)
    largest = round(LARGEST * max(k.values()))
    yield way("folded, k entries moved, bases by reference", early, bases="reference")
    yield way("folded, k entries moved, bases inside", early)
    yield way(f"folded, {MOVED:.0%} moved, bases by reference", late, bases="reference")
    yield way(
        f"folded, {MOVED:.0%} moved, {largest} largest differences",
        late,
        bases="reference",
        differences_from=base,
        entries=largest,
    )
    core = trained("truncated", 1.0)
    yield way("truncated, bases by reference", core, bases="reference")
    yield way("truncated, bases inside", core)


def peft_ways(base: nn.Module, patterns: Mapping[str, str]) -> Iterator[Way]:
    """LoRA and SHiRA on the same matrices, with the same head."""
    names = [target.name for target in sg.find_targets(base, patterns)]
    made = {
        "lora": (peft.LoraConfig, {"init_lora_weights": False}),
        "shira": (peft.ShiraConfig, {"init_weights": False}),
    }
    for name, (config, own) in made.items():
        model = peft.get_peft_model(
            copy.deepcopy(base), config(r=RANKS[name], target_modules=names, modules_to_save=[HEAD], **own)
        )
        moved(model)
        yield Way(f"peft's {name}", model.eval(), model.save_pretrained, load_peft)


def load_peft(folder: Path, plain: nn.Module) -> nn.Module:
    """As peft's users load."""
    return peft.PeftModel.from_pretrained(plain, folder)


def measured(ways: list[Way], base: nn.Module, folder: Path, repeats: int) -> list[dict[str, Any]]:
    """Every way in every round, so that what else the machine does falls on all alike; the first is not counted."""
    x = torch.randint(0, 100, (2, 8), generator=torch.Generator().manual_seed(1))
    seconds: dict[str, list[dict[str, float]]] = {way.name: [] for way in ways}
    rows: dict[str, dict[str, Any]] = {}
    for turn in range(repeats + 1):
        for number, way in enumerate(ways):
            path, plain = folder / str(number), copy.deepcopy(base)
            save = timed(lambda: way.save(path), "save")  # noqa: B023 - called at once
            loaded: list[nn.Module] = []
            load = timed(lambda: loaded.append(way.load(path, plain)), "load")  # noqa: B023
            if turn:
                seconds[way.name].append(save | load)
            else:
                error = logits_error(base, way.model, loaded[0], {"input_ids": x})
                rows[way.name] = {"name": way.name, "bytes": bytes_of(path), "logits_error": error}
                log.info("%s", rows[way.name])
    for name, row in rows.items():
        row |= {key: median(one[key] for one in seconds[name]) for key in seconds[name][0]}
    return list(rows.values())


def timed(call: Callable[[], None], name: str) -> dict[str, float]:
    """Seconds by the clock, and on the CPUs, all threads: what other processes take from it is not in those."""
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    return {f"{name}_seconds": time.perf_counter() - wall, f"{name}_cpu_seconds": time.process_time() - cpu}


@torch.no_grad()
def logits_error(base: nn.Module, trained: nn.Module, loaded: nn.Module, batch: Mapping[str, Tensor]) -> float:
    """How far the loaded model's logits are from the trained one's, as a share of what training changed."""
    start, right, found = (model.eval()(**batch).logits for model in (base, trained, loaded))
    return float((found - right).norm() / (right - start).norm())


def bytes_of(path: Path) -> int:
    """Of a file, or of an adapter's folder without the text for people."""
    files = [path] if path.is_file() else [file for file in path.iterdir() if file.suffix != ".md"]
    return sum(file.stat().st_size for file in files)


# ---- steps ----


def steps(options: argparse.Namespace) -> dict[str, Any]:
    """The record of ``steps``."""
    from transformers import AutoModelForSequenceClassification

    load = AutoModelForSequenceClassification.from_pretrained
    torch.manual_seed(0)
    base = load(options.checkpoint, num_labels=2).eval()
    patterns = sg.resolve_targets(base, "all-mlp")
    train_alone(base, patterns)
    batches = mrpc(options.glue, options.checkpoint, options.batch_size)
    moments = sg.collect_moments(base, [next(batches) for _ in range(8)], patterns)
    bases = {kind: sg.hosvd(moment) for kind, moment in moments.items()}
    model = copy.deepcopy(base)
    shapes = {target.kind: target.shape for target in sg.find_targets(base, patterns)}
    k = {kind: sg.entries_for_density(DENSITY, shape) for kind, shape in shapes.items()}
    sg.sparsify(model, bases, k, patterns)
    optimizer = sg.SparseGradAdamW(sg.param_groups(model), lr=options.learning_rate)
    rows, losses = [], []
    held_out = next(mrpc(options.glue, options.checkpoint, 64, "validation"))
    for step in range(1, max(options.at) + 1):
        model.train()
        optimizer.zero_grad()
        loss = model(**next(batches)).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if step in options.at:
            rows.append({"step": step, "loss": fmean(losses[-20:])} | files_of(model, base, bases, held_out))
            log.info("%s", rows[-1])
    settings = {"batch_size": options.batch_size, "learning_rate": options.learning_rate}
    return {"checkpoint": options.checkpoint.name, "task": "mrpc", "k": k, **settings, "rows": rows}


def files_of(
    model: nn.Module, base: nn.Module, bases: Mapping[str, sg.Basis], batch: Mapping[str, Tensor]
) -> dict[str, Any]:
    """Shares of the entries that steps have moved, and the files, exact and rounded."""
    layers = sg.sparsegrad_layers(model).values()
    shares = [len(layer.moved) / layer.weight.numel() for layer in layers]
    k = max(layer.k for layer in layers)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "adapter"
        sg.save_adapter(path, model, bases="reference")
        found: dict[str, Any] = {"moved": fmean(shares), "moved_most": max(shares), "exact_bytes": path.stat().st_size}
        for times in (None, 5, LARGEST, 1):
            entries = None if times is None else round(times * k)
            sg.save_adapter(path, model, bases="reference", differences_from=base, entries=entries)
            loaded = sg.load_adapter(path, copy.deepcopy(base), bases=bases)
            found[f"largest_{times or 'all'}"] = {
                "bytes": path.stat().st_size,
                "lost": fmean(sg.load_tensors(path)[1]["lost"].values()),
                "logits_error": logits_error(base, model, loaded, batch),
            }
    return found


def mrpc(folder: Path, checkpoint: Path, batch_size: int, split: str = "train") -> Iterator[dict[str, Tensor]]:
    """Batches without end, shuffled."""
    import pyarrow.parquet as pq
    from transformers import AutoTokenizer

    tokenizer, generator = AutoTokenizer.from_pretrained(checkpoint), torch.Generator().manual_seed(0)
    rows = pq.read_table(sorted(folder.glob(f"{split}-*.parquet"))[0]).to_pylist()
    while True:
        for numbers in torch.randperm(len(rows), generator=generator).split(batch_size):
            chosen = [rows[number] for number in numbers]
            pairs = [row["sentence1"] for row in chosen], [row["sentence2"] for row in chosen]
            batch = tokenizer(*pairs, padding=True, truncation=True, max_length=64, return_tensors="pt")
            yield {**batch, "labels": torch.tensor([row["label"] for row in chosen])}


# ---- both ----


def random_basis(out_features: int, in_features: int) -> sg.Basis:
    """Orthogonal matrices in float32; what an adapter costs does not depend on which."""
    V, U = (torch.linalg.qr(torch.randn(n, n)).Q for n in (out_features, in_features))
    return sg.Basis(U, V)


def train_alone(model: nn.Module, patterns: Mapping[str, str]) -> None:
    """The target matrices and the head."""
    model.requires_grad_(False)
    for target in sg.find_targets(model, patterns):
        target.weight.requires_grad_(True)
    model.get_submodule(HEAD).requires_grad_(True)


@torch.no_grad()
def moved(model: nn.Module) -> None:
    """Another head, as training would leave it."""
    for name, parameter in model.named_parameters():
        if f"{HEAD}." in name and parameter.requires_grad:
            parameter += 1e-4 * torch.randn_like(parameter)


def main(given: list[str] | None = None) -> None:
    """Run one of the two and write its record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "library")
    commands = parser.add_subparsers(dest="command", required=True)
    of_sizes = commands.add_parser("sizes")
    of_sizes.add_argument("--model", type=Path, default=ROOT / "conf" / "model" / "bert_base.yaml")
    of_sizes.add_argument("--repeats", type=int, default=3)
    of_steps = commands.add_parser("steps")
    of_steps.add_argument("--checkpoint", type=Path, required=True)
    of_steps.add_argument("--glue", type=Path, required=True, help="folder with train-*.parquet and validation-*")
    of_steps.add_argument("--at", type=int, nargs="+", default=[1, 3, 10, 30, 100])
    of_steps.add_argument("--batch-size", type=int, default=16)
    of_steps.add_argument("--learning-rate", type=float, default=1e-3)
    options = parser.parse_args(given)
    torch.manual_seed(0)
    name, run = {"sizes": ("adapters", sizes), "steps": ("adapter_steps", steps)}[options.command]
    path = options.output / f"{name}.json"
    records.write_json(path, run(options))
    log.info("%s", path)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    main()
