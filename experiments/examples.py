"""Write the page of Appendix E from an experiment's answers and judgments.

python experiments/examples.py name=local questions=mt_bench_inf
"""

import logging
from pathlib import Path
from typing import Any

from finetune.mt_bench.judged import read_judgments
from finetune.mt_bench.questions import load_questions
from finetune.report.evidence.experiment import load_experiment
from finetune.report.page.examples import parts_of, read_answers, to_html
from finetune.runs.command import script
from finetune.store.files import write_atomically

log = logging.getLogger(__name__)


@script("examples")
def main(config: dict[str, Any]) -> None:
    name, place = config["name"], config["questions"]
    results = Path("results") / name
    parts = parts_of(
        load_experiment(config["experiment"], name),
        questions=load_questions(Path(place["root"]) / place["folder"] / place["questions"]),
        examples=place["examples"],
        answers=read_answers(results / "mt_bench" / "answers"),
        judgments=read_judgments(results / "mt_bench" / "judgments"),
    )
    path = results / "examples.html"
    write_atomically(path, to_html(name, parts))
    log.info("%s", path)


if __name__ == "__main__":
    main()
