"""Language-model pretraining of the smoke experiment's tiny models: encoders and decoders."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, DataCollatorForLanguageModeling

from finetune.data.chat import ChatTemplate
from finetune.data.oasst import PackedSplit, pack
from finetune.models.load import no_file_bars
from finetune.models.tokenizers import SPECIAL, train_llama_tokenizer, train_tokenizer
from finetune.store.files import folder_atomically, read_text


@dataclass(frozen=True)
class Pretraining:
    """How a tiny model is pretrained.

    Attributes:
        vocab_size: of the tokenizer, at most.
        steps, batch_size, learning_rate: of AdamW; the rate warms up over ``warmup`` of the steps and falls to zero
            over their second half.
        seed: of weights and rows.
        beta2: AdamW's.
    """

    vocab_size: int
    steps: int
    batch_size: int
    learning_rate: float
    seed: int
    device: torch.device
    progress_bar: bool = True
    warmup: float = 0.1
    beta2: float = 0.999


def pretrain(
    corpus: str | Path, folder: str | Path, architecture: Mapping[str, Any], options: Pretraining
) -> dict[str, float]:
    """Train a tokenizer and a masked language model on a corpus, two lines a row, and save both, whole or not at all.

    Args:
        corpus: text, one sentence a line.
        folder: what ``AutoModelForSequenceClassification.from_pretrained`` loads later; replaced if it exists.
        architecture: keyword arguments of the configuration; ``vocab_size`` is the tokenizer's.

    Returns:
        ``loss`` (mean over the last tenth of the steps), ``steps``, ``seconds``.

    Raises:
        ValueError: if the corpus is missing or another than was written, or the model type is unknown.
    """
    folder = Path(folder)
    lines = read_text(corpus).splitlines()
    length = architecture["max_position_embeddings"] - 2
    tokenizer = train_tokenizer(lines, architecture["model_type"], options.vocab_size, length)
    torch.manual_seed(options.seed)
    generator = torch.Generator().manual_seed(options.seed)
    model = AutoModelForMaskedLM.from_config(_configured(architecture, vocab_size=len(tokenizer)))
    masking = DataCollatorForLanguageModeling(tokenizer)  # BERT's: 15 % are predicted, most of them masked

    def batch() -> dict[str, Tensor]:
        picked = torch.randint(len(lines), (2, options.batch_size), generator=generator).tolist()
        rows = tokenizer(
            [lines[i] for i in picked[0]], [lines[i] for i in picked[1]], truncation=True, padding=True,
            return_tensors="pt", return_special_tokens_mask=True,
        )  # fmt: skip
        special = rows.pop("special_tokens_mask").bool()
        ids, labels = masking.torch_mask_tokens(rows["input_ids"], special)
        return {**rows, "input_ids": ids, "labels": labels}

    return _train_and_save(model, tokenizer, batch, folder, options)


def pretrain_causal(
    dialogues: str | Path,
    folder: str | Path,
    architecture: Mapping[str, Any],
    template: ChatTemplate,
    length: int,
    options: Pretraining,
) -> dict[str, float]:
    """As :func:`pretrain`, a causal language model on dialogues, packed.

    Answers and their ends are learned; questions are drawn at random, nothing in them can be predicted.

    Args:
        dialogues: text, one dialogue a line, its turns separated by tabs.
        template: what the model is asked in later.
        length: tokens of a row.

    Raises:
        ValueError: also if rows are longer than the model's window, or the text too short for one.
    """
    window = architecture["max_position_embeddings"]
    if length > window:
        raise ValueError(f"length={length}; the model has {window} positions: choose at most so many.")
    turns = _read_dialogues(Path(dialogues))
    tokenizer = train_llama_tokenizer(_plain(turns, template), options.vocab_size, window)
    rows = _packed(turns, template, tokenizer, length)
    torch.manual_seed(options.seed)
    generator = torch.Generator().manual_seed(options.seed)
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": tokenizer.pad_token_id}
    config = _configured(architecture, **ids, vocab_size=len(tokenizer))

    def batch() -> dict[str, Tensor]:
        return rows.batch(torch.randint(len(rows), (options.batch_size,), generator=generator).tolist())

    return _train_and_save(AutoModelForCausalLM.from_config(config), tokenizer, batch, Path(folder), options)


def _configured(architecture: Mapping[str, Any], **learned: Any) -> Any:
    if twice := sorted(learned.keys() & architecture.keys()):
        raise ValueError(
            f"model.architecture gives {', '.join(twice)}, which pretraining takes from the tokenizer that it learns: "
            "leave it out; a model of the hub is fetched, not pretrained."
        )
    return AutoConfig.for_model(**architecture, **learned)


def _train_and_save(
    model: Any, tokenizer: Any, batch: Callable[[], dict[str, Tensor]], folder: Path, options: Pretraining
) -> dict[str, float]:
    started, steps, losses = time.monotonic(), options.steps, []
    model = model.to(options.device).train()
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, options.beta2), weight_decay=0.01, fused=True)
    for step in tqdm(range(steps), desc=f"pretrain {folder.name}", disable=not options.progress_bar, leave=False):
        loss = model(**{name: value.to(options.device) for name, value in batch().items()}).loss
        rate = min(1.0, (step + 1) / (options.warmup * steps), 2 * (1 - step / steps))
        for group in optimizer.param_groups:
            group["lr"] = options.learning_rate * rate
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    with no_file_bars(), folder_atomically(folder) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
    tail = losses[-max(1, steps // 10) :]
    return {"loss": sum(tail) / len(tail), "steps": steps, "seconds": time.monotonic() - started}


def _read_dialogues(path: Path) -> list[list[str]]:
    turns = [line.split("\t") for line in read_text(path).splitlines() if line]
    if odd := [number for number, line in enumerate(turns, 1) if len(line) % 2 or not all(line)]:
        raise ValueError(f"{path}, line {odd[0]}: needs turns of user and assistant in pairs, separated by tabs.")
    return turns


def _plain(turns: Iterable[list[str]], template: ChatTemplate) -> Iterable[str]:
    """The text that a vocabulary is learned from: rendered, a line wherever a special token stands."""
    special = re.compile("|".join(SPECIAL))
    return [special.sub("\n", template.prompt(dialogue)) for dialogue in turns]


def _packed(turns: Iterable[list[str]], template: ChatTemplate, tokenizer: Any, length: int) -> PackedSplit:
    """Rows of one dialogue after the other; answers and their ends are learned."""
    encoded = [template.encode(tokenizer, dialogue) for dialogue in turns]
    ids = torch.tensor([token for dialogue in encoded for token in dialogue.input_ids], dtype=torch.int64)
    trained = torch.tensor([flag for dialogue in encoded for flag in dialogue.trained], dtype=torch.bool)
    packed = pack(ids, trained, length)
    if not len(packed):
        raise ValueError(f"the dialogues have {len(ids)} tokens, too few for one row of {length}; give more.")
    return packed
