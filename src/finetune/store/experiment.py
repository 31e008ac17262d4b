"""Experiments: a file of ``experiments/`` says what is its own, ``base.yaml`` there what holds otherwise.

    python -m finetune.store.experiment experiments/smoke.yaml params.yaml

writes the whole of it: every list, and below ``stages`` what dvc.yaml loops over, an entry a stage. Needs no torch.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

from finetune.config.check import check
from finetune.config.experiments import ExperimentFile
from finetune.store.boundary import exit_with_message
from finetune.store.catalog import CONF, read_methods, read_models, read_tasks
from finetune.store.files import read_yaml, write_atomically

TABLES = {
    "bert_base": (5, 9, 11, 13, 14),
    "roberta_base": (5, 10, 12, 15),
    "roberta_large": (4, 5),
    "llama2_7b": (6,),
}
"""The paper's models, and the tables that a model in their place fills."""

_ENCODERS, _DECODERS = ("models", "ablation_models", "efficiency_models"), ("decoders",)
_METHODS = ("methods", "ablations", "decoder_ablations")
_GROUPS = ("data", "chat", "questions", "judge", "protocol", "protocol/llama", "scale", "scale/llama")
_MEASURED = ("efficiency", "energy", "hosvd_cost", "cost_curves")
_HEAD = "# Written by `make repro EXPERIMENT={name}` from experiments/{name}.yaml; a change belongs there.\n"


def read_experiment(path: str | Path, _children: tuple[str, ...] = ()) -> dict[str, Any]:
    """What a file of ``experiments/`` names, the defaults of ``base.yaml`` beside it filled in; all of a params.yaml.

    Raises:
        ValueError: as `read_checked`, or if experiments extend each other in a circle.
    """
    path = Path(path)
    content = read_checked(path)
    if "stages" in content:
        _check_whole(path, content, "make repro EXPERIMENT=NAME writes the whole file")
        return content
    base = path.parent / "base.yaml"
    defaults = {"name": path.stem, "extends": None, **read_checked(base)}
    _check_whole(base, defaults | {"stages": {}}, "it holds every key of an experiment")
    check(ExperimentFile, defaults, file=path)  # a file's name names folders
    parent = content.get("extends")
    if parent in (path.stem, *_children):
        raise ValueError(f"{path}: extends={parent!r} comes back to itself.")
    children = (*_children, path.stem)
    inherited = read_experiment(path.parent / f"{parent}.yaml", children) | {"name": path.stem} if parent else {}
    return defaults | inherited | content | {"extends": None}


def _check_whole(path: Path, content: Mapping[str, Any], remedy: str) -> None:
    if missing := [key for key in ExperimentFile.model_fields if key not in content and key != "extends"]:
        raise ValueError(f"{path}: {missing[0]} is missing; {remedy}.")


def read_checked(path: str | Path) -> dict[str, Any]:
    """What stands in an experiment file, or a params.yaml: no more, and no less than it says.

    Raises:
        ValueError: if there is no such file, it is no YAML mapping, or a key or a value is none of an experiment.
    """
    content = read_yaml(Path(path))
    check(ExperimentFile, content, file=path)
    return content


def load(path: str | Path, conf: Path = CONF, **own: Any) -> dict[str, Any]:
    """An experiment file, read and expanded; ``own`` replaces what it says.

    Raises:
        ValueError: as `read_experiment` and `expand`, with the file's name.
    """
    given = read_experiment(path) | own
    try:
        return expand(given, conf)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def expand(experiment: Mapping[str, Any], conf: Path = CONF) -> dict[str, Any]:
    """An experiment, of `read_experiment`, as params.yaml holds it: checked, every list given, and ``stages``.

    Raises:
        ValueError: if it names what ``conf`` lacks, something twice, a model where it cannot stand, or a table or
            figure that it cannot fill.
    """
    given = {key: value for key, value in experiment.items() if key not in ("extends", "stages")}
    for key, default in (("ablation_models", "models"), ("decoder_seeds", "seeds"), ("measurements", "scale")):
        given[key] = given[default] if given[key] is None else given[key]
    known = read_models(conf)
    _check_all(given, known, conf)
    there = {*given["models"], *given["decoders"]}
    stands = {paper: given["stands_for"].get(paper, paper if paper in there else None) for paper in TABLES}
    given["stands_for"] = stands
    if given["efficiency_models"] is None:
        given["efficiency_models"] = [stands["roberta_base"]] if stands["roberta_base"] else given["models"][:1]
    for key, can in _fillable(given).items():
        check_names(key, given[key], can)
        given[key] = can if given[key] is None else given[key]
    return given | {"stages": _Stages(given, known, conf).all()}


def _check_all(given: Mapping[str, Any], known: Mapping[str, Any], conf: Path) -> None:
    for group in _GROUPS:
        there = sorted(path.stem for path in (conf / group).glob("*.yaml"))
        check_names(group, [given[group.split("/")[0]]], there)
    for group in _MEASURED:
        there = sorted(path.stem for path in (conf / "scale" / group).glob("*.yaml"))
        check_names("measurements", [given["measurements"]], there)
    decoders = {name for name, model in known.items() if "template" in model}
    for keys, allowed in ((_ENCODERS, known.keys() - decoders), (_DECODERS, decoders), (("pretrain",), known.keys())):
        for key in keys:
            check_names(key, given[key], sorted(allowed))
    methods = read_methods(conf)
    for key in _METHODS:
        check_names(key, given[key], methods)
    for key, listed in (("ablations", "methods"), ("decoder_ablations", "methods")):
        check_names(key, given[key], [name for name in methods if name not in given[listed]])
    check_names("ablation_models", given["ablation_models"], given["models"])
    check_names("tasks", given["tasks"], read_tasks(given["data"], conf))
    check_names("stands_for", filter(None, given["stands_for"].values()), [*given["models"], *given["decoders"]])
    if not given["models"] and not given["decoders"]:
        raise ValueError("an experiment needs models (encoders) or decoders.")
    for model, list_ in (("models", "tasks"), ("models", "seeds"), ("decoders", "decoder_seeds")):
        if given[model] and not given[list_]:
            raise ValueError(f"{list_}: {model} need at least one.")


def check_names(key: str, names: Any, allowed: Any) -> None:
    """Refuse names that are none of those allowed.

    Raises:
        ValueError: with them, the nearest, and all.
    """
    there = [str(name) for name in allowed]
    unknown = [str(name) for name in names or () if str(name) not in there]
    if unknown:
        near = get_close_matches(unknown[0], there, 1)
        nearest = f"nearest: {near[0]}; " if near else ""
        raise ValueError(f"{key}: {', '.join(unknown)}; {nearest}allowed: {', '.join(there) or 'none'}.")


def _fillable(given: Mapping[str, Any]) -> dict[str, list[Any]]:
    """The tables and figures that there can be, in order."""
    measured = bool(given["efficiency_models"])
    tables = {1, *((3, 7, 8) if measured else ())}
    tables |= {number for paper, own in given["stands_for"].items() if own for number in TABLES[paper]}
    energy = ["figure_02", "figure_03", "figure_energy"] if given["stands_for"]["bert_base"] else []
    figures = [*energy, *(["figure_efficiency"] if measured else []), "figure_cost_curves", "methods_scores"]
    return {"tables": sorted(tables), "figures": figures}


class _Stages:
    """What dvc.yaml loops over: the entry of a stage holds all that its command and dependencies are made from."""

    def __init__(self, given: Mapping[str, Any], known: Mapping[str, Any], conf: Path) -> None:
        self.given, self.known, self.conf = given, known, conf
        self.results = f"results/{given['name']}"

    def all(self) -> dict[str, Any]:
        given, name = self.given, self.given["name"]
        encoders, decoders = ({m: self._model(m) for m in given[key]} for key in ("models", "decoders"))
        models = encoders | decoders
        cells = {f"{m}-{method}": self._cell(models[m], method) for m, method in self._pairs()}
        answered = {"methods": given["methods"], "seeds": given["decoder_seeds"]}
        entries = {"bases": models, "train": cells, "energy": encoders}
        entries["answers"] = {m: {"model": m, **answered} for m in decoders}
        entries["efficiency"] = {m: self._model(m) for m in given["efficiency_models"]}
        entries["pretrain"] = {m: self._pretrained(m) for m in given["pretrain"]}
        named = {stage: {f"{name}-{key}": entry for key, entry in found.items()} for stage, found in entries.items()}
        made = [name] if given["generate"] else []
        shown = [name] if given["stands_for"]["llama2_7b"] else []
        return {"generate": made, "examples": shown, "evidence": self._evidence(), **named}

    def _pairs(self) -> list[tuple[str, str]]:
        given = self.given
        lists = [("models", "methods"), ("ablation_models", "ablations")]
        lists += [("decoders", "methods"), ("decoders", "decoder_ablations")]
        return [(model, method) for models, methods in lists for model in given[models] for method in given[methods]]

    def _model(self, model: str) -> dict[str, Any]:
        given, chat = self.given, model in self.given["decoders"]
        group, within = ("chat", "llama/") if chat else ("data", "")
        choices = {group: given[group], "protocol": within + given["protocol"], "scale": within + given["scale"]}
        return {
            "model": model,
            "problem": "chat" if chat else "glue",
            "choices": " ".join(f"{key}={value}" for key, value in choices.items()),
            "data": f"{group}/{given[group]}",
            "protocol": choices["protocol"],
            "scale": choices["scale"],
            "tasks": ["oasst1"] if chat else given["tasks"],
            "checkpoint": f"{self._folder(group)[0]}/{self.known[model]['folder']}",
            "examples": "/".join(self._folder(group)),
        }

    def _cell(self, model: Mapping[str, Any], method: str) -> dict[str, Any]:
        chat = model["problem"] == "chat"
        seeds, kept = ("decoder_seeds", "models") if chat else ("seeds", "search")
        launch = self.given["launch"] if chat else "python"
        return {**model, "method": method, "seeds": self.given[seeds], "launch": launch, "kept": kept}

    def _pretrained(self, model: str) -> dict[str, Any]:
        made = self._model(model)
        text = f"{made['checkpoint'].removesuffix(self.known[model]['folder'])}text"
        return {"model": model, "text": text, "checkpoint": made["checkpoint"]}

    def _evidence(self) -> dict[str, str]:
        """What the report is made from. Where there is none of a kind, the runs stand in: there always are some."""
        given, runs = self.given, f"{self.results}/runs"
        there = {"search": given["models"], "energy": given["models"], "efficiency": given["efficiency_models"]}
        there |= {"mt_bench": given["decoders"], "examples.html": given["stands_for"]["llama2_7b"]}
        found = {kind.split(".")[0]: f"{self.results}/{kind}" if some else runs for kind, some in there.items()}
        questions = "/".join(self._folder("questions")) if given["decoders"] else runs
        agreement = f"results/judges/{given['judge']}/agreement.json"
        judge = agreement if given["decoders"] and Path(agreement).is_file() else runs
        return {"runs": runs, **found, "questions": questions, "judge": judge}

    def _folder(self, group: str) -> tuple[str, str]:
        """Root and folder of a choice of a data group; SPARSEGRAD_DATA is for runs by hand."""
        content = read_yaml(self.conf / group / f"{self.given[group]}.yaml")
        root = re.sub(r"\$\{oc\.env:\w+,([^}]*)\}", r"\1", content["root"]).replace("${name}", self.given["name"])
        return root, content["folder"]


def write_params(source: str | Path, target: str | Path, conf: Path = CONF) -> bool:
    """Expand an experiment's file into a params.yaml, if that holds something else; whether it was written.

    Raises:
        ValueError: as `load`.
    """
    experiment = load(source, conf)
    text = _HEAD.format(name=experiment["name"])
    text += yaml.dump(experiment, Dumper=_OneLine, sort_keys=False, default_flow_style=None, width=10_000)
    target = Path(target)
    if target.is_file() and target.read_text() == text:
        return False
    write_atomically(target, text)
    return True


class _OneLine(yaml.SafeDumper):
    """An entry of a stage is a line, whole, without anchors."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_mapping(self, tag: str, mapping: Any, flow_style: bool | None = None) -> yaml.MappingNode:
        return super().represent_mapping(tag, mapping, flow_style or ("model" in mapping or None))


_OneLine.add_representer(dict, _OneLine.represent_dict)


if __name__ == "__main__":
    with exit_with_message():
        source, target = sys.argv[1:3]
        write_params(source, target)
