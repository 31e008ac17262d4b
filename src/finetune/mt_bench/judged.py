"""The judgments of a folder: only what belongs to a record, and a count of what does not and of what is missing."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.mt_bench.journal import read_items
from finetune.mt_bench.scores import FAILED, TURNS, Item, Line, is_score, item_scores
from finetune.store import records


@dataclass(frozen=True)
class Judged:
    """The judgments of one answer file by one judge.

    Attributes:
        path: Of the record.
        record: `run`, `judge`, `counts`, `questions`, `answers`.
        lines: Judgments with a rating that belong to the record, one for each (question, turn, repeat).
        failures: Failures of the last run, as listed beside the judgments.
        foreign: Lines of the file that do not belong: another configuration, judge, model or repeat.
    """

    path: str
    record: Mapping[str, Any]
    lines: tuple[Line, ...]
    failures: tuple[Line, ...]
    foreign: int

    @property
    def expected(self) -> int:
        """Judgments that a complete file holds: questions x 2 turns x repeats."""
        return self.record["questions"]["count"] * len(TURNS) * self.record["judge"]["repeats"]

    @property
    def missing(self) -> int:
        """Judgments without a rating: failed, or not there."""
        return self.expected - len(self.lines)

    def items(self) -> dict[Item, float]:
        """One score an item (`finetune.mt_bench.scores.item_scores`)."""
        return item_scores(self.lines)

    def shortfall(self) -> str:
        """Say what is missing; empty if nothing is."""
        texts = []
        if self.missing:
            items = self.record["questions"]["count"] * len(TURNS)
            texts += [
                f"{len(self.lines)} of {self.expected} judgments have a rating ({len(self.failures)} listed as "
                f"failures), {items - len(self.items())} of {items} items have none"
            ]
        if self.foreign:
            texts += [f"{self.foreign} lines of another configuration, judge or model not counted"]
        return "; ".join(texts)


def read_judgments(folder: str | Path) -> Iterator[Judged]:
    """Read all judgments below a folder.

    A record is a JSON file `<model_id>.json` whose `run.kind` is `judgments`; `<model_id>.jsonl` and
    `<model_id>.failures.jsonl` lie beside it. Where a cell lists its records (`cell.json`), those in or below its
    folder that it does not list are of earlier runs and are passed over.

    Raises:
        ValueError: If a file is missing or damaged, a record lacks a part, or more was judged than there are items.
    """
    for path in current_records(folder):
        if records.read_json(path).get("run", {}).get("kind") == "judgments":
            yield read_judged(path)


def current_records(folder: str | Path) -> Iterator[Path]:
    """The JSON files below a folder without those that a `cell.json` above them, or beside them, does not list."""
    cells = {index.parent: records.read_json(index)["records"] for index in Path(folder).rglob("cell.json")}
    for path in sorted(Path(folder).rglob("*.json")):
        cell = next((parent for parent in path.parents if parent in cells), None)
        if path.name != "cell.json" and (cell is None or path.relative_to(cell).as_posix() in cells[cell]):
            yield path


def read_judged(path: str | Path) -> Judged:
    """Read the judgments of one record, as `read_judgments`; of several lines of an item the last counts."""
    path = Path(path)
    record = records.read_json(path)
    _check(path, record)
    kept: dict[tuple[int, int, int], Line] = {}
    foreign = 0
    for number, line in enumerate(read_items(path.with_suffix(".jsonl")), 1):
        if not _belongs(line, path.stem, record):
            foreign += 1
            continue
        if line.get("turn") not in TURNS or not is_score(line.get("score")) or "question_id" not in line:
            raise ValueError(f"{path.with_suffix('.jsonl')}, judgment {number} lacks a question, a turn or a score.")
        key = (line["question_id"], line["turn"], line.get("repeat", 0))
        kept.pop(key, None)
        if line["score"] != FAILED:
            kept[key] = line
    failures = path.with_name(f"{path.stem}.failures.jsonl")
    found = Judged(
        path=path.as_posix(),
        record=record,
        lines=tuple(kept[key] for key in sorted(kept)),
        failures=tuple(read_items(failures)) if failures.is_file() else (),
        foreign=foreign,
    )
    if found.missing < 0:
        raise ValueError(
            f"{path} speaks of {found.expected} judgments, its file holds {len(found.lines)}: it is of other "
            "questions; run the judgments stage again."
        )
    return found


def _belongs(line: Line, model_id: str, record: Mapping[str, Any]) -> bool:
    judge = record["judge"]
    return (
        line.get("model") == model_id
        and [*line.get("judge", [])][:1] == [judge["model"]]
        and line.get("config_hash") == record["run"]["config_hash"]
        and line.get("repeat", 0) in range(judge["repeats"])
    )


def _check(path: Path, record: Mapping[str, Any]) -> None:
    """Refuse a record that lacks what scores and tables read from it."""
    needed = {
        "run": ("experiment", "model", "method", "seed", "protocol", "scale", "config_hash"),
        "judge": ("model", "measures_quality", "temperature", "max_tokens", "repeats"),
        "questions": ("file", "sha256", "count"),
        "answers": ("cut", "refused"),
    }
    missing = [f"{part}.{name}" for part, names in needed.items() for name in names if name not in record.get(part, {})]
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)}; run the judgments stage again.")
