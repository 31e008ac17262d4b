"""The protocol on the page: each choice with its source, and the rows D1 to D30 where paper and code differ."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from finetune.published import discrepancies
from finetune.report.page.markup import Child, Html, grid, join, tag

_ROW = re.compile(r"\bD\d+\b")


AS_RUN = {"train": "GLUE", "llama": "decoder"}
"""Kind of a record -> its name in the title of its treatment."""


@dataclass(frozen=True)
class Choice:
    """One choice of a protocol.

    Attributes:
        key: Its name; `preliminary.steps` where it stands inside another.
        value: As the file has it, in YAML.
        source: Where it comes from; empty where none is given.
    """

    key: str
    value: str
    source: str


def read_choices(name: str, protocols: Mapping[str, Mapping[str, Any]]) -> list[Choice]:
    """A protocol's choices with their sources, in the order of its file.

    Args:
        name: The protocol.
        protocols: Protocol -> content of its file; `sources` holds a text a choice, or `like`, whose sources hold too.

    Raises:
        ValueError: If the protocol, or the one that its sources are like, is not among them.
    """
    if name not in protocols:
        raise ValueError(f"protocol {name!r}; there are {', '.join(protocols)}.")
    own = protocols[name].get("sources", {})
    sources = protocols[own["like"]]["sources"] | own if "like" in own else own
    choices = []
    for key, value in protocols[name].items():
        if key in ("name", "sources"):
            continue
        source = sources.get(key, "")
        if isinstance(source, Mapping):
            choices += [Choice(f"{key}.{part}", _text(one), source.get(part, "")) for part, one in value.items()]
        else:
            choices.append(Choice(key, _text(value), source))
    return choices


def protocol_html(title: str, name: str, protocols: Mapping[str, Mapping[str, Any]]) -> Html:
    """The choices of one protocol beside the others'.

    Args:
        title: What it is the protocol of.
        name: The protocol in use.
        protocols: Protocol -> content of its file.

    Raises:
        ValueError: As `read_choices`.
    """
    others = [other for other in protocols if other != name]
    values = {other: {choice.key: choice.value for choice in read_choices(other, protocols)} for other in others}
    rows = [
        [
            choice.key.replace("_", " ").replace(".", ": "),
            tag("b", choice.value),
            *(_other(values[other].get(choice.key), choice.value) for other in others),
            linked(choice.source) if choice.source else "none given",
        ]
        for choice in read_choices(name, protocols)
    ]
    return grid(["choice", f"{name} (used)", *others, "source"], rows, f"{title}: protocol {name}")


def linked(text: str) -> Html:
    """A text with every D-row in it linked to its entry."""
    known = {row["row"] for row in discrepancies()}
    parts: list[Child] = []
    end = 0
    for found in _ROW.finditer(text):
        link = tag("a", found[0], href=f"#{found[0].lower()}") if found[0] in known else found[0]
        parts += [text[end : found.start()], link]
        end = found.end()
    return join([*parts, text[end:]])


def bearing_html(kind: str, number: int) -> Html | None:
    """The rows that bear on a table or a figure, each with its topic; None where none does.

    Args:
        kind: `tables` or `figures`.
        number: Number in the paper.
    """
    rows = [row for row in discrepancies() if str(number) in row[kind].split()]
    if not rows:
        return None
    links = [tag("a", f"{row['row']} {row['topic']}", href=f"#{row['row'].lower()}") for row in rows]
    return tag("p", tag("b", "Paper and code differ on: "), join(links, " · "), ".", class_="bearing")


def discrepancies_html(protocol: str, figures: Collection[str] = ()) -> Html:
    """All rows as cards: paper, code, what is done here, and the tables it bears on.

    Args:
        protocol: The protocol in use.
        figures: Names of the figures that are on the page, such as `figure_02`.
    """
    return tag("div", "\n", *(join([_card(row, protocol, figures), "\n"]) for row in discrepancies()), class_="cards")


def _card(row: Mapping[str, str], protocol: str, figures: Collection[str]) -> Html:
    places = [tag("a", f"Table {number}", href=f"#table-{int(number):02d}") for number in row["tables"].split()]
    for number in row["figures"].split():
        there = f"figure_{int(number):02d}" in figures
        name = f"Figure {number}"
        places.append(tag("a", name, href=f"#figure-{int(number):02d}") if there else Html(name))
    lines: list[tuple[str, Child]] = [("Paper", row["paper"]), ("Released code", row["code"])]
    here = {name: row[name] for name in ("printed", "released", "sound")}
    if len(set(here.values())) == 1:
        lines.append(("Here", here["sound"]))
    else:
        lines += [(f"Here, {name}{' (used)' if name == protocol else ''}", text) for name, text in here.items()]
    lines.append(("Bears on", join(places, ", ") if places else "the text, no number of a table"))
    pairs = join([join([tag("dt", name), tag("dd", text)]) for name, text in lines], "\n")
    return tag(
        "article", tag("h3", f"{row['row']} ", tag("small", row["topic"]), id=row["row"].lower()), tag("dl", pairs)
    )


def treatment_html(records: Iterable[Mapping[str, Any]]) -> Html | None:
    """What the records say was really used, a line for each distinct treatment; None where there is no record."""
    kinds: dict[str, dict[tuple[tuple[str, str], ...], list[str]]] = {}
    for record in records:
        run, treatment = record.get("run", {}), record.get("treatment")
        if treatment and run.get("kind") in AS_RUN:
            shown = tuple((key, _text(value)) for key, value in treatment.items())
            own = kinds.setdefault(run["kind"], {})
            own.setdefault(shown, []).append(f"{run['model']}, {run['task']}: {run['method']}")
    return join([_as_run(AS_RUN[kind], kinds[kind]) for kind in AS_RUN if kind in kinds], "\n") if kinds else None


def _as_run(title: str, found: Mapping[tuple[tuple[str, str], ...], Sequence[str]]) -> Html:
    keys = list(dict.fromkeys(key for shown in found for key, _ in shown))
    rows = [[_who(names), *(dict(shown).get(key, "not recorded") for key in keys)] for shown, names in found.items()]
    return grid(["runs", *(key.replace("_", " ") for key in keys)], rows, f"As run, {title}: what the records say")


def _who(names: Sequence[str]) -> str:
    methods: dict[str, list[str]] = {}
    for name in dict.fromkeys(names):
        place, _, method = name.partition(": ")
        methods.setdefault(place, []).append(method)
    return "; ".join(f"{place}: {', '.join(sorted(found))}" for place, found in methods.items())


def _other(value: str | None, used: str) -> Child:
    if value is None:
        return tag("span", "no such choice", class_="none")
    return tag("span", "same", class_="none") if value == used else value


def _text(value: Any) -> str:
    """A value in YAML's short form."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_text(one)}" for key, one in value.items()) or "none"
    if isinstance(value, list):
        return ", ".join(map(_text, value)) or "none"
    return f"{value:g}" if isinstance(value, float) else str(value)
