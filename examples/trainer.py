"""Fine-tune a classifier with SparseGrad in the Hugging Face Trainer: checkpoints, and resume by itself.

    python examples/trainer.py --output runs/example

Killed and started again, it goes on from its last checkpoint, and ends with the bits of a run that nobody killed.
Without arguments it trains a tiny BERT on generated rows. With --model and --data it trains a checkpoint's folder on
train.jsonl and validation.jsonl, lines of {"text": ..., "label": 0}. Needs torch, transformers, accelerate, sparsegrad.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.torch import load_model
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

import sparsegrad


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder of checkpoints, adapter and merged model")
    parser.add_argument("--model", help="folder of a checkpoint with its tokenizer")
    parser.add_argument("--data", type=Path, help="folder with train.jsonl and validation.jsonl")
    parser.add_argument("--form", default="folded", choices=["folded", "rotated", "truncated"])
    parser.add_argument("--density", type=float, default=0.01, help="share of each matrix that a step moves")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--save-steps", type=int, default=50, help="steps from checkpoint to checkpoint")
    given = parser.parse_args()
    if (given.model is None) != (given.data is None):
        parser.error("give --model and --data, or neither")
    return given


def generated(rows, seed):
    """Sequences of numbers from 1 to 199; the label says whether most of them are above 100."""
    tokens = torch.randint(1, 200, (rows, 15), generator=torch.Generator().manual_seed(seed))
    labels = (tokens > 100).sum(1) > 7
    return [
        {"input_ids": ids.tolist(), "attention_mask": [1] * len(ids), "labels": int(label)}
        for ids, label in zip(tokens, labels, strict=True)
    ]


def read(path, tokenizer):
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [tokenizer(row["text"], truncation=True, max_length=128) | {"labels": row["label"]} for row in rows]


def model_and_rows(given):
    """A model, its rows for training and validation, and its tokenizer (None for generated rows)."""
    transformers.set_seed(0)
    if given.model is None:
        sizes = {"vocab_size": 200, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
        config = AutoConfig.for_model("bert", intermediate_size=256, max_position_embeddings=16, **sizes)
        return AutoModelForSequenceClassification.from_config(config), generated(1024, 0), generated(256, 1), None
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    train, validation = (read(given.data / f"{split}.jsonl", tokenizer) for split in ("train", "validation"))
    labels = 1 + max(row["labels"] for row in train + validation)
    model = AutoModelForSequenceClassification.from_pretrained(given.model, num_labels=labels)
    return model, train, validation, tokenizer


def bases_of(model, rows, collate, targets, path):
    """From the gradients of 30 batches before the first step; a run that goes on reads them."""
    if not path.exists():
        batches = [collate(rows[start : start + 8]) for start in range(0, min(len(rows), 240), 8)]
        moments = sparsegrad.collect_moments(model, batches, targets)
        sparsegrad.save_bases(path, {kind: sparsegrad.hosvd(found) for kind, found in moments.items()})
    return sparsegrad.load_bases(path)[0]


def accuracy(prediction):
    return {"accuracy": float(np.mean(prediction.predictions.argmax(-1) == prediction.label_ids))}


def main():
    given = arguments()
    transformers.utils.logging.disable_progress_bar()
    model, train, validation, tokenizer = model_and_rows(given)
    collate = (
        transformers.default_data_collator if tokenizer is None else transformers.DataCollatorWithPadding(tokenizer)
    )
    bases = bases_of(model, train, collate, "all-mlp", given.output / "bases.safetensors")
    shapes = {target.kind: target.shape for target in sparsegrad.find_targets(model, "all-mlp")}
    k = {kind: sparsegrad.entries_for_density(given.density, shape) for kind, shape in shapes.items()}
    sparsegrad.sparsify(model, bases, k, "all-mlp", form=given.form)
    optimizer = sparsegrad.SparseGradAdamW(sparsegrad.param_groups(model), lr=given.learning_rate)
    trainer = Trainer(
        model,
        TrainingArguments(
            str(given.output),
            max_steps=given.steps,
            per_device_train_batch_size=16,
            save_steps=given.save_steps,
            save_total_limit=2,
            logging_strategy="no",
            disable_tqdm=True,
            report_to=[],
            dataloader_pin_memory=torch.cuda.is_available(),
        ),
        train_dataset=train,
        eval_dataset=validation,
        data_collator=collate,
        compute_metrics=accuracy,
        optimizers=(optimizer, None),  # the Trainer makes the schedule
    )
    trainer.remove_callback(transformers.PrinterCallback)
    last = get_last_checkpoint(str(given.output))
    if last == str(given.output / f"checkpoint-{given.steps}"):  # killed after it: the Trainer would take one step more
        load_model(model, Path(last) / "model.safetensors")
    else:
        trainer.train(resume_from_checkpoint=last)
    metrics = trainer.evaluate()
    sparsegrad.save_adapter(given.output / "adapter.safetensors", model)
    sparsegrad.merge(model).save_pretrained(given.output / "merged")
    if tokenizer is not None:
        tokenizer.save_pretrained(given.output / "merged")
    size = (given.output / "adapter.safetensors").stat().st_size
    print(f"accuracy {metrics['eval_accuracy']:.3f} after {given.steps} steps; {size:,} bytes of adapter")


if __name__ == "__main__":
    main()
