"""A cell of judgments: the answers of all seeds of one model and method, judged, each with a record."""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.mt_bench.answer_cells import model_id
from finetune.mt_bench.client import JudgeOptions, JudgeUnusable
from finetune.mt_bench.journal import read_items
from finetune.mt_bench.judging import failures_path, judge_answers, judging_hash
from finetune.mt_bench.local_judge import LocalJudge
from finetune.mt_bench.questions import load_answers, load_judge_prompts, load_questions, load_references
from finetune.store import records

log = logging.getLogger(__name__)

SETTINGS = ("name", "serve", "allowed_failures")  # of the group judge, beside the fields of JudgeOptions
SERVED = "started by the stage"  # the port changes with every run


@dataclass(frozen=True)
class Bench:
    """What the judgments of a cell share: questions, references, prompts."""

    file: Path
    questions: list[dict[str, Any]]
    references: dict[int, dict[str, Any]]
    prompts: dict[str, dict[str, Any]]

    @classmethod
    def load(cls, group: Mapping[str, Any]) -> Bench:
        """From the group ``questions``.

        Raises:
            ValueError: if a file is missing or wrong; see :mod:`finetune.mt_bench.questions`.
        """
        root = Path(group["root"]) / group["folder"]
        questions = load_questions(root / group["questions"])
        file = None if group["references"] is None else root / group["references"]
        references = load_references(questions, file, group["reference_source"])
        return cls(root / group["questions"], questions, references, load_judge_prompts(root / group["judge_prompts"]))


def judge_cell(config: Mapping[str, Any], seeds: Sequence[int], answers_folder: Path, folder: Path) -> None:
    """All judgments of a cell; writes judgments, failures and record of each seed, and ``cell.json``.

    Args:
        config: composed configuration; ``judge`` holds the fields of JudgeOptions, ``name``, ``serve`` (start
            LocalJudge for the time of the call) and ``allowed_failures``.
        seeds: of the models that answered.
        answers_folder: holds ``<model_id>.jsonl`` of each, as the answers stage writes them.
        folder: for the files of this cell.

    Raises:
        JudgeUnusable: at once, if the judge can't be used at all; what is judged is kept.
        ValueError: if the configuration is wrong; or after everything is done, if answers are missing or more than
            ``allowed_failures`` judgments of a seed failed.
    """
    bench = Bench.load(config["questions"])
    listed, problems = [], []
    with _judge(config["judge"]) as options:
        for seed in seeds:
            name = model_id(config, seed)
            try:
                problem = _judge_one(config, seed, bench, options, answers_folder / f"{name}.jsonl", folder)
            except JudgeUnusable:
                raise
            except ValueError as error:
                problem = str(error)
            if (folder / f"{name}.json").exists():
                listed.append(f"{name}.json")
            problems += [problem] if problem else []
    records.write_json(folder / "cell.json", {"records": listed})
    if problems:
        raise ValueError("; ".join(problems))


@contextmanager
def _judge(group: Mapping[str, Any]) -> Iterator[JudgeOptions]:
    """Options of the judge, which is there while the block runs if the group says ``serve``."""
    fields = {name: value for name, value in group.items() if name not in SETTINGS}
    if not group["serve"]:
        yield _options(fields)
        return
    if fields.get("measures_quality", True):
        raise ValueError(
            "judge.serve=true starts the local judge, whose ratings are no measure of quality: set "
            "judge.measures_quality=false."
        )
    with LocalJudge() as server:
        yield _options(fields | {"base_url": server.base_url, "api_key_env": None})


def _options(fields: Mapping[str, Any]) -> JudgeOptions:
    try:
        return JudgeOptions(**fields)
    except TypeError:
        allowed = (*JudgeOptions.__dataclass_fields__, *SETTINGS)
        raise ValueError(f"judge holds {', '.join(sorted(fields))}; allowed: {', '.join(sorted(allowed))}.") from None


def _judge_one(
    config: Mapping[str, Any], seed: int, bench: Bench, options: JudgeOptions, file: Path, folder: Path
) -> str | None:
    """Judge the answers of one seed and write its record; returns what is wrong with it."""
    name, allowed = model_id(config, seed), config["judge"]["allowed_failures"]
    answers = load_answers(file)
    digest = judging_hash(bench.questions, bench.references, bench.prompts, options, config["version"])
    record = _header(config, seed, bench, options, digest, file, answers)
    try:
        counts = judge_answers(
            bench.questions,
            bench.references,
            bench.prompts,
            answers,
            name,
            folder,
            options,
            digest=digest,
            progress_bar=config["progress"],
        )
    except JudgeUnusable as error:
        items, judged = 2 * len(bench.questions) * options.repeats, len(read_items(folder / f"{name}.jsonl"))
        counts = {"items": items, "judged": judged, "failed": len(read_items(failures_path(folder, name)))}
        _write(folder / f"{name}.json", record | {"status": "failed", "error": str(error), "counts": counts})
        raise
    log.info("%s: %d of %d judged, %d of them before", name, counts["judged"], counts["items"], counts.pop("reused"))
    failed, problem = counts["failed"], None
    if failed > allowed:
        problem = (
            f"{name}: {failed} of {counts['items']} judgments failed, {_commonest(folder, name)}; a rerun retries them"
        )
    status = "finished" if problem is None else "failed"
    _write(folder / f"{name}.json", record | {"status": status, "error": problem, "counts": counts})
    return problem


def _commonest(folder: Path, name: str) -> str:
    found = Counter(line["error"] for line in read_items(failures_path(folder, name)))
    error, times = found.most_common(1)[0]
    return f"{times} of them with: {error}"


def _write(path: Path, record: Mapping[str, Any]) -> None:
    """Write a record, unless it says what the file says already: its time is that of the judgments."""
    if path.exists():
        held = records.read_json(path)
        if {key: held[key] for key in held if key != "provenance"} == record:
            return
    records.write_json(path, {**record, "provenance": records.provenance()})


def _header(
    config: Mapping[str, Any],
    seed: int,
    bench: Bench,
    options: JudgeOptions,
    digest: str,
    file: Path,
    answers: Mapping[int, Mapping[str, Any]],
) -> dict[str, Any]:
    """Who judged what; the status and the counts come last."""
    return {
        "schema": records.SCHEMA,
        "version": config["version"],
        "run": {
            "experiment": config["name"],
            "kind": "judgments",
            "model": config["model"]["name"],
            "method": config["method"]["name"],
            "task": "mt_bench",
            "seed": seed,
            "protocol": config["protocol"]["name"],
            "scale": config["scale"]["name"],
            "config_hash": digest,
        },
        "judge": {
            "name": config["judge"]["name"],
            "model": options.model,
            "endpoint": SERVED if config["judge"]["serve"] else options.base_url,
            "measures_quality": options.measures_quality,
            "temperature": options.temperature,
            "max_tokens": options.max_tokens,
            "repeats": options.repeats,
        },
        "questions": {
            "name": config["questions"]["name"],
            "file": bench.file.name,
            "sha256": _sha256(bench.file),
            "count": len(bench.questions),
        },
        "answers": {
            "cut": sum(sum(map(bool, answer.get("cut", []))) for answer in answers.values()),
            "refused": sum(sum(map(bool, answer.get("refused", []))) for answer in answers.values()),
            "sha256": _sha256(file),
        },
    }


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
