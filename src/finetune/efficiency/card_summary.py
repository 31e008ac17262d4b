"""What a card said, in a few lines."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from finetune.store import records

SPEED, PEAK, GAIN = "speed / full", "peak / full", "speed / eager"


def summary(output: Path, paths: Sequence[str], left: Mapping[str, str]) -> list[str]:
    """Ratios of all records that are there, and what is left.

    Args:
        output: folder of the records.
        paths: of the records, below it.
        left: part -> why there is no record of it.
    """
    lines, there = [], [path for path in paths if (output / path).is_file()]
    for path in there:
        record = records.read_json(output / path)
        if "variants" in record:
            lines += _variants(path, record, _eager(output, path))
        elif "counts" in record:
            lines.append(f"{path}: {', '.join(f'{number} {name}' for name, number in record['counts'].items())}")
        else:
            lines.append(f"{path}: written")
    lines.append(f"{len(there)} of {len(paths)} records are there")
    return lines + [f"left: {name}: {why}" for name, why in left.items()]


def _variants(path: str, record: Mapping[str, Any], eager: Mapping[str, float]) -> Iterator[str]:
    took = record.get("took_seconds", {})
    lasted = ", ".join(f"{name} {value:.0f} s" for name, value in took.items())
    yield f"{path} ({record['treatment']['precision']}, {record['lengths']['mean_slots']:.0f} tokens; {lasted})"
    done = {entry["name"]: entry for entry in record["variants"] if entry["status"] == "finished"}
    full = done.get("full", {}).get("memory", {}).get("peak_training")
    yield f"  {'':<24}{'steps/s':>9}{SPEED:>14}{'peak, MB':>10}{PEAK:>13}{GAIN if eager else '':>15}"
    for name, entry in done.items():
        peak = entry["memory"]["peak_training"]
        speed = entry.get("ratio_to_full", {}).get("mean")
        gain = entry["steps_per_second"] / eager[name] if name in eager else None
        cells = [(f"{entry['steps_per_second']:.2f}", 9), (_shown(speed), 14), (f"{peak / 1e6:.0f}", 10)]
        cells += [(_shown(peak / full if full else None), 13), (_shown(gain), 15)]
        graphs = f"  {entry['captured_passes']} passes from graphs" if "captured_passes" in entry else ""
        yield f"  {name:<24}{''.join(f'{text:>{width}}' for text, width in cells)}{graphs}".rstrip()
    for entry in record["variants"]:
        if entry["status"] != "finished":
            yield f"  {entry['name']}: {entry['status']}, {entry['reason']}"


def _shown(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _eager(output: Path, path: str) -> dict[str, float]:
    """Steps per second of the record without graphs, of one with them."""
    folder, _, name = path.rpartition("/")
    if not folder.endswith("-graphs"):
        return {}
    other = output / folder.removesuffix("-graphs").removesuffix("-printed") / name
    entries = records.read_json(other)["variants"] if other.is_file() else []
    return {entry["name"]: entry["steps_per_second"] for entry in entries if entry["status"] == "finished"}
