"""The judgments of a folder: only what belongs to a record, and a count of what does not and of what is missing."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.mt_bench.journal import read_items
from finetune.mt_bench.questions import Answer, answer_sha256, load_answers
from finetune.mt_bench.rating import FASTCHAT, LEAST, MOST, PARSINGS, differ, rating_or_none
from finetune.mt_bench.scores import FAILED, TURNS, Item, Line, is_score, item_scores
from finetune.store import records
from finetune.store.files import sha256

_COUNTS = (("judge", "repeats"), ("questions", "count"), ("answers", "cut"), ("answers", "refused"))


@dataclass(frozen=True)
class Judged:
    """The judgments of one answer file by one judge.

    Attributes:
        path: Of the record.
        record: `run`, `judge`, `counts`, `questions`, `answers`.
        lines: Judgments with a rating that belong to the record, one for each (question, turn, repeat); the rating is
            what the judge's words say, and the judged answer the one that there is.
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
    def parsing(self) -> str:
        """How ratings were read from words; before there was a choice, as FastChat does."""
        return self.record["judge"].get("parsing", FASTCHAT)

    @property
    def differing(self) -> int:
        """Judgments that FastChat's parsing and the last own rating read differently, failures included."""
        return count_differing(self.lines, self.failures)

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
        ValueError: If a file is missing or damaged, a record lacks a part, more was judged than there are items, or a
            judgment is not believed (`fault_of`).
    """
    for path in current_records(folder):
        if records.read_json(path).get("run", {}).get("kind") == "judgments":
            yield read_judged(path)


def current_records(folder: str | Path) -> Iterator[Path]:
    """The JSON files below a folder without those that a `cell.json` above them, or beside them, does not list."""
    cells = {index.parent: records.listed_records(index) for index in Path(folder).rglob("cell.json")}
    for path in sorted(Path(folder).rglob("*.json")):
        cell = next((parent for parent in path.parents if parent in cells), None)
        if path.name != "cell.json" and (cell is None or path.relative_to(cell).as_posix() in cells[cell]):
            yield path


def read_judged(path: str | Path) -> Judged:
    """Read the judgments of one record, as `read_judgments`; of several lines of an item the last counts."""
    path = Path(path)
    record = records.read_record(path)
    _check(path, record)
    parsing, answers = record["judge"].get("parsing", FASTCHAT), _answers(path)
    kept: dict[tuple[int, int, int], Line] = {}
    foreign = 0
    for number, line in enumerate(read_items(path.with_suffix(".jsonl")), 1):
        if not _belongs(line, path.stem, record):
            foreign += 1
            continue
        if fault := fault_of(line, [parsing], answers):
            raise ValueError(
                f"{path.with_suffix('.jsonl')}, judgment {number}: {fault}; run the judgments stage again."
            )
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


def fault_of(
    line: Line, parsings: Sequence[str] = PARSINGS, answers: Mapping[int, Sequence[str]] | None = None
) -> str | None:
    """Say why a judgment is not believed, `None` if it is.

    Args:
        line: The judgment.
        parsings: Its score must be what one of them reads from the judge's words.
        answers: Question id -> the two turns; the judgment must be of these. `None` where they are not there.
    """
    number, turn, score, words = (line.get(name) for name in ("question_id", "turn", "score", "judgment"))
    if type(number) is not int or type(turn) is not int or turn not in TURNS:
        return f"question_id={number!r:.40} and turn={turn!r:.40} name no item"
    if not is_score(score):
        return f"question {number}, turn {turn} has score={score!r:.40}; it must be a number from {LEAST} to {MOST}"
    if score == FAILED:
        return None
    if not isinstance(words, str) or score not in [rating_or_none(words, parsing) for parsing in parsings]:
        return f"question {number}, turn {turn} has score={score}, which is not what the judge's words say"
    if answers is not None and line.get("answer_sha256") != answer_sha256(answers.get(number, ())[:turn]):
        return f"question {number}, turn {turn} was judged on another answer than there is"
    return None


def count_differing(lines: Iterable[Line], failures: Iterable[Line]) -> int:
    """Count the judgments that the two parsings read differently; what failed has a rating by neither, or differs."""
    failed = [words for line in failures if isinstance(words := line.get("judgment"), str)]
    return sum(differ(line["judgment"]) for line in lines) + sum(
        any(rating_or_none(words, parsing) is not None for parsing in PARSINGS) for words in failed
    )


def _answers(path: Path) -> dict[int, list[str]] | None:
    """The turns that were to be judged, from `answers/` beside `judgments/`; `None` where there is no such file."""
    parts = list(path.with_suffix(".jsonl").parts)
    if "judgments" not in parts:
        return None
    parts[len(parts) - 1 - parts[::-1].index("judgments")] = "answers"
    file = Path(*parts)
    if not file.is_file():
        return None
    return {number: answer["choices"][0]["turns"] for number, answer in vouched_answers(file).items()}


def vouched_answers(path: str | Path) -> dict[int, Answer]:
    """Answers by question id, as `load_answers`, checked against the record beside them where there is one.

    Raises:
        ValueError: If a file is missing or damaged, or the answers are not those that the record was written for.
    """
    path = Path(path)
    answers, record = load_answers(path), path.with_suffix(".json")
    if record.is_file():
        held = records.read_record(record).get("answers")
        if not isinstance(held, dict) or held.get("sha256") != sha256(path):
            raise ValueError(f"{path} is not the file that {record.name} was written for: run the answers stage again.")
    return answers


def _belongs(line: Line, model_id: str, record: Mapping[str, Any]) -> bool:
    judge, asked = record["judge"], line.get("judge")
    return (
        line.get("model") == model_id
        and isinstance(asked, list)
        and asked[:1] == [judge["model"]]
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
    run = record["run"]
    if path.stem != (name := f"{run['model']}-{run['method']}-seed{run['seed']}"):
        raise ValueError(f"{path} is the record of {name}: run the judgments stage again.")
    numbers = {name: record[part][name] for part, name in _COUNTS}
    if wrong := [name for name, value in numbers.items() if type(value) is not int or value < 0]:
        raise ValueError(f"{path} has {wrong[0]}={numbers[wrong[0]]!r:.40}, no count; run the judgments stage again.")
    if (parsing := record["judge"].get("parsing", FASTCHAT)) not in PARSINGS:
        raise ValueError(f"{path} has parsing={parsing!r:.40}; run the judgments stage again.")
