"""Cells of judgments: the answers of all methods and seeds of one model, judged, each with a record."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from finetune.mt_bench.cells import each, header, model_id
from finetune.mt_bench.client import JudgeOptions, JudgeUnusable
from finetune.mt_bench.journal import read_items
from finetune.mt_bench.judged import vouched_answers
from finetune.mt_bench.judging import Bench, failures_path, judge_answers
from finetune.mt_bench.local_judge import LocalJudge
from finetune.mt_bench.questions import load_judge_prompts, load_questions, load_references
from finetune.store import records
from finetune.store.files import sha256

log = logging.getLogger(__name__)

SETTINGS = ("name", "serve", "allowed_failures")  # of the group judge, beside the fields of JudgeOptions
SERVED = "started by the stage"  # the port changes with every run


def judge_cells(
    config: Mapping[str, Any], methods: Sequence[str], seeds: Sequence[int], answers_folder: Path, folder: Path
) -> None:
    """All judgments of a model; judgments, failures and record of each seed, and ``cell.json``, below ``<method>/``.

    Args:
        config: composed configuration; ``judge`` holds the fields of JudgeOptions, ``name``, ``serve`` (start
            LocalJudge for the time of the call) and ``allowed_failures``.
        methods, seeds: of the models that answered.
        answers_folder: holds ``<method>/<model_id>.jsonl`` of each, as the answers stage writes them.
        folder: for the files of this model.

    Raises:
        JudgeUnusable: at once, if the judge can't be used at all; what is judged is kept.
        ValueError: if the configuration is wrong; or after everything is done, if answers are missing or more than
            ``allowed_failures`` judgments of a seed failed.
    """
    file, bench = read_bench(config["questions"])
    with judge_of(config["judge"] | {"progress": config["progress"]}) as options:

        def work(own: Mapping[str, Any], seed: int) -> None:
            method = own["method"]["name"]
            answers = answers_folder / method / f"{model_id(own, seed)}.jsonl"
            _judge_one(own, seed, file, bench, options, answers, folder / method)

        each(config, methods, seeds, folder, work)


def read_bench(group: Mapping[str, Any]) -> tuple[Path, Bench]:
    """The file of the questions that a file of ``conf/questions`` names, and what all judgments of them share."""
    root = Path(group["root"]) / group["folder"]
    file, held = root / group["questions"], None if group["references"] is None else root / group["references"]
    questions = load_questions(file)
    references = load_references(questions, held, group["reference_source"])
    return file, Bench(questions, references, load_judge_prompts(root / group["judge_prompts"]))


@contextmanager
def judge_of(group: Mapping[str, Any]) -> Iterator[JudgeOptions]:
    """Options of the judge, which is there while the block runs if the group says ``serve``."""
    fields = {name: value for name, value in group.items() if name not in SETTINGS}
    if not group["serve"]:
        yield JudgeOptions(**fields)
        return
    with LocalJudge() as server:
        yield JudgeOptions(**fields | {"base_url": server.base_url, "api_key_env": None})


def described(group: Mapping[str, Any], options: JudgeOptions) -> dict[str, Any]:
    """A record's ``judge``."""
    names = ("measures_quality", "temperature", "max_tokens", "repeats", "parsing")
    endpoint = SERVED if group["serve"] else options.base_url
    found = {"name": group["name"], "model": options.model, "endpoint": endpoint}
    return found | {name: getattr(options, name) for name in names}


def _judge_one(
    config: Mapping[str, Any],
    seed: int,
    file: Path,
    bench: Bench,
    options: JudgeOptions,
    answers_file: Path,
    folder: Path,
) -> None:
    """Judge the answers of one seed and write its record; more failures than allowed are an error there and here."""
    name, allowed = model_id(config, seed), config["judge"]["allowed_failures"]
    answers = vouched_answers(answers_file)
    digest = bench.digest(options, config["version"])
    record = header(config, "judgments", seed, digest, file, bench.questions)
    record |= {
        "judge": described(config["judge"], options),
        "answers": {
            name: sum(turns.count(True) for one in answers.values() if isinstance(turns := one.get(name), list))
            for name in ("cut", "refused")
        }
        | {"sha256": sha256(answers_file)},
    }
    path = folder / f"{name}.json"
    try:
        counts = judge_answers(bench.questions, bench.references, bench.prompts, answers, name, folder, options, digest)
    except JudgeUnusable as error:
        items, judged = 2 * len(bench.questions) * options.repeats, len(read_items(folder / f"{name}.jsonl"))
        counts = {"items": items, "judged": judged, "failed": len(read_items(failures_path(folder, name)))}
        _write(path, record | {"status": "failed", "error": str(error), "counts": counts})
        raise
    log.info("%s: %d of %d judged, %d of them before", name, counts["judged"], counts["items"], counts.pop("reused"))
    if counts["failed"] <= allowed:
        _write(path, record | {"status": "finished", "error": None, "counts": counts})
        return
    errors = Counter(line["error"] for line in read_items(failures_path(folder, name)))
    commonest, times = errors.most_common(1)[0]
    failed = f"{counts['failed']} of {counts['items']} judgments failed"
    problem = f"{failed}, {times} of them with: {commonest}; a rerun retries them"
    _write(path, record | {"status": "failed", "error": f"{name}: {problem}", "counts": counts})
    raise ValueError(problem)


def _write(path: Path, record: Mapping[str, Any]) -> None:
    """Write a record, unless it says what the file says already: its time is that of the judgments."""
    with suppress(ValueError):  # none, or one that is not sound
        held = records.read_record(path)
        if {key: held[key] for key in held if key not in ("provenance", "checksum")} == record:
            return
    records.write_record(path, {**record, "provenance": records.provenance()})
