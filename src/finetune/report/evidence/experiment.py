"""What an experiment names: protocol, models in the paper's places, methods, ablations and tasks, with their labels."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from finetune.report.labels import Labels, read_labels
from finetune.store import experiment as files
from finetune.store.catalog import CONF


@dataclass(frozen=True)
class Experiment:
    """An experiment's file, and the labels of the names in it.

    Attributes:
        stands_for: The paper's model -> the model that ran in its place, or `None`. Equal names: the paper's own.
        methods: Names of the methods that it compares.
        ablations: Model -> names of the ablations that are run on it.
        tasks: Names of its tasks; a decoder's is not among them.
        efficiency_models: The models whose speed is measured; the first stands in RoBERTa-base's place.
        labels: What readers call its methods and tasks.
    """

    name: str
    protocol: str
    stands_for: Mapping[str, str | None]
    methods: tuple[str, ...] = ()
    ablations: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    tasks: tuple[str, ...] = ()
    efficiency_models: tuple[str, ...] = ()
    tables: tuple[int, ...] = ()
    figures: tuple[str, ...] = ()
    labels: Labels = field(default_factory=Labels)

    @property
    def named(self) -> tuple[str, ...]:
        """Methods and ablations."""
        return tuple(dict.fromkeys([*self.methods, *(one for names in self.ablations.values() for one in names)]))


def load_experiment(path: str | Path, name: str, conf: Path = CONF) -> Experiment:
    """Read `params.yaml`, or a file of `experiments/`, and the labels of the names in it.

    Raises:
        ValueError: If it is another experiment's than the one named, or names what the configuration lacks.
    """
    content = files.read_checked(path)
    if "name" not in content:
        content = files.load(path, conf)
    if missing := [key for key in ("protocol", "stands_for") if key not in content]:
        raise ValueError(f"{path}: {missing[0]} is missing.")
    if content["name"] != name:
        raise ValueError(f"{path} is experiment {content['name']!r}, not {name!r}.")
    lists = {key: tuple(value) for key, value in content.items() if isinstance(value, list)}
    ablations = dict.fromkeys(lists.get("ablation_models", ()), lists.get("ablations", ()))
    return Experiment(
        name=name,
        protocol=content["protocol"],
        stands_for=content["stands_for"],
        ablations=ablations | dict.fromkeys(lists.get("decoders", ()), lists.get("decoder_ablations", ())),
        labels=read_labels(content.get("data"), conf),
        **{key: lists.get(key, ()) for key in ("methods", "tasks", "efficiency_models", "tables", "figures")},
    )
