"""What the configuration names: methods, tasks and models, read from their YAML files without torch or Hydra.

Tables, figures, statistics and the plan take their rows, columns and labels from here, so that a method, a task or a
model is added by its file alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

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
    found = {}
    for path, content in _files(conf / "method"):
        name = _name(path, content)
        found[name] = MethodFacts(
            name=name,
            label=content.get("label", name),
            base=content.get("base", name),
            control=bool(content.get("control", False)),
            extends=content.get("extends", ""),
        )
    unknown = {name: one.extends for name, one in found.items() if one.extends and one.extends not in found}
    if unknown:
        raise ValueError(f"{conf / 'method'}: extends names no method there: {unknown}.")
    return dict(sorted(found.items(), key=lambda item: (item[1].name != item[1].base, item[0])))


def read_tasks(data: str, conf: Path = CONF) -> dict[str, TaskFacts]:
    """The tasks of one file of ``conf/data``, in its order.

    Raises:
        ValueError: if there is no such file, or an entry lacks its metric.
    """
    path = conf / "data" / f"{data}.yaml"
    content = dict(_files(path.parent)).get(path)
    if content is None:
        raise ValueError(f"data={data!r}; there is no {path}.")
    lacking = [name for name, task in content["tasks"].items() if "metric" not in task]
    if lacking:
        raise ValueError(f"{path}: {', '.join(lacking)}: each task needs its metric.")
    return {name: TaskFacts(name, task.get("title", name), task["metric"]) for name, task in content["tasks"].items()}


def read_models(conf: Path = CONF) -> dict[str, Mapping[str, Any]]:
    """Every file of ``conf/model`` by name."""
    return {_name(path, content): content for path, content in _files(conf / "model")}


def _files(folder: Path) -> list[tuple[Path, dict[str, Any]]]:
    found = []
    for path in sorted(folder.glob("*.yaml")):
        try:
            content = yaml.safe_load(path.read_text())
        except yaml.YAMLError as error:
            raise ValueError(f"{path} is no YAML: {' '.join(str(error).split())}") from None
        if not isinstance(content, dict):
            raise ValueError(f"{path} holds a {type(content).__name__}, no mapping.")
        found.append((path, content))
    return found


def _name(path: Path, content: Mapping[str, Any]) -> str:
    if content.get("name") != path.stem:
        raise ValueError(f"{path}: name is {content.get('name')!r}; it must be that of the file, {path.stem!r}.")
    return path.stem
