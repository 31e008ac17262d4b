"""The coordinates that a gradient is looked at in: as it is, and rotated by bases of different origin and age."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from sparsegrad import Basis

SPACES = ("original", "random", "released", "stored", "initial", "refreshed")
"""In the order of records and legends.

``original``: G. ``random``: orthogonal bases that were drawn, not computed. ``initial``: the HOSVD core V G U^T, with a
basis of this run's own weights and head at its first look; ``released``: what the released code computes with that
basis, V G U (D2). ``refreshed``: the core with a basis of the weights as they are now. ``stored``: the core with the
basis of the basis stage, made from the pretrained weights under a head of another seed, which all runs of a task share.
A basis is judged on other batches than it was made from, and all are made from as many.
"""


def rotations(G: Tensor, bases: Mapping[str, Mapping[str, Basis]], kind: str) -> dict[str, Tensor]:
    """A gradient ``(out_features, in_features)`` in every space of :data:`SPACES` that there is a basis for."""
    return {"original": G} | {space: bases[space][kind].rotate(G) for space in SPACES if space in bases}
