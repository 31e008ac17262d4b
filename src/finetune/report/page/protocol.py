"""The protocol on the page: each choice with its source, and what the records say was really done."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from finetune.published import discrepancies
from finetune.report.page.blocks import Grid, Text
from finetune.report.page.inputs import PageInputs

AS_RUN = {"train": "GLUE", "llama": "decoder"}
"""Kind of a record -> its name in the title of its treatment."""


class Choice(NamedTuple):
    """A choice of a protocol: its key (`preliminary.steps` inside another), its value for readers, its source or ""."""

    key: str
    value: str
    source: str


def read_choices(name: str, protocols: Mapping[str, Mapping[str, Any]]) -> list[Choice]:
    """A protocol's choices with their sources, in the order of its file.

    Args:
        name: The protocol.
        protocols: Protocol -> content of its file; `sources` holds a text a choice, or `like`, whose sources hold too.

    Raises:
        ValueError: If the protocol is not among them.
    """
    if name not in protocols:
        raise ValueError(f"protocol {name!r}; there are {', '.join(protocols)}.")
    own = protocols[name].get("sources", {})
    sources = protocols[own["like"]]["sources"] | own if "like" in own else own
    choices = []
    for key, value in protocols[name].items():
        source = sources.get(key, "")
        if key in ("name", "sources"):
            continue
        if isinstance(source, Mapping):
            choices += [Choice(f"{key}.{part}", _text(one), source.get(part, "")) for part, one in value.items()]
        else:
            choices.append(Choice(key, _text(value), source))
    return choices


def choices_grid(title: str, name: str, protocols: Mapping[str, Mapping[str, Any]]) -> Grid:
    """The choices of the protocol `name` beside the others'; `title` says of what.

    Raises:
        ValueError: As `read_choices`.
    """
    others = {other: {c.key: c.value for c in read_choices(other, protocols)} for other in protocols if other != name}
    rows = [
        [
            key.replace("_", " ").replace(".", ": "),
            Text(value, "strong"),
            *(_beside(values.get(key), value) for values in others.values()),
            source or Text("none given", "none"),
        ]
        for key, value, source in read_choices(name, protocols)
    ]
    return Grid(f"{title}: protocol {name}", ["choice", f"{name} (used)", *others, "source"], rows)


def bearing(name: str) -> list[tuple[str, str]]:
    """The rows (row, topic) of the differences that bear on a table or figure of the paper, such as `table_09`."""
    kind, _, number = name.rpartition("_")
    rows = [row for row in discrepancies() if number.lstrip("0") in row.get(f"{kind}s", "").split()]
    return [(row["row"], row["topic"]) for row in rows]


def as_run(inputs: PageInputs) -> Iterator[Grid]:
    """What the records say was really used: a grid a kind of run, a line for each distinct treatment and its runs."""
    for kind, title in AS_RUN.items():
        found: dict[tuple[tuple[str, str], ...], dict[str, set[str]]] = {}
        for one in inputs.of_kind(kind):
            if treatment := one.content.get("treatment"):
                half = {"selection": one.content["data"]["selection"]} if "selection" in one.content["data"] else {}
                treatment = treatment | half
                shown = tuple((key, _text(value)) for key, value in treatment.items())
                places = found.setdefault(shown, defaultdict(set))
                places[f"{one.run['model']}, {one.run['task']}"].add(inputs.labels.method(one.run["method"]))
        keys = list(dict.fromkeys(key for shown in found for key, _ in shown))
        rows = [
            [place, "; ".join(sorted(methods)), *(dict(shown).get(key) or Text("not recorded", "none") for key in keys)]
            for shown, places in found.items()
            for place, methods in places.items()
        ]
        if found:
            head = ["runs", "methods", *(key.replace("_", " ") for key in keys)]
            yield Grid(f"As run, {title}: what the records say", head, rows)


def _beside(value: str | None, used: str) -> str | Text:
    """Another protocol's value beside the one in use."""
    if value is None:
        return Text("no such choice", "none")
    return Text("same", "none") if value == used else value


def _text(value: Any) -> str:
    """A value in YAML's short form."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_text(one)}" for key, one in value.items()) or "none"
    if isinstance(value, list):
        return ", ".join(map(_text, value)) or "none"
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
