"""The paper's numbers and the released logs, as read."""

import statistics

import pytest

from finetune import published


def test_tables_on_file():
    assert published.table_numbers() == (1, *range(3, 16))


@pytest.mark.parametrize("number", published.table_numbers())
def test_every_table_reads_with_unique_cells(number):
    cells = published.paper_table(number)
    assert len({(cell["row"], cell["column"]) for cell in cells}) == len(cells) > 0
    assert all(
        set(cell) == {"table", "row", "column", "value", "std", "source", "note"} and cell["table"] == f"table{number}"
        for cell in cells
    )


def test_known_cell():
    cells = {(cell["row"], cell["column"]): cell for cell in published.paper_table(9)}
    assert (cells["SparseGrad", "RTE"]["value"], cells["SparseGrad", "RTE"]["std"]) == ("69.3", "2.9")


@pytest.mark.parametrize("number", [0, 2, 16, "9"])
def test_unknown_table(number):
    with pytest.raises(ValueError, match=r"unknown table number .*pass one of these"):
        published.paper_table(number)


@pytest.mark.parametrize(("method", "average"), [("full", 82.00), ("lora", 82.33), ("sparsegrad", 81.66)])
def test_bert_averages_over_eight_tasks_and_five_seeds(method, average):
    scores = [published.released_scores("bert_base", method, task) for task in published.TASKS]
    assert [len(found) for found in scores] == [5] * 8
    assert round(statistics.fmean(statistics.fmean(found.values()) for found in scores), 2) == average


def test_the_searchs_seed_is_no_seed_of_the_report():
    assert published.released_scores("bert_base", "full", "stsb") == {
        42: 89.025,
        3705: 88.72,
        2023: 90.121,
        37: 89.867,
        7777: 88.933,
    }


def test_where_nothing_was_logged():
    assert published.released_scores("bert_base", "meprop", "cola") == {}
    assert published.released_scores("roberta_large", "full", "mnli") == {}
    assert published.released_scores("llama2_7b", "full", "cola") == {}
    assert published.released_hyperparameters("roberta_base", "meprop", "cola") == {}


def test_released_hyperparameters():
    found = published.released_hyperparameters("bert_base", "sparsegrad", "qnli")
    assert (found["batch_size"], found["learning_rate"]) == ("16", "1.94e-05")
    assert found["note"]


@pytest.mark.parametrize(
    ("names", "kind"),
    [
        (("bert", "full", "cola"), "model"),
        (("bert_base", "ft", "cola"), "method"),
        (("bert_base", "full", "CoLA"), "task"),
    ],
)
def test_unknown_names(names, kind):
    with pytest.raises(ValueError, match=f"unknown {kind} .*looked up by"):
        published.released_scores(*names)
    with pytest.raises(ValueError, match=f"unknown {kind} .*looked up by"):
        published.released_hyperparameters(*names)
