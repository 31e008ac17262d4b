"""Tokenizer and language-model pretraining of the smoke experiment's tiny LLaMA."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tqdm import tqdm

from finetune.data.chat import ChatTemplate
from finetune.data.oasst import IGNORED, PackedSplit, pack
from finetune.models.pretraining import save_pretrained

SPECIAL = ("<unk>", "<s>", "</s>")  # ids 0, 1, 2, as LLaMA's


def train_llama_tokenizer(texts: Iterable[str], vocab_size: int, max_length: int) -> Any:
    """A fast tokenizer of LLaMA's kind: byte-pair encoding, ``▁`` before words, bytes for unknown characters.

    Ids are LLaMA's: 0 ``<unk>``, 1 ``<s>``, 2 ``</s>``, 3 to 258 the bytes. It puts ``<s>`` before a text and parses
    ``<s>`` and ``</s>`` inside it. Batches are padded with ``</s>``, on the left.

    Args:
        texts: to learn from, without special tokens.
        vocab_size: at most.
        max_length: ``model_max_length``.

    Raises:
        ValueError: if the vocabulary has no room for the bytes and the characters of the texts.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    fixed = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))]
    texts = list(texts)
    alphabet = set("".join(texts)) - {"\n"}  # new lines are bytes, as LLaMA's
    if vocab_size < len(fixed) + len(alphabet) + 1:
        raise ValueError(
            f"vocab_size={vocab_size}; {len(fixed)} special tokens and bytes and {len(alphabet) + 1} characters need "
            "more."
        )
    words = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = words
    trainer = trainers.BpeTrainer(vocab_size=vocab_size - len(fixed), show_progress=False)
    learner.train_from_iterator((line for text in texts for line in text.split("\n")), trainer)
    learned = json.loads(learner.to_str())["model"]
    names = [*fixed, *sorted(learned["vocab"], key=learned["vocab"].get)]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={name: number for number, name in enumerate(names)},
            merges=[tuple(merge) for merge in learned["merges"]],
            unk_token=SPECIAL[0],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    tokenizer.pre_tokenizer = words
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=max_length, padding_side="left",
        unk_token=SPECIAL[0], bos_token=SPECIAL[1], eos_token=SPECIAL[2], pad_token=SPECIAL[2],
        model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip


def pretrain_causal(
    dialogues: str | Path,
    folder: str | Path,
    architecture: Mapping[str, Any],
    template: ChatTemplate,
    *,
    vocab_size: int,
    length: int,
    steps: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
    device: torch.device,
    progress_bar: bool = True,
) -> dict[str, float]:
    """Train a tokenizer and a language model on dialogues, packed, and save both, whole or not at all.

    Answers and their ends are learned; questions are drawn at random, nothing in them can be predicted.

    Args:
        dialogues: text, one dialogue a line, its turns separated by tabs.
        folder: what ``AutoModelForCausalLM.from_pretrained`` loads later; replaced if it exists.
        architecture: keyword arguments of the configuration; ``vocab_size`` is the tokenizer's.
        template: what the model is asked in later.
        length: tokens of a row.

    Returns:
        ``loss`` (of an answer's token, mean over the last tenth of the steps), ``tokens`` in the text, ``steps``,
        ``seconds``.

    Raises:
        ValueError: if the text is missing, the model type is not ``llama``, or rows are longer than the model's window.
    """
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()  # of writing two files
    if architecture["model_type"] != "llama":
        raise ValueError(f"model_type={architecture['model_type']!r}; tiny decoders are made for: llama.")
    window = architecture["max_position_embeddings"]
    if length > window:
        raise ValueError(f"length={length}; the model has {window} positions: choose at most so many.")
    turns = _read_dialogues(Path(dialogues))
    started = time.monotonic()
    tokenizer = train_llama_tokenizer(_plain(turns, template), vocab_size, window)
    rows = _packed(turns, template, tokenizer, length)
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": tokenizer.pad_token_id}
    config = AutoConfig.for_model(**dict(architecture), **ids, vocab_size=len(tokenizer))
    model = AutoModelForCausalLM.from_config(config).to(device).train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True
    )
    losses = []
    for step in tqdm(range(steps), desc=f"pretrain {Path(folder).name}", disable=not progress_bar, leave=False):
        batch = rows.batch(torch.randint(len(rows), (batch_size,), generator=generator).tolist())
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * min(1.0, (step + 1) / (0.05 * steps), 2 * (1 - step / steps))
        logits = model(input_ids=batch["input_ids"].to(device)).logits
        labels = batch["labels"][:, 1:].to(device)
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels.flatten(), ignore_index=IGNORED)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    save_pretrained(model, tokenizer, Path(folder))
    tail = losses[-max(1, steps // 10) :]
    facts = {"loss": sum(tail) / len(tail), "tokens": rows.input_ids.numel()}
    return facts | {"steps": steps, "seconds": time.monotonic() - started}


def _read_dialogues(path: Path) -> list[list[str]]:
    if not path.is_file():
        raise ValueError(f"{path} does not exist; the generate_chat stage writes it.")
    turns = [line.split("\t") for line in path.read_text(encoding="utf-8").splitlines() if line]
    if odd := [number for number, line in enumerate(turns, 1) if len(line) % 2 or not all(line)]:
        raise ValueError(f"{path}, line {odd[0]}: needs turns of user and assistant in pairs, separated by tabs.")
    return turns


def _plain(turns: Iterable[list[str]], template: ChatTemplate) -> Iterable[str]:
    """The text that a vocabulary is learned from: rendered, a line wherever a special token stands."""
    for dialogue in turns:
        text = template.prompt(dialogue)
        for token in SPECIAL:
            text = text.replace(token, "\n")
        yield text


def _packed(turns: Iterable[list[str]], template: ChatTemplate, tokenizer: Any, length: int) -> PackedSplit:
    """Rows of one dialogue after the other; answers and their ends are learned."""
    encoded = [template.encode(tokenizer, dialogue) for dialogue in turns]
    ids = torch.tensor([token for dialogue in encoded for token in dialogue.input_ids], dtype=torch.int64)
    trained = torch.tensor([flag for dialogue in encoded for flag in dialogue.trained], dtype=torch.bool)
    packed = pack(ids, trained, length)
    if not len(packed):
        raise ValueError(f"the dialogues have {len(ids)} tokens, too few for one row of {length}; give more.")
    return packed
