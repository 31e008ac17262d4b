"""Tokenizer and masked-language-model pretraining of the smoke experiment's tiny models."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

MODEL_TYPES = ("bert", "roberta")


def train_tokenizer(lines: list[str], model_type: str, vocab_size: int, max_length: int) -> Any:
    """A fast tokenizer of the model type's own kind: WordPiece for BERT, byte-level BPE for RoBERTa.

    Args:
        lines: text to learn from.
        model_type: ``bert`` or ``roberta``.
        vocab_size: at most.
        max_length: ``model_max_length``.

    Raises:
        ValueError: on another model type.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    if model_type == "bert":
        names = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
        special = list(names.values())
        tokenizer = Tokenizer(models.WordPiece(unk_token=names["unk"]))
        tokenizer.normalizer = normalizers.BertNormalizer()
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        tokenizer.decoder = decoders.WordPiece()
        trainer = trainers.WordPieceTrainer(vocab_size=vocab_size, special_tokens=special, show_progress=False)
        tokenizer.train_from_iterator(lines, trainer)
        ends = [(names[key], tokenizer.token_to_id(names[key])) for key in ("sep", "cls")]
        tokenizer.post_processor = processors.BertProcessing(*ends)
        inputs = ["input_ids", "token_type_ids", "attention_mask"]
    elif model_type == "roberta":
        names = {"cls": "<s>", "pad": "<pad>", "sep": "</s>", "unk": "<unk>", "mask": "<mask>"}
        special = list(names.values())  # ids 0, 1, 2, 3 as in roberta-base
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=special,
            show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        )
        tokenizer.train_from_iterator(lines, trainer)
        tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
        inputs = ["input_ids", "attention_mask"]
    else:
        raise ValueError(f"model_type={model_type!r}; tiny models are made for: {', '.join(MODEL_TYPES)}.")
    tokens = {f"{key}_token": value for key, value in names.items()}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=max_length, model_input_names=inputs, **tokens
    )


def mask_tokens(ids: Tensor, special: Tensor, mask_id: int, vocab_size: int, generator: torch.Generator) -> tuple:
    """BERT's masking: 15 % of the tokens are predicted; of them 80 % are masked, 10 % replaced, 10 % kept.

    Args:
        ids: ``(batch, tokens)``.
        special: ``(batch, tokens)``, true where a token may not be chosen.

    Returns:
        Masked ids, and labels with -100 where nothing is predicted.
    """
    chosen = (torch.rand(ids.shape, generator=generator) < 0.15) & ~special
    labels = torch.where(chosen, ids, -100)
    kind = torch.rand(ids.shape, generator=generator)
    masked = torch.where(chosen & (kind < 0.8), mask_id, ids)
    random_ids = torch.randint(vocab_size, ids.shape, generator=generator)
    return torch.where(chosen & (kind >= 0.8) & (kind < 0.9), random_ids, masked), labels


def pretrain(
    corpus: str | Path,
    folder: str | Path,
    architecture: Mapping[str, Any],
    *,
    vocab_size: int,
    steps: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
    device: torch.device,
    progress_bar: bool = True,
) -> dict[str, float]:
    """Train a tokenizer and a masked language model on a corpus, two lines a row, and save both, whole or not at all.

    Args:
        corpus: text, one sentence a line.
        folder: what ``AutoModelForSequenceClassification.from_pretrained`` loads later; replaced if it exists.
        architecture: keyword arguments of the configuration; ``vocab_size`` is the tokenizer's.

    Returns:
        ``loss`` (mean over the last tenth of the steps), ``steps``, ``seconds``.

    Raises:
        ValueError: if the corpus is missing or the model type is unknown.
    """
    from transformers import AutoConfig, AutoModelForMaskedLM
    from transformers.utils import logging

    logging.disable_progress_bar()  # of writing two files
    corpus, folder = Path(corpus), Path(folder)
    if not corpus.is_file():
        raise ValueError(f"{corpus} does not exist; the generate stage writes it.")
    lines = corpus.read_text().splitlines()
    length = architecture["max_position_embeddings"] - 2
    tokenizer = train_tokenizer(lines, architecture["model_type"], vocab_size, length)
    started = time.monotonic()
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    config = AutoConfig.for_model(**dict(architecture), vocab_size=len(tokenizer))
    model = AutoModelForMaskedLM.from_config(config).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.01, fused=True)
    losses = []
    for step in tqdm(range(steps), desc=f"pretrain {folder.name}", disable=not progress_bar, leave=False):
        picked = torch.randint(len(lines), (2, batch_size), generator=generator).tolist()
        rows = tokenizer(
            [lines[i] for i in picked[0]], [lines[i] for i in picked[1]], truncation=True, padding=True,
            return_tensors="pt", return_special_tokens_mask=True,
        )  # fmt: skip
        special = rows.pop("special_tokens_mask").bool()
        ids, labels = mask_tokens(rows["input_ids"], special, tokenizer.mask_token_id, len(tokenizer), generator)
        rows = {name: value.to(device) for name, value in (rows | {"input_ids": ids}).items()}
        logits = model(**rows).logits
        loss = F.cross_entropy(logits.flatten(0, 1), labels.to(device).flatten(), ignore_index=-100)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * min(1.0, (step + 1) / (0.1 * steps), 2 * (1 - step / steps))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    save_pretrained(model, tokenizer, folder)
    tail = losses[-max(1, steps // 10) :]
    return {"loss": sum(tail) / len(tail), "steps": steps, "seconds": time.monotonic() - started}


def save_pretrained(model: Any, tokenizer: Any, folder: Path) -> None:
    """Save into a sibling folder, then rename: a kill leaves no half-written model."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        os.chmod(temporary, 0o755)
        shutil.rmtree(folder, ignore_errors=True)
        temporary.rename(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
