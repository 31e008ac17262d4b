"""`statistics.md`: the record of the statistics (`statistics_record`) for readers, from the template beside."""

from collections.abc import Mapping
from importlib.resources import files
from typing import Any

from markupsafe import Markup

from finetune.published import TASKS
from finetune.report import markdown
from finetune.report.paper import printed_averages, released_check
from finetune.report.paper.k_notes import explain
from finetune.report.paper.layouts import PAPER_MODELS
from finetune.stats import verdicts


def to_markdown(content: Mapping[str, Any]) -> str:
    """Render the record, as `build_statistics` gives it or as read back from `statistics.json`, as a Markdown page."""
    environment = markdown.environment()
    labels = content["methods"]

    def said(verdict: str, first: str, second: str) -> str:
        better = {verdicts.FIRST_BETTER: first, verdicts.SECOND_BETTER: second}
        return f"{labels.get(better[verdict], better[verdict])} is better" if verdict in better else verdict

    environment.filters |= {
        "interval": markdown.interval,
        "p": markdown.p_value,
        "fixed": lambda value, form: format(value + 0.0, form),
        "label": lambda name: labels.get(name, name),
        "task": lambda name: content["tasks"].get(name, name),
        "model": PAPER_MODELS.get,
        "explain": lambda check: explain(printed_averages.AverageCheck(**check)).removeprefix(f"{check['verdict']}: "),
    }
    environment.globals |= {
        "said": said,
        "titles": lambda names: [content["tasks"].get(name, name) for name in names],
        "tasks_of": lambda found: [task for task in content["tasks"] if any(task in one["tasks"] for one in found)],
        "check": released_check,
        "FOLLOWS": printed_averages.FOLLOWS,
        "paper_tasks": [*TASKS],
        "line_break": Markup("\n"),
    }
    template = files("finetune.report.statistics").joinpath("statistics.md.j2").read_text()
    return environment.from_string(template).render(content)
