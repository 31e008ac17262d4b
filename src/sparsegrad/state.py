"""Lazy Adam's moments of all layers of one size, in one key space: key = layer x entries + place in the layer.

``compact`` holds the entries touched so far, 16 bytes each and some room, sorted; ``dense`` holds two float32 moments
and a mark for every entry, 9 bytes each, and searches nothing. The same steps come out of both.

A step of either kind has fixed shapes and waits for nothing, so that a CUDA graph can hold it. How many keys the
compact kind holds is known on the device alone; the host keeps an upper bound of it, and before a step that might not
find room it asks, and makes more.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

MOMENTS = ("compact", "dense")
PAD = torch.iinfo(torch.int64).max  # a key that is none: of the room behind the last one


class Places(Protocol):
    """Entries that steps have touched."""

    def of(self, layer: int) -> Tensor:
        """Those of one layer: flat indices, int64, ascending."""
        ...


class SortedPlaces:
    """As keys, int64, ascending, behind them room that holds :data:`PAD`."""

    def __init__(self, keys: Tensor, entries: int) -> None:
        self.keys, self.entries = keys, entries

    def of(self, layer: int) -> Tensor:
        start = layer * self.entries
        ends = torch.tensor([start, start + self.entries], device=self.keys.device)
        first, last = torch.searchsorted(self.keys, ends).tolist()
        return self.keys[first:last] - start


class MarkedPlaces:
    """As marks, bool ``(layers, entries)``."""

    def __init__(self, marks: Tensor) -> None:
        self.marks = marks

    def of(self, layer: int) -> Tensor:
        return self.marks[layer].nonzero().flatten()


class Moments:
    """What both kinds answer.

    Args:
        layers, entries: layers, and entries of each.
        most: keys of a step.
        like: a tensor of the moments' dtype and device.
        drop_after: of the compact kind, steps after which an entry that was not selected is forgotten; None keeps all.

    Attributes:
        moved: the entries that steps have moved, also those forgotten since.
        touched: those that have a state.
        replaced: how often the tensors have been replaced, so that a CUDA graph no longer steps what is held.
    """

    moved: Places
    touched: Places

    def __init__(self, layers: int, entries: int, most: int) -> None:
        self.layers, self.entries, self.most, self.replaced = layers, entries, most, 0

    def reserve(self, *, ahead: bool = False) -> None:
        """Make room for a step; where ahead, for several more."""

    def begin(self) -> None:
        """Begin a step, which may take its keys in several parts: entries grow old, and the stale ones are dropped."""

    def take(self, keys: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Put keys, ascending, in their places; returns where their moments lie, and the moments, copies."""
        raise NotImplementedError

    def put(self, at: Tensor, m: Tensor, v: Tensor) -> None:
        """Store the moments that :meth:`take` gave, after their step."""
        raise NotImplementedError

    def nbytes(self) -> int:
        """Of what is held; free room is not counted, since it depends on how a run was cut."""
        raise NotImplementedError

    def export(self, layer: int) -> dict[str, Tensor]:
        """``indices``, ``exp_avg``, ``exp_avg_sq`` of one layer's touched entries, and ``age`` where they grow old."""
        raise NotImplementedError

    def load(self, saved: Mapping[int, Mapping[str, Tensor]]) -> None:
        """Of layers, what :meth:`export` gave; the others start from nothing."""
        raise NotImplementedError


class DenseMoments(Moments):
    """See the module."""

    def __init__(self, layers: int, entries: int, most: int, like: Tensor) -> None:
        super().__init__(layers, entries, most)
        self.exp_avg, self.exp_avg_sq = like.new_zeros(layers, entries), like.new_zeros(layers, entries)
        self.marked = MarkedPlaces(torch.zeros_like(self.exp_avg, dtype=torch.bool))
        self.moved = self.touched = self.marked

    def take(self, keys: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        self.marked.marks.view(-1)[keys] = True
        return keys, self.exp_avg.view(-1)[keys], self.exp_avg_sq.view(-1)[keys]

    def put(self, at: Tensor, m: Tensor, v: Tensor) -> None:
        self.exp_avg.view(-1)[at], self.exp_avg_sq.view(-1)[at] = m, v

    def nbytes(self) -> int:
        return self.exp_avg.nbytes + self.exp_avg_sq.nbytes + self.marked.marks.nbytes

    def export(self, layer: int) -> dict[str, Tensor]:
        at = self.touched.of(layer)
        return {"indices": at, "exp_avg": self.exp_avg[layer][at], "exp_avg_sq": self.exp_avg_sq[layer][at]}

    def load(self, saved: Mapping[int, Mapping[str, Tensor]]) -> None:
        for tensor in (self.exp_avg, self.exp_avg_sq, self.marked.marks):
            tensor.zero_()
        for layer, own in saved.items():
            at = own["indices"].to(self.exp_avg.device)
            self.marked.marks[layer][at] = True
            self.exp_avg[layer][at] = own["exp_avg"].to(self.exp_avg)
            self.exp_avg_sq[layer][at] = own["exp_avg_sq"].to(self.exp_avg)


class CompactMoments(Moments):
    """See the module."""

    def __init__(self, layers: int, entries: int, most: int, like: Tensor, drop_after: int | None = None) -> None:
        super().__init__(layers, entries, most)
        self.drop_after, self.steps = drop_after, 0
        self.sorted = SortedPlaces(like.new_full((1,), PAD, dtype=torch.int64), entries)
        self.touched = self.moved = self.sorted
        self.moments = like.new_zeros(2, 1)
        self.ages: Tensor | None = None  # the clock at an entry's latest step, int32
        if drop_after is not None:
            self.ages = torch.zeros(1, dtype=torch.int32, device=like.device)
            self.moved = MarkedPlaces(torch.zeros(layers, entries, dtype=torch.bool, device=like.device))
        self.count, self.bound = torch.zeros((), dtype=torch.int64, device=like.device), 0
        self.clock = torch.zeros((), dtype=torch.int32, device=like.device)

    def reserve(self, *, ahead: bool = False) -> None:
        self.steps += 1
        # What was loaded is gone by then too; an eager step beside graphs reserves twice.
        if self.drop_after is not None and self.steps > 2 * self.drop_after:
            self.bound = min(self.bound, self.drop_after * self.most)
        if self._needed() >= len(self.sorted.keys):  # one place stays free
            self.bound = int(self.count)  # the one wait, and not of every step
            self._widen(ahead)
        self.bound = self._needed()

    def _needed(self) -> int:
        """Keys after the next step, at most."""
        return min(self.bound + self.most, self.layers * self.entries)

    def _widen(self, ahead: bool) -> None:
        """Make more room, of one of a few sizes: it depends on how many keys there are, not on how they came."""
        room = self.most + 1  # an only step needs no more
        while room <= self._needed():
            room += max(8 * self.most, room) if ahead else max(2 * self.most, room // 4)
        more = min(room, self.layers * self.entries + 1) - len(self.sorted.keys)
        if more <= 0:
            return
        self.replaced += 1
        self.sorted.keys = torch.cat((self.sorted.keys, self.sorted.keys.new_full((more,), PAD)))
        self.moments = torch.nn.functional.pad(self.moments, (0, more))
        if self.ages is not None:
            self.ages = torch.nn.functional.pad(self.ages, (0, more))

    def begin(self) -> None:
        self.clock += 1
        if self.drop_after is not None:
            self._drop(self.drop_after)

    def take(self, keys: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        at = self._merge(keys)
        if self.ages is not None:
            self.ages.index_put_((at,), self.clock)
        if isinstance(self.moved, MarkedPlaces):
            self.moved.marks.view(-1)[keys] = True
        m, v = self.moments[:, at]
        return at, m, v

    def put(self, at: Tensor, m: Tensor, v: Tensor) -> None:
        self.moments[0, at], self.moments[1, at] = m, v

    def nbytes(self) -> int:
        marks = self.moved.marks.nbytes if isinstance(self.moved, MarkedPlaces) else 0
        aged = 0 if self.ages is None else self.ages.itemsize
        return int(self.count) * (self.sorted.keys.itemsize + 2 * self.moments.itemsize + aged) + marks

    def export(self, layer: int) -> dict[str, Tensor]:
        start = layer * self.entries
        ends = torch.tensor([start, start + self.entries], device=self.count.device)
        first, last = torch.searchsorted(self.sorted.keys, ends).tolist()
        m, v = self.moments[:, first:last]
        found = {"indices": self.sorted.keys[first:last] - start, "exp_avg": m, "exp_avg_sq": v}
        return found if self.ages is None else found | {"age": self.clock - self.ages[first:last]}

    def load(self, saved: Mapping[int, Mapping[str, Tensor]]) -> None:
        layers = sorted(saved)
        self.replaced += 1
        device, room = self.count.device, torch.tensor([PAD])
        keys = [saved[layer]["indices"].cpu() + layer * self.entries for layer in layers]
        self.sorted.keys = torch.cat([*keys, room]).to(device)
        self.bound = len(self.sorted.keys) - 1
        self.count.fill_(self.bound)
        both = [torch.stack((saved[at]["exp_avg"], saved[at]["exp_avg_sq"])).cpu() for at in layers]
        self.moments = torch.cat([*both, torch.zeros(2, 1)], dim=1).to(self.moments)
        if self.ages is not None:  # a state that was kept without ages: all as if selected in the latest step
            none = [torch.zeros(len(saved[at]["indices"]), dtype=torch.int32) for at in layers]
            ages = [saved[at].get("age", zero).cpu() for at, zero in zip(layers, none, strict=True)]
            self.ages = torch.cat([int(self.clock) - age for age in ages] + [torch.zeros(1)]).to(self.ages)
            self.steps = 0
        if isinstance(self.moved, MarkedPlaces):
            self.moved.marks.zero_()
            self.moved.marks.view(-1)[self.sorted.keys[:-1]] = True

    def _merge(self, new: Tensor) -> Tensor:
        """Put keys in their places among those held; returns the places."""
        held = self.sorted.keys
        below = torch.searchsorted(held, new)
        known = held[below] == new  # the last place is free, so none lies beyond
        added = torch.cat((self.count.new_zeros(1), (~known).cumsum(0)))  # before each of the new keys, and in all
        at = below + added[:-1]
        moved_to = torch.arange(len(held), device=held.device) + added[torch.searchsorted(new, held)]
        moved_to.clamp_(max=len(held) - 1)  # free places may lie on one another
        self._move(moved_to, held, self.moments, self.ages)
        held.index_copy_(0, at, new)
        self.count += added[-1]
        return at

    def _drop(self, after: int) -> None:
        """Forget entries whose latest step lies too far back; the step that begins counts already."""
        assert self.ages is not None
        held = self.sorted.keys
        fresh = (self.ages >= self.clock - after) & (held != PAD)
        order = fresh.cumsum(0)
        at = torch.where(fresh, order - 1, len(held) - 1)
        kept = torch.where(fresh, held, PAD), torch.where(fresh, self.moments, 0), torch.where(fresh, self.ages, 0)
        self._move(at, *kept)
        self.count.copy_(order[-1])

    def _move(self, at: Tensor, keys: Tensor, moments: Tensor, ages: Tensor | None) -> None:
        """Hold these in other places, in the tensors that there are: a graph may hold them too."""
        self.sorted.keys.copy_(torch.full_like(keys, PAD).index_copy_(0, at, keys))
        self.moments.copy_(torch.zeros_like(moments).index_copy_(1, at, moments))
        if self.ages is not None and ages is not None:
            self.ages.copy_(torch.zeros_like(ages).index_copy_(0, at, ages))
