"""Put what was asked of a training step, and what the records of a card say was reached, into a page.

python experiments/targets.py name=paper
"""

import logging
from pathlib import Path
from typing import Any

from finetune.report.tables.targets import write_page
from finetune.runs.command import script

log = logging.getLogger(__name__)


@script("targets")
def main(config: dict[str, Any]) -> None:
    write_page(Path(config["page"]), Path("results") / config["name"])
    log.info("%s", config["page"])


if __name__ == "__main__":
    main()
