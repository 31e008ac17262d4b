"""What each cell of the paper's tables 1, 4, 5 and 9 to 15 holds, in the project's words.

Rows and columns are read from the printed tables themselves (`finetune.published`), so that a built table has exactly
the paper's labels; a layout adds which model, method and task stand behind a label.
"""

from dataclasses import dataclass

from finetune.published import TASKS, paper_table

METHODS = {"Regular FT": "full", "LoRA": "lora", "SparseGrad": "sparsegrad", "MeProp": "meprop"}
"""Row label -> method."""

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

_SEARCH_TABLES = {13: ("bert_base", "sparsegrad"), 14: ("bert_base", "full"), 15: ("roberta_base", "full")}
_PARTS = {"Full model": "total", "MLP": "mlp", "Embeddings": "embeddings", "Attention": "attention"}
_TITLES = {
    1: "parameters of the models by part",
    4: "RoBERTa-large on GLUE",
    5: "trainable parameters and mean GLUE score of BERT and RoBERTa-base",
    9: "BERT on GLUE",
    10: "RoBERTa-base on GLUE",
    11: "SparseGrad's score against k, BERT",
    12: "SparseGrad's score against k, RoBERTa-base",
    13: "best batch size and learning rate, SparseGrad on BERT",
    14: "best batch size and learning rate, full fine-tuning of BERT",
    15: "best batch size and learning rate, full fine-tuning of RoBERTa-base",
}
TABLES = tuple(_TITLES)
"""Numbers of the tables with a layout."""


@dataclass(frozen=True)
class Cell:
    """One cell: the paper's labels and print, and what stands behind them.

    Attributes:
        table: Number of the table.
        row: Row label as printed.
        column: Column label as printed.
        quantity: `count`, `share`, `trainable`, `trainable_per_layer`, `k`, `average`, `score`, `batch_size` or
            `learning_rate`.
        model: The paper's model, one of `PAPER_MODELS`.
        method: One of `METHODS`' values, or a variant such as `sparsegrad_18k`; empty in table 1.
        task: One of `TASKS`; empty where the cell is not about one task.
        part: Field of `ParameterCounts`, table 1 only.
        paper: The printed value, empty where there is none.
        paper_std: The printed standard deviation, empty where there is none.
        source: Where the printed value comes from.
        note: Remark on the printed value.
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

    @property
    def inferred(self) -> bool:
        """Whether the printed value is a reader's inference, which is no evidence."""
        return self.source.startswith("inferred")


def title(number: int) -> str:
    """Return what the table is about.

    Raises:
        ValueError: If the table has no layout.
    """
    _known(number)
    return _TITLES[number]


def cells(number: int) -> list[Cell]:
    """List the cells of a table in the order of the print; table 1 ends with RoBERTa-large, which the paper leaves out.

    Args:
        number: One of `TABLES`.

    Raises:
        ValueError: If the table has no layout.
    """
    _known(number)
    found = []
    lines = paper_table(number)
    kept = {line["row"]: line["value"] for line in lines if line["column"] == K}
    for line in lines:
        behind = _meaning(number, line["row"], line["column"])
        if number in K_TABLES:
            behind["method"] = k_variant(kept[line["row"]])
        source = f"{line['source']} table{number}"
        printed = {"paper": line["value"], "paper_std": line["std"], "source": source, "note": line["note"]}
        found.append(Cell(number, line["row"], line["column"], **behind, **printed))
    if number == 1:
        found += _extra_model("roberta_large")
    return found


def printed_stds(cell: Cell) -> dict[str, float | None]:
    """Return the printed standard deviation of each task of a cell's row, in percent; `None` where none is printed.

    Args:
        cell: A score or an average. Table 5 prints averages alone: its rows are those of the model's own table.
    """
    row = _scores_of_row(cell)
    return {other.task: float(other.paper_std) if other.paper_std and not other.inferred else None for other in row}


def printed_scores(cell: Cell) -> dict[str, float]:
    """Return the printed score of each task of a cell's row, in percent (argument as in `printed_stds`)."""
    return {other.task: float(other.paper) for other in _scores_of_row(cell) if other.paper and not other.inferred}


def _scores_of_row(cell: Cell) -> list[Cell]:
    table = cell.table if cell.table in K_TABLES else GLUE_TABLES[cell.model]
    found = [other for other in cells(table) if other.quantity == "score" and other.method == cell.method]
    return [other for other in found if other.row == cell.row or table != cell.table]


def k_variant(k: str) -> str:
    """Name the method behind a row of tables 11 and 12: `sparsegrad_18k`, or `sparsegrad` where no k is known."""
    return f"sparsegrad_{int(k) // 1000}k" if k else "sparsegrad"


def _known(number: int) -> None:
    if number not in _TITLES:
        raise ValueError(f"unknown table number {number!r}; built here are {TABLES}: pass one of these")


def _meaning(number: int, row: str, column: str) -> dict[str, str]:
    """Translate the labels of a cell."""
    if number == 1:
        name, quantity = column.rsplit(" ", 1)
        return {"quantity": quantity, "model": _model(name), "part": _PARTS[row]}
    if number in _SEARCH_TABLES:
        model, method = _SEARCH_TABLES[number]
        return {"quantity": column.replace(" ", "_"), "model": model, "method": method, "task": row.lower()}
    if number == 5:
        name, column = column.rsplit(" ", 1)
        model = _model(name)
    else:
        model = K_TABLES.get(number) or next(model for model, table in GLUE_TABLES.items() if table == number)
    quantities = {
        "#Trainable": "trainable",
        "#Trainable Model": "trainable",
        "#Trainable MLP layer": "trainable_per_layer",
        K: "k",
        "AVG": "average",
    }
    task = "" if column in quantities else column.lower()
    return {"quantity": quantities.get(column, "score"), "model": model, "method": METHODS.get(row, ""), "task": task}


def _model(label: str) -> str:
    return next(model for model, name in PAPER_MODELS.items() if name == label)


def _extra_model(model: str) -> list[Cell]:
    """Cells of table 1 for a model that the paper's table leaves out."""
    note = f"the paper's table leaves {PAPER_MODELS[model]} out"
    return [
        Cell(1, row, f"{PAPER_MODELS[model]} {quantity}", quantity, model, part=part, note=note)
        for row, part in _PARTS.items()
        for quantity in ("count", "share")
    ]
