"""Write the report of an experiment: one page that works offline, from everything that its stages left.

python experiments/report.py name=local
"""

import logging
from pathlib import Path
from typing import Any

from finetune.report.labels import read_labels
from finetune.report.page.context import to_html
from finetune.report.page.inputs import read_inputs
from finetune.runs.command import script
from finetune.store.catalog import read_group
from finetune.store.experiment import read_checked
from finetune.store.files import write_atomically

log = logging.getLogger(__name__)

PROTOCOLS = {"GLUE": "protocol", "LLaMa-2": "protocol/llama"}


@script("report")
def main(config: dict[str, Any]) -> None:
    name, file = config["name"], Path(config["experiment"])
    experiment, results = read_checked(file), Path("results") / name
    if experiment.get("name") != name:
        raise ValueError(f"{file} is experiment {experiment.get('name')!r}, not {name!r}.")
    protocols = {title: read_group(group) for title, group in PROTOCOLS.items()}
    labels = read_labels(experiment.get("data"))
    inputs = read_inputs(results, experiment=experiment, labels=labels, protocols=protocols, expected=config["figures"])
    path = Path(config["output"] or results / "report.html")
    write_atomically(path, to_html(inputs))
    log.info("%s", path)


if __name__ == "__main__":
    main()
