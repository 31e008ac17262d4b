r"""Runs an experiment in the shape of peft's method_comparison on a CPU and text at hand, and writes its JSON.

    python experiments/method_comparison.py --data $SPARSEGRAD_DATA/oasst1/messages.parquet \
        --model $SPARSEGRAD_DATA/models/stories260K --output results/library/method_comparison \
        method_comparison/stories260K/experiments/*/*

An experiment is a folder ``experiments/<method>/<name>`` with peft's ``adapter_config.json``, and a
``training_params.json`` with what differs from peft's defaults. The data is a Parquet or JSON-lines file with the
columns query and response (MetaMathQA's) or OpenAssistant's messages: questions and their first answers.

peft's own runner needs a CUDA card, the hub, and generates GSM8K's answers; this one gives the loss on rows that were
held out, and null where that runner has more. The bases that a SparseGrad configuration names are made, where the file
does not exist, from the first 30 batches of training; ``--bases-only`` stops there.
"""

import argparse
import datetime
import json
import platform
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import peft
import pyarrow.json
import pyarrow.parquet
import torch
import transformers
from torch import Tensor, nn

import sparsegrad.peft
from sparsegrad import collect_moments, hosvd, save_bases

DEFAULTS = {
    "model_id": "meta-llama/Llama-3.2-3B",
    "dtype": "bfloat16",
    "max_seq_length": 768,
    "batch_size": 4,
    "batch_size_eval": 50,
    "max_steps": 5000,
    "eval_steps": 250,
    "query_template": "Question: {query} Think step by step.\nAnswer:",
    "seed": 0,
    "grad_norm_clip": 1.0,
    "optimizer_type": "AdamW",
    "optimizer_kwargs": {"lr": 1e-4, "weight_decay": 0.1},
    "lr_scheduler": "cosine",
}  # peft's default_training_params.json, as far as it matters here
VALID, WARMUP, GRADIENTS = 50, 0.1, 30  # rows held out and share of warm-up, as peft has them; gradients of the paper
Batch = dict[str, Tensor]


def main() -> None:
    """Run each experiment, write a file each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiments", type=Path, nargs="+")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", help="in place of the one that training_params.json names")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--bases-only", action="store_true")
    options = parser.parse_args()
    for experiment in options.experiments:
        own = experiment / "training_params.json"
        config = DEFAULTS | (json.loads(own.read_text()) if own.exists() else {})
        name = f"{experiment.parent.name}/{experiment.name}"
        result = run(experiment, name, config, options)
        if options.output is None or options.bases_only:
            continue
        options.output.mkdir(parents=True, exist_ok=True)
        path = options.output / f"{name.replace('/', '--')}.json"
        path.write_text(json.dumps(result, indent=2, default=list) + "\n")
        print(path, f"loss on held-out rows {result['train_info']['metrics'][-1]['valid loss']:.3f}")


def run(experiment: Path, name: str, config: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """One experiment; its record."""
    started, begun = time.perf_counter(), datetime.datetime.now(datetime.UTC).replace(microsecond=0).isoformat()
    transformers.set_seed(config["seed"])
    place = options.model or config["model_id"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(place)
    model = transformers.AutoModelForCausalLM.from_pretrained(place, dtype=getattr(torch, config["dtype"]))
    rows = encoded(pairs(options.data), tokenizer, config)
    train, valid = rows[VALID:], rows[:VALID]
    adapter = peft.PeftConfig.from_pretrained(str(experiment))
    if isinstance(adapter, sparsegrad.peft.SparseGradConfig) and adapter.bases and not Path(adapter.bases).exists():
        batches = (batch_of(train, step, config["batch_size"]) for step in range(GRADIENTS))
        moments = collect_moments(model, batches, sorted(adapter.target_modules))
        save_bases(adapter.bases, {kind: hosvd(found) for kind, found in moments.items()})
    if options.bases_only:
        return {}
    model = peft.get_peft_model(model, adapter)
    metrics, seconds = trained(model, train, valid, config)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        size = (Path(folder) / "adapter_model.safetensors").stat().st_size
    trainable, total = model.get_nb_trainable_parameters()
    about = {"created_at": begun, "total_time": time.perf_counter() - started, "experiment_name": name}
    branch = {"peft_branch": None, "peft_worktree_is_dirty": None}
    settings = config | {"model_id": Path(place).name}
    shown = adapter.to_dict() | {"base_model_name_or_path": settings["model_id"]}
    measured = ("accelerator_memory_reserved_avg", "accelerator_memory_max", "accelerator_memory_reserved_99th")
    return {
        "run_info": about | branch | {"train_config": settings, "peft_config": shown, "error_msg": ""},
        "train_info": dict.fromkeys(measured)
        | {"train_time": seconds, "file_size": size}
        | {"num_trainable_params": trainable, "num_total_params": total}
        | {"status": "success", "metrics": metrics},
        "meta_info": machine() | {"dataset_info": {options.data.name: {"rows": len(rows), "sha": None}}},
    }


def pairs(path: Path) -> list[tuple[str, str]]:
    """Questions and answers.

    Raises:
        SystemExit: if the file has neither set of columns.
    """
    read = pyarrow.parquet.read_table if path.suffix == ".parquet" else pyarrow.json.read_json
    table = read(path)
    if {"query", "response"} <= set(table.column_names):
        return list(zip(table["query"].to_pylist(), table["response"].to_pylist(), strict=True))
    if not {"message_id", "parent_id", "text", "role"} <= set(table.column_names):
        sys.exit(f"{path} has columns {', '.join(table.column_names)}; needed are query and response.")
    messages = {row["message_id"]: row for row in table.to_pylist()}
    asked: dict[str, tuple[str, str]] = {}
    for row in messages.values():
        if row["role"] == "assistant" and row["parent_id"] in messages:
            asked.setdefault(row["parent_id"], (messages[row["parent_id"]]["text"], row["text"]))
    return list(asked.values())


def encoded(rows: list[tuple[str, str]], tokenizer: Any, config: dict[str, Any]) -> list[list[int]]:
    """Token ids, in an order drawn by the seed; each ends with the end of the sequence, where it fits."""
    length, template = config["max_seq_length"], config["query_template"]
    texts = [template.format(query=query) + response for query, response in rows]
    ids = [[*found, tokenizer.eos_token_id][:length] for found in tokenizer(texts)["input_ids"]]
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(config["seed"])).tolist()
    return [ids[number] for number in order]


def batch_of(rows: list[list[int]], step: int, size: int) -> Batch:
    """The batch of a step, padded; rows begin anew when all were seen."""
    chosen = [torch.tensor(rows[number % len(rows)]) for number in range(step * size, (step + 1) * size)]
    ids = nn.utils.rnn.pad_sequence(chosen, batch_first=True)
    mask = nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in chosen], batch_first=True)
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def trained(
    model: Any, train: list[list[int]], valid: list[list[int]], config: dict[str, Any]
) -> tuple[list[dict[str, Any]], float]:
    """The metrics in peft's words, and the seconds of training."""
    steps, every, size = config["max_steps"], config["eval_steps"], config["batch_size"]
    optimizer = getattr(torch.optim, config["optimizer_type"])(model.parameters(), **config["optimizer_kwargs"])
    schedule = transformers.get_cosine_schedule_with_warmup(optimizer, int(WARMUP * steps), steps)
    metrics: list[dict[str, Any]] = []
    losses, seconds, tokens, begun = [], [], [], time.perf_counter()
    for step in range(1, steps + 1):
        tic, batch = time.perf_counter(), batch_of(train, step - 1, size)
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config["grad_norm_clip"])
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        tokens.append(int(batch["attention_mask"].sum()))
        seconds.append(time.perf_counter() - tic)
        if step % every == 0:
            tic = time.perf_counter()
            row = {"step": step, "valid accuracy": None, "valid loss": held_out(model, valid, size)}
            row |= {"train loss": sum(losses[-every:]) / every, "train samples": step * size}
            row |= {"train time": sum(seconds[-every:]), "eval time": time.perf_counter() - tic}
            row |= {"tokens / sec": sum(tokens[-every:]) / sum(seconds[-every:])}
            row |= {"mem allocated avg": None, "mem reserved avg": None, "elapsed time": time.perf_counter() - begun}
            metrics.append(row)
    last = {"step": steps, "test accuracy": None, "valid loss": held_out(model, valid, size)}
    last |= {"train loss": sum(losses[-every:]) / min(every, steps), "train samples": steps * size}
    return [*metrics, last | {"train total tokens": sum(tokens), "forgetting": None}], sum(seconds)


@torch.inference_mode()
def held_out(model: Any, rows: list[list[int]], size: int) -> float:
    """Mean loss a token."""
    model.eval()
    total = count = 0.0
    for step in range(len(rows) // size):
        batch = batch_of(rows, step, size)
        number = int((batch["labels"][:, 1:] != -100).sum())
        total, count = total + float(model(**batch).loss) * number, count + number
    model.train()
    return total / count


def machine() -> dict[str, Any]:
    """What it ran on, in peft's words."""
    packages = {"transformers": transformers, "peft": peft, "torch": torch}
    found = {f"{name}-version": module.__version__ for name, module in packages.items()}
    system = {"system": platform.system(), "machine": platform.machine(), "accelerator": "cpu"}
    about = {"model_info": {"sha": None, "created_at": None}, "package_info": found, "system_info": system}
    return about | {"pytorch_info": f"PyTorch {torch.__version__}, {torch.get_num_threads()} threads"}


if __name__ == "__main__":
    main()
