"""A judge before it judges: its ratings of answers that another judge has rated, and the record of their agreement."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from finetune.mt_bench.agreement import KIND, RECORD, in_words, measure
from finetune.mt_bench.journal import read_items
from finetune.mt_bench.judging import failures_path, judge_answers
from finetune.mt_bench.judgment_cells import described, judge_of, read_bench
from finetune.mt_bench.reference_judgments import choose, read_reference
from finetune.runs.command import only_writer
from finetune.store import records
from finetune.store.files import sha256

log = logging.getLogger(__name__)


def validate_judge(config: Mapping[str, Any]) -> dict[str, Any]:
    """Let a judge rate what the reference rated, and write `<output>/<judge>/agreement.json`.

    Judgments and failures lie beside it, a file a model, as `finetune.mt_bench.judging.judge_answers` writes them. What
    was answered is not asked again, with or without a rating, with more questions or repeats neither.

    Args:
        config: Composed configuration, of `conf/judge_agreement.yaml`.

    Returns:
        The record.

    Raises:
        JudgeUnusable: If the judge can't be used at all; what is judged is kept.
        ValueError: If the configuration is wrong; or, after everything is done, if more than `judge.allowed_failures`
            judgments got no answer. A judge that answers without a rating is no error: the record says its share.
    """
    folder = Path(config["output"]) / config["judge"]["name"]
    file, bench = read_bench(config["questions"])
    published = file.parent / config["judgments"]
    reference = read_reference(published, bench.questions, bench.references, bench.prompts, config["models"])
    chosen = choose(bench.questions, config["part"], config["seed"])
    counts: Counter[str] = Counter()
    with (
        only_writer(folder, config["checkpoints"]),
        judge_of(config["judge"] | {"progress": config["progress"], "ask_again": False}) as options,
    ):
        digest = bench.digest(options, config["version"])
        for model, answers in reference.answers.items():
            counts.update(
                judge_answers(chosen, bench.references, bench.prompts, answers, model, folder, options, digest)
            )
            log.info("%s: so far %d of %d judgments have a rating", model, counts["judged"], counts["items"])
        _check_answered(folder, [*reference.answers], counts["items"], config["judge"]["allowed_failures"])
        judged = {model: read_items(folder / f"{model}.jsonl") for model in reference.answers}
        asked = {"count": len(chosen), "of": len(bench.questions), "seed": config["seed"]}
        record = {
            "schema": records.SCHEMA,
            "version": config["version"],
            "run": {"kind": KIND, "config_hash": digest},
            "judge": described(config["judge"], options),
            "questions": {"file": file.name, "sha256": sha256(file), **asked},
            "reference": {"judge": reference.judge, "file": published.name, "sha256": sha256(published)},
            "agreement": measure(reference.scores, judged, counts["items"]),
            "counts": {name: counts[name] for name in ("items", "judged", "failed", "differing")},
        }
        records.write_record(folder / RECORD, record | {"provenance": records.provenance()})
    log.info("%s: %s", config["judge"]["name"], in_words(record))
    return record


def _check_answered(folder: Path, models: Sequence[str], items: int, allowed: int) -> None:
    """Refuse to measure a judge that was not there for all items."""
    failures = [line for model in models for line in read_items(failures_path(folder, model))]
    unanswered = [line["error"] for line in failures if "judgment" not in line]
    if len(unanswered) > allowed:
        commonest, times = Counter(unanswered).most_common(1)[0]
        raise ValueError(
            f"{len(unanswered)} of {items} judgments got no answer, {times} of them with: {commonest}; no record is "
            "written, a rerun asks again for these alone."
        )
