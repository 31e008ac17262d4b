"""Methods against each other, ours and the authors' logs; printed averages and cells against what they rest on.

python experiments/method_statistics.py name=local

Not `statistics.py`: the scripts' folder comes first on the path, and the standard library has that name.
"""

import logging
from pathlib import Path
from typing import Any

from finetune.report.evidence.evidence import read_evidence
from finetune.report.evidence.experiment import load_experiment
from finetune.report.statistics.families import Design, Question
from finetune.report.statistics.statistics_page import to_markdown
from finetune.report.statistics.statistics_record import build_statistics
from finetune.runs.command import script
from finetune.store import records
from finetune.store.experiment import check_names
from finetune.store.files import write_atomically

log = logging.getLogger(__name__)


@script("statistics")
def main(config: dict[str, Any]) -> None:
    results = Path("results") / config["name"]
    experiment = load_experiment(config["experiment"], config["name"])
    for role in ("focus", "baseline"):
        check_names(role, [config[role]], experiment.labels.methods)
    for question in config["questions"]:
        named = question["second"] + ([] if question["first"] == "all" else question["first"])
        check_names("questions", named, experiment.labels.methods)
    chosen = {name: config[name] for name in ("focus", "baseline", "seed", "samples", "margin", "patience")}
    questions = tuple(Question(**question) for question in config["questions"])
    design = Design(experiment.labels, experiment.methods, **chosen, questions=questions)
    content = build_statistics(read_evidence(experiment, results), design)
    json, page = results / "statistics.json", results / "statistics.md"
    records.write_json(json, content)
    write_atomically(page, to_markdown(content))
    for path in (json, page):
        log.info("%s", path)


if __name__ == "__main__":
    main()
