"""What readers call the names of methods and tasks: labels from the configuration, for every figure and page."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from finetune.published import TASKS
from finetune.store.catalog import CONF, MethodFacts, read_methods, read_tasks


@dataclass(frozen=True)
class Labels:
    """Labels by name; a name that the configuration has not stands for itself.

    Attributes:
        methods: Every method of the configuration.
        tasks: Task -> its title, the paper's first, in the order of columns.
    """

    methods: Mapping[str, MethodFacts] = field(default_factory=dict)
    tasks: Mapping[str, str] = field(default_factory=lambda: dict(TASKS))

    def method(self, name: str) -> str:
        """Label of a method."""
        return self.methods[name].label if name in self.methods else name

    def task(self, name: str) -> str:
        """Title of a task."""
        return self.tasks.get(name, name)

    @property
    def kin(self) -> dict[str, str]:
        """Method -> whose colour it has where it has none of its own: what it extends, its base, or `control`."""
        return {
            name: "control" if facts.control else facts.extends or facts.base for name, facts in self.methods.items()
        }

    def in_order(self, tasks: set[str]) -> list[str]:
        """Tasks in the order of columns, those that nothing names last."""
        return [*(task for task in self.tasks if task in tasks), *sorted(tasks - self.tasks.keys())]


def read_labels(data: str | None, conf: Path = CONF) -> Labels:
    """Read the labels of an experiment.

    `data` is its file of `conf/data`; without it they are the paper's tasks alone.

    Raises:
        ValueError: If a file of the configuration is damaged, or there is none of that name.
    """
    own = {name: task.title for name, task in read_tasks(data, conf).items()} if data else {}
    return Labels(read_methods(conf), TASKS | own)
