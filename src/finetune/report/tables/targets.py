"""What was asked of a training step on a card, and what its records say was reached: tables of docs/hardware.md."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from finetune.efficiency.rotation_table import HEAD, table_rows
from finetune.report.evidence.step_evidence import BEFORE, EAGER, GRAPHS, Setting, read_steps
from finetune.report.markdown import head, row
from finetune.store import records
from finetune.store.files import write_atomically

Values = list[float | None]

_BOTH = ("roberta_base-sound/cola", "roberta_base-sound/mrpc")
_COLA, _PADDED = _BOTH[:1], ("roberta_base/cola",)
_SHORT, _LONG = "roberta_base-sound/tokens16", "roberta_base-sound/tokens128"
_LLAMA = ("llama2_7b/rows8",)
_LARGEST = [11008, 4096]


@dataclass(frozen=True)
class Found:
    """What the targets are looked up in.

    Attributes:
        steps: Place -> setting.
        counts: Mode -> `waits` and `operations` of an optimizer step of 24 layers, counted on a CPU.
        hosvd: Mode -> seconds of the largest projection's HOSVD.
    """

    steps: Mapping[str, Setting]
    counts: Mapping[str, Mapping[str, Any]]
    hosvd: Mapping[str, float]


@dataclass(frozen=True)
class Target:
    """A row: what is measured, its mode, the limit of each value (or of all), and how the values are looked up.

    Attributes:
        least: Whether the limit is the least that is asked for, not the most.
        form: How a value is written.
    """

    what: str
    mode: str
    limits: tuple[float, ...]
    values: Callable[[Found, str], Values]
    least: bool = False
    form: str = ".3f"

    def asked(self) -> str:
        sign = "at least" if self.least else "at most"
        return f"{sign} {', '.join(f'{limit:g}' for limit in self.limits)}"

    def met(self, values: Values) -> str:
        limits = self.limits * len(values) if len(self.limits) == 1 else self.limits
        pairs = [(value, limit) for value, limit in zip(values, limits, strict=True) if value is not None]
        if not pairs:
            return "not measured"
        if not all(value >= limit if self.least else value <= limit for value, limit in pairs):
            return "no"
        return "yes" if len(pairs) == len(values) else "partly measured"


def _of(places: Sequence[str], variant: str, found: Found, mode: str, *, field: str = "over_full") -> Values:
    """A field of a variant's step in each place."""
    steps = [found.steps[place].step(mode, variant) if place in found.steps else None for place in places]
    return [None if step is None else getattr(step, field) for step in steps]


def _over(
    places: Sequence[str], first: Sequence[str], second: str, found: Found, mode: str, *, field: str = "seconds"
) -> Values:
    """The least of the first variants over the second, in each place."""
    columns = zip(*(_of(places, name, found, mode, field=field) for name in first), strict=True)
    least = [min((value for value in column if value is not None), default=None) for column in columns]
    below = _of(places, second, found, mode, field=field)
    return [None if a is None or b is None else a / b for a, b in zip(least, below, strict=True)]


def _faster(place: str, variants: Sequence[str], found: Found, mode: str) -> Values:
    eager, own = ([_of((place,), name, found, one, field="seconds")[0] for name in variants] for one in (EAGER, mode))
    return [None if a is None or b is None else a / b for a, b in zip(eager, own, strict=True)]


def _count(name: str, found: Found, mode: str) -> Values:
    return [found.counts.get(mode, {}).get(name)]


_PEAKS = (*_BOTH, *_PADDED)
_PEAK = {"field": "peak_over_full"}
TARGETS = (
    Target("waits a step, 24 layers", EAGER, (8,), partial(_count, "waits"), form=".0f"),
    Target("operations of the optimizer's step", EAGER, (400,), partial(_count, "operations"), form=",.0f"),
    Target("folded / full, bf16, CoLA and MRPC", EAGER, (1.15,), partial(_of, _BOTH, "folded")),
    Target(
        "folded / full in graphs, bf16: 512 and 4,096 tokens, CoLA and MRPC",
        GRAPHS,
        (1.5, 1.3, 1.5, 1.3),
        partial(_of, (_SHORT, _LONG, *_BOTH), "folded"),
    ),
    Target("folded / full, fp32, padded to 128", EAGER, (1.25,), partial(_of, _PADDED, "folded")),
    Target("the same, rotation in TF32", EAGER, (1.25,), partial(_of, _PADDED, "folded_tf32")),
    Target("MeProp / full, bf16, CoLA and MRPC", EAGER, (1.1,), partial(_of, _BOTH, "meprop")),
    Target(
        "eager / graphs, CoLA: full, LoRA, truncated",
        GRAPHS,
        (3.0,),
        partial(_faster, _COLA[0], ("full", "lora", "truncated")),
        least=True,
        form=".2f",
    ),
    Target(
        "truncated (the faster) / LoRA in graphs, 4,096 tokens: bf16, fp32",
        GRAPHS,
        (0.75,),
        partial(_over, (_LONG, *_PADDED), ("truncated", "truncated_input"), "lora"),
    ),
    Target("peak, truncated / full: CoLA, MRPC, padded", EAGER, (0.7,), partial(_of, _PEAKS, "truncated", **_PEAK)),
    Target("peak, folded / full: CoLA, MRPC, padded", EAGER, (0.85,), partial(_of, _PEAKS, "folded", **_PEAK)),
    Target("LLaMa-2-7B, 8 rows: folded / full", EAGER, (1.15,), partial(_of, _LLAMA, "folded")),
    Target(
        "LLaMa-2-7B, 8 rows: truncated (inputs) / LoRA",
        EAGER,
        (0.95,),
        partial(_over, _LLAMA, ("truncated_input",), "lora"),
    ),
    Target("the same, peak", EAGER, (0.95,), partial(_over, _LLAMA, ("truncated_input",), "lora", field="peak")),
    Target("seconds of a HOSVD, 11008 x 4096", EAGER, (1.7,), lambda found, mode: [found.hosvd.get(mode)], form=".2f"),
)


def read_found(results: Path) -> Found:
    """What lies below `results/<name>`, and in its folder `before`.

    Raises:
        ValueError: If a file is damaged.
    """
    places = {EAGER: results / "counts.json", BEFORE: results / "before" / "counts.json"}
    counts = {mode: records.read_json(path) for mode, path in places.items() if path.is_file()}
    hosvd = {}
    if (path := results / "before" / "hosvd_7b.json").is_file():
        hosvd[BEFORE] = records.read_record(path)["hosvd_seconds"]
    if (path := results / "hosvd_cost.json").is_file():
        entries = [
            e for case in records.read_record(path)["cases"] if case["shape"] == _LARGEST for e in case["entries"]
        ]
        done = [e for e in entries if e["way"] == "streaming" and e["status"] == "finished"]
        hosvd |= {EAGER: min(e["seconds"]["factors"] for e in done)} if done else {}
    return Found({one.place: one for one in read_steps(results)}, counts, hosvd)


def target_rows(found: Found) -> list[list[str]]:
    """The rows of the table: what, before, asked, reached, whether it was met."""
    rows = []
    for one in TARGETS:
        reached = one.values(found, one.mode)
        before = one.values(found, BEFORE) if one.mode == EAGER else []
        rows.append([one.what, _text(before, one.form), one.asked(), _text(reached, one.form), one.met(reached)])
    return rows


def profile_rows(profile: Mapping[str, Any]) -> list[list[str]]:
    """The rows of a profile of the folded step: its parts, the longest first, each timed alone; then all in one."""
    whole = {"name": "the whole step, timed in one", "ms": profile["step_ms"]}
    parts = [*sorted(profile["parts"], key=lambda part: -part["ms"]), whole]
    return [[part["name"], f"{part['ms']:.2f}", f"{part['ms'] / whole['ms']:.0%}"] for part in parts]


def fill(text: str, results: Path) -> str:
    """A page with its tables anew: below `<!-- targets -->`, and those of other records where they are.

    Raises:
        ValueError: If a file is damaged, or the page has no such line.
    """
    text = _replace(
        text, "targets", ["quantity", "before", "asked", "reached", "met"], target_rows(read_found(results))
    )
    if (path := results / "profile.json").is_file():
        profile = records.read_json(path)
        title = f"folded, {profile['mode']}, {profile['tokens']:,} tokens: part"
        text = _replace(text, "profile", [title, "ms", "share"], profile_rows(profile))
    if (path := results / "rotation.json").is_file():
        text = _replace(text, "rotation", HEAD, table_rows(records.read_record(path)))
    return text


def write_page(page: Path, results: Path) -> None:
    """Put the tables into a page. Raises as `fill`."""
    write_atomically(page, fill(page.read_text(encoding="utf-8"), results))


def _text(values: Values, form: str) -> str:
    return ", ".join("-" if value is None else format(value, form) for value in values) or "-"


def _replace(text: str, mark: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    table = "\n".join([head(header), *map(row, rows)]) + "\n"
    start, found, rest = text.partition(f"<!-- {mark} -->\n")
    if not found:
        raise ValueError(f"the page has no line <!-- {mark} --> for a table: add it.")
    return start + found + table + re.sub(r"\A(\|.*\n)*", "", rest)
