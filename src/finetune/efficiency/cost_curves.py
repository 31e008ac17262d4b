"""Time of one MLP's training step as k, the number of tokens and the width grow, for every method, with the floor.

One base point; each curve changes one thing of it. Variants are interleaved in rounds, as in the efficiency stage.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from finetune.efficiency.layer_variants import (
    FLOOR,
    LAYER_VARIANTS,
    Point,
    layer_step,
    make_bases,
    make_batch,
    make_layer,
    step_flop,
    touched,
    variants_at,
)
from finetune.efficiency.stage import Stage
from finetune.efficiency.timing import ratio, release, summarise, time_variants
from finetune.efficiency.variants import Trainee
from finetune.store import records
from sparsegrad import core_shape

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
PAIRS = (("folded", "rotated_regular"), ("truncated", "lora"), ("truncated_input", "lora"))
"""Whose step times are compared: one form of SparseGrad with the paper's layer, the others with LoRA."""


@dataclass(frozen=True)
class CurveOptions:
    """What to measure and how.

    Attributes:
        base: the point that every curve goes through.
        densities, tokens, widths: values of the three curves; the base's own is added. The inner width grows with the
            hidden one.
        decay: the base is measured once more with this decay, see :class:`finetune.efficiency.layer_variants.Point`.
        rounds: every round runs all variants; every second one in reverse.
        steps: timed steps of a variant in a round.
        warmup_steps: untimed steps of a freshly built variant, and one in every later round.
        clock: ``wall``, or ``cpu``: time that this process ran, for one thread on a machine that others use too. On
            CUDA its events are the clock.
    """

    base: Point
    densities: Sequence[float]
    tokens: Sequence[int]
    widths: Sequence[int]
    decay: float
    rounds: int
    steps: int
    warmup_steps: int
    precision: str = "fp32"
    clock: str = "wall"
    device: str = "auto"
    threads: int | None = None
    seed: int = 0

    def curves(self) -> dict[str, list[Point]]:
        """Points of each curve, in ascending order."""
        base, expand = self.base, self.base.inner / self.base.hidden
        widths = sorted({*self.widths, base.hidden})
        return {
            "k": [replace(base, density=density) for density in sorted({*self.densities, base.density})],
            "tokens": [replace(base, tokens=tokens) for tokens in sorted({*self.tokens, base.tokens})],
            "width": [replace(base, hidden=width, inner=round(width * expand)) for width in widths],
        }


def read_config(config: Mapping[str, Any]) -> CurveOptions:
    """Options of a composed ``conf/cost_curves.yaml``."""
    scale = config["scale"]
    own = {name: config[name] for name in ("precision", "clock", "device", "threads", "seed", "decay")}
    lists = {name: list(scale[name]) for name in ("densities", "tokens", "widths")}
    counts = {name: scale[name] for name in ("rounds", "steps", "warmup_steps")}
    return CurveOptions(base=Point(**scale["base"]), **lists, **counts, **own)


def cost_curves(options: CurveOptions, stage: Stage) -> dict[str, Any]:
    """Measure all points and write the record, or read it where it is finished.

    Raises:
        ValueError: if the device is missing or others use it.
    """
    curves = options.curves()
    decaying = replace(options.base, decay=options.decay)
    points = list(dict.fromkeys([options.base, decaying, *(point for found in curves.values() for point in found)]))

    def measure(device: torch.device, folder: Path) -> dict[str, Any]:
        measured = []
        for point in tqdm(points, desc="points", disable=not stage.progress):
            kept = folder / f"{records.config_hash(asdict(point))}.json"
            if not kept.is_file():
                records.write_json(kept, measure_point(point, options, device))
            measured.append(records.read_json(kept))
        return {
            "treatment": treatment,
            "points": measured,
            "base": points.index(options.base),
            "decaying": points.index(decaying),
            "curves": {name: [points.index(point) for point in found] for name, found in curves.items()},
        }

    treatment = {
        **asdict(options),
        "layer": "down(gelu(up(x))) with biases; forward, backward down to the input, update",
        "optimizer": "AdamW, fused; SparseGrad: lazy Adam for the matrices; the floor trains nothing",
        "bases": "random orthogonal",
        "order": "interleaved: every round runs all variants, every second round in reverse",
    }
    content = {"options": asdict(options), "threads": options.threads or torch.get_num_threads()}
    return stage.run(content, measure, device=options.device, threads=options.threads)


def measure_point(point: Point, options: CurveOptions, device: torch.device) -> dict[str, Any]:
    """Time all variants at one point.

    Returns:
        ``point``, ``k``, ``lora_rank``, ``core``; ``variants``: for each that the point allows its ``step_seconds``
        (median, quartiles), ``rounds`` (median of each), ``over_full`` and ``over_floor`` (step time over theirs in
        the same round), ``flop`` of a step by formula, and ``touched`` rows and columns of each matrix; ``pairs``: see
        :data:`PAIRS`.
    """
    bases = make_bases(point, options.seed, device)
    batch, kept, names = make_batch(point, bases, options.seed + 1), {}, variants_at(point)

    def make(name: str) -> Trainee:
        kept[name] = make_layer(name, point, bases, seed=options.seed)
        return kept[name]

    seconds = time_variants(
        {name: partial(make, name) for name in names},
        [batch] * options.steps,
        rounds=options.rounds,
        warmup_steps=options.warmup_steps,
        device=device,
        together=True,
        step=partial(layer_step, precision=options.precision),
        clock=CLOCKS[options.clock],
    )
    found = {name: _of_variant(name, seconds, step_flop(name, point, device), touched(kept[name])) for name in names}
    pairs = {
        f"{a}_over_{b}": ratio(seconds[a], seconds[b]) | {"flop": found[a]["flop"] / found[b]["flop"]}
        for a, b in PAIRS
        if a in found
    }
    kept.clear()
    release(device)
    return {
        "point": asdict(point),
        "k": point.k,
        "lora_rank": point.lora_rank,
        "core": list(core_shape(point.k, (point.inner, point.hidden))),
        "variants": found,
        "pairs": pairs,
    }


def _of_variant(
    name: str, seconds: Mapping[str, list[list[float]]], flop: float, held: Mapping[str, list[int]]
) -> dict[str, Any]:
    times = summarise(seconds[name])
    return {
        "step_seconds": times["step_seconds"],
        "rounds": [1 / rate for rate in times["rounds"]],
        "over_full": ratio(seconds[name], seconds["full"]),
        "over_floor": ratio(seconds[name], seconds[FLOOR]),
        "flop": flop,
        "touched": dict(held),
    }


def summary(record: Mapping[str, Any]) -> list[str]:
    """The record in a few lines: milliseconds a step, and what stands over what."""
    lines = []
    for name, places in record["curves"].items():
        lines.append(f"{name:>8}" + "".join(f"{variant:>17}" for variant in LAYER_VARIANTS))
        for place in places:
            found = record["points"][place]
            value = {"k": found["k"], "tokens": found["point"]["tokens"], "width": found["point"]["hidden"]}[name]
            lines.append(f"{value:>8}" + "".join(_milliseconds(found["variants"].get(v)) for v in LAYER_VARIANTS))
    for label in ("base", "decaying"):
        found = record["points"][record[label]]
        for pair, value in found["pairs"].items():
            lines.append(f"{label}, {pair}: time {value['mean']:.3f}, operations {value['flop']:.3f}")
    return lines


def _milliseconds(variant: Mapping[str, Any] | None) -> str:
    return f"{'-':>17}" if variant is None else f"{1000 * variant['step_seconds']['median']:>14.2f} ms"
