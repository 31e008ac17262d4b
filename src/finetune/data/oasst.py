"""OpenAssistant messages to threads to packed examples.

:mod:`finetune.data.threads` reads the dialogues, a template makes them text; they are concatenated and cut into blocks
of equal length, as llama-recipes' ``Concatenator`` packs them (https://github.com/meta-llama/llama-cookbook,
``data/concatenator.py``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from finetune.data.chat import ChatTemplate, escape, special_tokens
from finetune.data.examples import content_of
from finetune.data.threads import Thread, read_messages, threads_of

IGNORED = -100


@dataclass
class PackedSplit:
    """Blocks of equal length.

    Attributes:
        input_ids: ``(n, length)``, int64.
        labels: ``(n, length)``, int64; the ids where something is learned, -100 elsewhere. Not shifted.
        sha256: of the files that they came from, or the hub's name and revision.
        facts: what was read, used and dropped, and why.
    """

    input_ids: Tensor
    labels: Tensor
    sha256: str
    facts: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def content(self) -> str:
        """sha256 of what a model gets to see: token ids and labels."""
        return self._content

    @cached_property
    def _content(self) -> str:
        return content_of(self.input_ids, self.labels)

    @property
    def longest(self) -> int:
        """Tokens of a row."""
        return self.input_ids.shape[1]

    @property
    def largest_id(self) -> int:
        """The largest token id."""
        return int(self.input_ids.max())

    def targets(self, indices: Sequence[int]) -> int:
        """Predicted tokens in these rows; the first token of a row is never predicted."""
        return int((self.labels[list(indices), 1:] != IGNORED).sum())

    def batch(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """Rows as ``input_ids``, ``attention_mask`` and ``labels``, ``(batch, length)`` each."""
        ids = self.input_ids[list(indices)]
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": self.labels[list(indices)]}


def load_chat(
    data: Mapping[str, Any],
    tokenizer: Any,
    template: ChatTemplate,
    *,
    length: int,
    loss_on: str,
    limit: int | None = None,
    progress_bar: bool = False,
) -> dict[str, PackedSplit]:
    """Read, check, tokenise and pack the splits ``train`` and ``validation``.

    Args:
        data: the ``chat`` group: name, root, folder, source, revision, languages, threads, deleted, review,
            validation_share.
        tokenizer: a fast Hugging Face tokenizer.
        length: tokens of a block.
        loss_on: ``answers`` (and their ends) or ``all`` tokens.
        limit: at most so many training blocks, the first ones.

    Raises:
        ValueError: on missing files or columns, trees with repeated messages, unknown roles or
            cycles, a tree in both splits, or too little text for one block.
    """
    splits = {}
    for name, source in read_messages(data).items():
        threads, facts = threads_of(source.rows, data)
        if not threads:
            raise ValueError(f"{data['name']}: the {name} split has no thread with an answer; counted: {facts}.")
        blocks = limit if name == "train" else None
        split = _tokenise(threads, tokenizer, template, length, loss_on, blocks, progress_bar)
        if not len(split):
            raise ValueError(
                f"{data['name']}: the {name} split has {split.facts['dropped_tokens']} tokens, too few for one block "
                f"of {length} with something to learn; choose a smaller length or more threads."
            )
        split.sha256, split.facts = source.sha256, facts | split.facts
        splits[name] = split
    return splits


def _tokenise(
    threads: Sequence[Thread],
    tokenizer: Any,
    template: ChatTemplate,
    length: int,
    loss_on: str,
    limit: int | None,
    progress_bar: bool,
) -> PackedSplit:
    marks = template.tags | special_tokens(tokenizer)
    ids, trained, total, escaped = [], [], 0, 0
    for turns in tqdm(threads, desc="tokenise", disable=not progress_bar, leave=False):
        if limit is not None and total >= limit * length:
            break
        encoded = template.encode(tokenizer, turns)
        ids.append(torch.tensor(encoded.input_ids))
        trained.append(torch.tensor(encoded.trained) | (loss_on == "all"))
        total += len(ids[-1])
        escaped += sum(escape(turn, marks) != turn for turn in turns)
    split = pack(torch.cat(ids), torch.cat(trained), length, limit)
    split.facts |= {"used_threads": len(ids), "escaped_messages": escaped}
    return split


def pack(ids: Tensor, trained: Tensor, length: int, limit: int | None = None) -> PackedSplit:
    """Cut a stream of tokens into blocks; the tail and blocks without anything to learn are dropped and counted.

    A block in which no token is predicted would have a mean loss of 0/0.

    Args:
        ids, trained: ``(tokens,)``, int64 and bool.
        length: tokens of a block.
        limit: at most so many blocks, the first ones.
    """
    blocks = len(ids) // length
    rows = ids[: blocks * length].view(blocks, length)
    mask = trained[: blocks * length].view(blocks, length)
    kept = mask[:, 1:].any(1)
    rows, mask = rows[kept][:limit], mask[kept][:limit]
    labels = torch.where(mask, rows, IGNORED)
    facts = {
        "rows": len(rows),
        "tokens": rows.numel(),
        "targets": int((labels[:, 1:] != IGNORED).sum()),
        "dropped_tokens": len(ids) - rows.numel(),
        "blocks_without_targets": int((~kept).sum()),
    }
    return PackedSplit(rows, labels, "", facts)
