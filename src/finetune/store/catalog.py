"""What the configuration names: methods, tasks and models, read from their YAML files without torch or Hydra.

Tables, figures, statistics and the plan take their rows, columns and labels from here, so that a method, a task or a
model is added by its file alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.config.check import check_group
from finetune.store.files import read_yaml

CONF = Path("conf")


@dataclass(frozen=True)
class MethodFacts:
    """A file of ``conf/method``.

    Attributes:
        name: of the file, of its folders of records.
        label: for readers.
        base: the method that implements it; its own name where it is no variant.
        control: whether it trains nothing of the target matrices.
        extends: another variant that it departs from in one choice; empty where there is none.
    """

    name: str
    label: str
    base: str
    control: bool = False
    extends: str = ""


@dataclass(frozen=True)
class TaskFacts:
    """An entry of ``conf/data``: its name, its column label, the name of its metric."""

    name: str
    title: str
    metric: str


def read_methods(conf: Path = CONF) -> dict[str, MethodFacts]:
    """Every method of ``conf/method`` by name, methods before their variants.

    Raises:
        ValueError: if a file is no mapping with a name, or extends a method that has no file.
    """
    found = {
        name: MethodFacts(
            name, file.get("label", name), file.get("base", name), file.get("control", False), file.get("extends", "")
        )
        for name, file in read_group("method", conf).items()
    }
    unknown = {name: one.extends for name, one in found.items() if one.extends and one.extends not in found}
    if unknown:
        raise ValueError(f"{conf / 'method'}: extends names no method there: {unknown}.")
    return dict(sorted(found.items(), key=lambda item: (item[1].name != item[1].base, item[0])))


def read_tasks(data: str, conf: Path = CONF) -> dict[str, TaskFacts]:
    """The tasks of one file of ``conf/data``, in its order.

    Raises:
        ValueError: if there is no such file, or it is none of ``conf/data``.
    """
    path = conf / "data" / f"{data}.yaml"
    content = read_yaml(path)
    check_group("data", content, file=path)
    tasks = content["tasks"].items()
    return {name: TaskFacts(name, task.get("title", name), task["metric"]) for name, task in tasks}


def read_models(conf: Path = CONF) -> dict[str, dict[str, Any]]:
    """Every file of ``conf/model`` by name."""
    return read_group("model", conf)


def read_group(group: str, conf: Path = CONF) -> dict[str, dict[str, Any]]:
    """Every file of a folder of ``conf`` by its name, which must stand in it too.

    Raises:
        ValueError: if one is none of its group.
    """
    folder = conf / group
    found = {path.stem: read_yaml(path) for path in sorted(folder.glob("*.yaml"))}
    for name, content in found.items():
        path = folder / f"{name}.yaml"
        check_group(group, content, file=path)
        if content["name"] != name:
            raise ValueError(f"{path}: name is {content.get('name')!r}; it must be that of the file, {name!r}.")
    return found
