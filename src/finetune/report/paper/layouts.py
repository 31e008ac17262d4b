"""What each printed cell of the paper's tables holds, in the project's words.

Rows and columns are read from the printed tables themselves (`finetune.published`), so that a built table has exactly
the paper's labels; a layout adds which model, method and task stand behind a label.
"""

from dataclasses import dataclass
from typing import Any

from finetune.published import TASKS, paper_table
from finetune.report.paper.printed import Printed, parse

METHODS = {"Regular FT": "full", "LoRA": "lora", "SparseGrad": "sparsegrad", "MeProp": "meprop"}
"""Row label -> method."""

VARIANTS = {
    "Regular FT": "full",
    "LoRA": "lora",
    "SparseGrad SD": "rotated_sparse_by_dense",
    "SparseGrad, Sparse-by-Dense": "rotated_sparse_by_dense",
    "SparseGrad Reg": "rotated_regular",
    "SparseGrad, Regular": "rotated_regular",
}
"""Row label of tables 3, 7 and 8 -> variant of the efficiency stage."""

PAPER_MODELS = {
    "bert_base": "BERT",
    "roberta_base": "RoBERTa-base",
    "roberta_large": "RoBERTa-large",
    "llama2_7b": "LLaMa-2",
}
"""Model -> the paper's name for it."""

PAPER_RUNS = {"bert_base": 5, "roberta_base": 5, "roberta_large": 3}
"""Runs behind a printed mean. The paper says 3 seeds; most means of the base models equal the 5-seed means of the
authors' logs, and those of the large model 3 of them."""

LLAMA_RUNS = 3
"""Runs behind a printed loss of table 6. The paper states none there; it says 3 seeds of GLUE."""

GLUE_TABLES = {"roberta_large": 4, "bert_base": 9, "roberta_base": 10}
"""Model -> the table with its scores per task."""

K_TABLES = {11: "bert_base", 12: "roberta_base"}
"""Table with SparseGrad's scores against k -> model."""

K = "k per layer"
"""Column of those tables that is not printed: k is inferred from the released run script's grid."""

METRICS = dict.fromkeys(TASKS, "accuracy") | {"cola": "matthews_correlation", "stsb": "pearson"}
"""Task -> metric of the released code; the paper names none."""

SETTINGS = ("batch_size", "learning_rate")
"""Quantities that come from a search, not from runs."""

SEARCH_TABLES = {13: ("bert_base", "sparsegrad"), 14: ("bert_base", "full"), 15: ("roberta_base", "full")}
"""Table of best settings -> model and method."""

EFFICIENCY_TABLES = (3, 7, 8)
"""Tables of steps per second and memory."""

LLAMA_TABLE = 6
"""Table of the decoder."""

_PARTS = {"Full model": "total", "MLP": "mlp", "Embeddings": "embeddings", "Attention": "attention"}
_QUANTITIES = {
    "#Trainable": "trainable",
    "#Trainable Model": "trainable",
    "#Trainable MLP layer": "trainable_per_layer",
    K: "k",
    "AVG": "average",
    "#Train params": "trained_share",
    "Valid Loss": "loss",
    "I-Bench Score": "judged",
}
"""Column -> quantity; other columns hold a task's score."""

TITLES = {
    1: "parameters of the models by part",
    3: "steps per second and memory, average over GLUE, RoBERTa-base",
    4: "RoBERTa-large on GLUE",
    5: "trainable parameters and mean GLUE score of BERT and RoBERTa-base",
    6: "LLaMa-2 on OpenAssistant conversations, answers to MT-Bench Inf judged",
    7: "steps per second on GLUE, RoBERTa-base",
    8: "peak memory on GLUE in MB, RoBERTa-base",
    9: "BERT on GLUE",
    10: "RoBERTa-base on GLUE",
    11: "SparseGrad's score against k, BERT",
    12: "SparseGrad's score against k, RoBERTa-base",
    13: "best batch size and learning rate, SparseGrad on BERT",
    14: "best batch size and learning rate, full fine-tuning of BERT",
    15: "best batch size and learning rate, full fine-tuning of RoBERTa-base",
}
"""Number of a table with a layout -> what it is about."""


@dataclass(frozen=True)
class Place:
    """A cell before it has a value of ours: the paper's labels and print, and what stands behind them.

    Attributes:
        quantity: `count`, `share`, `trainable`, `trainable_per_layer`, `k`, `average`, `score`, `batch_size`,
            `learning_rate`, `trained_share`, `loss`, `judged`; of tables 3, 7 and 8 `speed`, `evaluation`, `training`.
        model: The paper's model, one of `PAPER_MODELS`.
        method: A method or variant; empty in table 1. Of tables 3, 7 and 8 a variant of the efficiency stage.
        task: A task; empty where the cell is not about one.
        part: Field of `ParameterCounts`, table 1 only.
        paper: The printed value, empty where there is none; `paper_std` likewise its standard deviation.
        source: Where the printed value comes from; `note` is a remark on it.
        over_full: Whether the value is divided by full fine-tuning's.
        own: The model of ours behind it; empty where none stands for the paper's.
    """

    table: int
    row: str
    column: str
    quantity: str
    model: str
    method: str = ""
    task: str = ""
    part: str = ""
    paper: str = ""
    paper_std: str = ""
    source: str = ""
    note: str = ""
    over_full: bool = False
    own: str = ""
    ablation: bool = False

    @property
    def inferred(self) -> bool:
        """Whether the printed value is a reader's inference, which is no evidence."""
        return self.source.startswith("inferred")

    @property
    def number(self) -> Printed:
        """The printed value; `ValueError` if none is printed."""
        return parse(self.paper)

    @property
    def deviation(self) -> float | None:
        """The printed standard deviation; `None` where none is printed."""
        return float(self.paper_std) if self.paper_std and not self.inferred else None


def stands_for(paper_model: str, own: str, title: str = "") -> str:
    """Say which model stands in the place of one of `PAPER_MODELS`; `own` is empty where none ran."""
    paper = f"{PAPER_MODELS[paper_model]} ({paper_model})"
    if not own:
        return f"Nothing ran in the place of {paper}."
    if own == paper_model:
        return f"{paper} is the paper's own model."
    return (
        f"{title or own} ({own}) stands in the place of {paper}. It is not the paper's model: its numbers show how the "
        "methods compare on it and do not reproduce the printed ones."
    )


def title(number: int) -> str:
    """Return what the table is about.

    Raises:
        ValueError: If the table has no layout.
    """
    if number not in TITLES:
        raise ValueError(f"unknown table number {number!r}; built here are {tuple(TITLES)}: pass one of these")
    return TITLES[number]


def printed_places(number: int) -> list[Place]:
    """List the cells of a table in the order of the print; table 1 ends with RoBERTa-large, which the paper leaves out.

    Raises:
        ValueError: If the table has no layout.
    """
    title(number)
    found: list[Place] = []
    lines = paper_table(number)
    kept = {line["row"]: line["value"] for line in lines if line["column"] == K}
    for line in lines:
        row, column = line["row"], line["column"]
        behind = _meaning(number, row, column)
        if number in K_TABLES:
            behind["method"] = f"sparsegrad_{int(kept[row]) // 1000}k" if kept[row] else "sparsegrad"
        print_: dict[str, Any] = {"paper": line["value"], "paper_std": line["std"], "note": line["note"]}
        found.append(Place(number, row, column, **behind, **print_, source=f"{line['source']} table{number}"))
    if number == 1:
        name, note = PAPER_MODELS["roberta_large"], "the paper's table leaves RoBERTa-large out"
        for row, part in _PARTS.items():
            behind: dict[str, Any] = {"model": "roberta_large", "part": part, "note": note}
            found += [Place(1, row, f"{name} {kind}", kind, **behind) for kind in ("count", "share")]
    return found


def scores_of_row(place: Place) -> dict[str, Place]:
    """Task -> the printed score in the row of an average; of table 5, which prints averages alone, the model's own."""
    table = place.table if place.table in K_TABLES else GLUE_TABLES[place.model]
    found = [other for other in printed_places(table) if other.quantity == "score" and other.method == place.method]
    return {other.task: other for other in found if other.row == place.row or table != place.table}


def _meaning(number: int, row: str, column: str) -> dict[str, Any]:
    """Translate the labels of a cell."""
    if number == 1:
        name, quantity = column.rsplit(" ", 1)
        return {"quantity": quantity, "model": _model(name), "part": _PARTS[row]}
    if number in SEARCH_TABLES:
        model, method = SEARCH_TABLES[number]
        return {"quantity": column.replace(" ", "_"), "model": model, "method": method, "task": row.lower()}
    if number in EFFICIENCY_TABLES:
        speed = number == 7 or column == "Steps/Sec."
        task = "" if number == 3 or column == "AVG" else column.lower()
        quantity = "speed" if speed else "evaluation"
        return {"quantity": quantity, "model": "roberta_base", "method": VARIANTS[row], "task": task}
    if number == 5:
        name, column = column.rsplit(" ", 1)
        model = _model(name)
    else:
        tables = {table: model for model, table in GLUE_TABLES.items()} | K_TABLES | {LLAMA_TABLE: "llama2_7b"}
        model = tables[number]
    task = "" if column in _QUANTITIES else column.lower()
    return {"quantity": _QUANTITIES.get(column, "score"), "model": model, "method": METHODS.get(row, ""), "task": task}


def _model(label: str) -> str:
    return next(model for model, name in PAPER_MODELS.items() if name == label)
