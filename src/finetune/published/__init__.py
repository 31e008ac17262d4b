"""The paper's printed numbers and the authors' released logs, as data beside the code.

`tableNN.csv` holds the printed cells of one table (arXiv 2410.07383), `released_glue_per_seed.csv` the final score of
every GLUE run in the authors' logs, and `released_hyperparameters.csv` the settings of their run script and Optuna
database; `discrepancies.csv` says where paper and released code differ, and what is done here. The readers return the
project's words (`bert_base`, `full`, `stsb`) in place of the files' own.
"""

import csv
import re
from functools import cache
from importlib import resources

SEARCH_SEED = 34
"""Seed of the authors' search: its rows in the logs are copies of the best Optuna trial, not runs of a report."""

TASKS = {
    "stsb": "STSB",
    "cola": "CoLA",
    "mnli": "MNLI",
    "mrpc": "MRPC",
    "qnli": "QNLI",
    "qqp": "QQP",
    "rte": "RTE",
    "sst2": "SST2",
}
"""The eight tasks of the paper's average and their column labels, in the order of the columns (no WNLI)."""

_MODELS = {"bert_base": "bert-base-uncased", "roberta_base": "roberta-base", "roberta_large": "roberta-large"}
_METHODS = {"full": "ft", "lora": "lora", "sparsegrad": "sparse", "meprop": "meprop"}


def table_numbers() -> tuple[int, ...]:
    """Return the numbers of the paper's tables that are on file, ascending."""
    names = (re.fullmatch(r"table(\d+)\.csv", entry.name) for entry in resources.files(__name__).iterdir())
    return tuple(sorted(int(name[1]) for name in names if name))


def paper_table(number: int) -> list[dict[str, str]]:
    """Read the printed cells of one table of the paper.

    Args:
        number: Number of the table in the paper.

    Returns:
        One dict per cell, in the order of the file, with the text of `table`, `row`, `column`, `value`, `std`,
        `source` (`arxiv_pdf`, `inferred` or `unknown`) and `note`; an empty string where the paper prints nothing.

    Raises:
        ValueError: If no such table is on file.
    """
    known = table_numbers()
    if number not in known:
        raise ValueError(f"unknown table number {number!r}; on file are {known}: pass one of these")
    return read_csv(f"table{number:02d}.csv")


def released_scores(model: str, method: str, task: str) -> dict[int, float]:
    """Read the authors' logged scores of one model, method and task.

    Args:
        model: `bert_base`, `roberta_base`, `roberta_large`, or `llama2_7b` (no logs).
        method: `full`, `lora`, `sparsegrad`, or `meprop` (no logs).
        task: One of `TASKS`.

    Returns:
        Seed -> score in percent (Pearson for STS-B, Matthews for CoLA, accuracy otherwise), in the order of the file
        and without `SEARCH_SEED`. Empty where the logs hold nothing.

    Raises:
        ValueError: If a name is unknown.
    """
    wanted = _file_names(model, method, task)
    rows = read_csv("released_glue_per_seed.csv")
    found = [row for row in rows if (row["model"], row["method"], row["task"].lower()) == wanted]
    return {int(row["seed"]): float(row["score"]) for row in found if int(row["seed"]) != SEARCH_SEED}


def released_hyperparameters(model: str, method: str, task: str) -> dict[str, str]:
    """Read the authors' settings for one model, method and task.

    Args:
        model: As in `released_scores`.
        method: As in `released_scores`.
        task: One of `TASKS`.

    Returns:
        `batch_size` and `learning_rate` as written in the file, and `note` (where the setting was found).
        Empty where nothing was released.

    Raises:
        ValueError: If a name is unknown.
    """
    wanted = _file_names(model, method, task)
    rows = read_csv("released_hyperparameters.csv")
    found = [row for row in rows if (row["model"], row["method"], row["task"].lower()) == wanted]
    settings = {row["setting"]: row["value"] for row in found}
    return settings | {"note": found[0]["note"]} if found else {}


def discrepancies() -> list[dict[str, str]]:
    """Read where the paper and the released code differ (rows D1 to D30).

    Returns:
        One dict per row, in order, with the text of `row` ("D1"), `topic`, `paper`, `code`, `tables` and `figures` (the
        paper's numbers that it bears on, between spaces; empty: none) and what is done under the protocols `printed`,
        `released` and `sound`.
    """
    return read_csv("discrepancies.csv")


def _file_names(model: str, method: str, task: str) -> tuple[str, str, str]:
    """Translate the project's names to the files' own, and refuse unknown ones."""
    known = {"model": (model, [*_MODELS, "llama2_7b"]), "method": (method, [*_METHODS]), "task": (task, [*TASKS])}
    for kind, (name, allowed) in known.items():
        if name not in allowed:
            raise ValueError(f"unknown {kind} {name!r}; released logs are looked up by {', '.join(allowed)}")
    return _MODELS.get(model, ""), _METHODS[method], task


@cache
def read_csv(name: str) -> list[dict[str, str]]:
    """Read one CSV of this package, once; nobody changes its rows."""
    text = resources.files(__name__).joinpath(name).read_text(encoding="utf-8")
    return list(csv.DictReader(text.splitlines()))
