"""Printed averages against their rows: what is found in the paper's tables, and the arithmetic on tables of our own."""

import pytest

from finetune.published import TASKS
from finetune.report.paper.k_notes import explain
from finetune.report.paper.printed_averages import check_averages, counts


def found(verdict):
    return {(check.table, check.row) for check in check_averages() if check.verdict == verdict}


def test_averages_of_the_paper_that_do_not_follow():
    assert found("does not follow") == {
        (4, "LoRA"),
        (7, "LoRA"),
        (8, "SparseGrad, Sparse-by-Dense"),
        (9, "MeProp"),
        (10, "LoRA"),
        (10, "SparseGrad"),
        (12, "100"),
    }
    assert found("follows only if cut off") == {(8, "Regular FT"), (8, "LoRA"), (9, "Regular FT")}
    assert found("follows only with an odd cell") == {(11, "4.2"), (12, "0.8")}
    checks = check_averages()
    repeats = {(check.table, check.row): check.twin for check in checks if check.repeats}
    assert repeats == {(11, "100"): "table 9, SparseGrad", (12, "100"): "table 10, SparseGrad"}
    # Of distinct rows: table 12's first row is table 10's, printed again, so that 6 of 28 do not follow.
    assert len(checks) == 30 and counts(checks) == {
        "does not follow": 6,
        "follows only with an odd cell": 2,
        "follows only if cut off": 3,
        "cannot be told": 6,
        "follows": 11,
    }


def test_no_inferred_cell_is_evidence():
    checks = {(check.table, check.row): check for check in check_averages()}
    twelve = checks[12, "100"]  # its own SST2, 94.2, is inferred: the evidence is table 10's printed one
    assert (twelve.missing, twelve.twin, twelve.twin_value) == (("SST2",), "table 10, SparseGrad", "94.2")
    assert twelve.implied == (91.55, 93.05) and twelve.mean is None
    assert checks[12, "1"].verdict == "cannot be told" and checks[12, "1"].missing == ("SST2",)


def table(average, *values, label="row", **changes):
    cells = [("AVG", average), *zip(TASKS.values(), values, strict=False)]
    return [
        {"row": label, "column": column, "value": value, "std": "", "source": "arxiv_pdf"} | changes.get(column, {})
        for column, value in cells
    ]


@pytest.mark.parametrize(
    ("average", "verdict"),
    [
        # Eight cells of 50.0 are 49.95 to 50.05 before rounding.
        ("50.0", "follows"),
        ("50.1", "follows"),  # both could be 50.05, a half that goes either way
        ("49.9", "follows"),
        ("49", "follows only if cut off"),  # rounded cells, average cut off: 49 to 50
        ("50.2", "does not follow"),
        ("49.8", "does not follow"),
        ("50", "follows"),
        ("50.04", "follows"),
        ("50.06", "follows only if cut off"),  # cells cut off: 50 to 50.1
        ("50.11", "does not follow"),
    ],
)
def test_rounding_and_cutting_off(average, verdict):
    (check,) = check_averages({9: table(average, *["50.0"] * 8)})
    assert check.verdict == verdict
    assert bool(check.readings) == (verdict == "follows only if cut off")
    assert (check.mean, check.low, check.high) == (50.0, 49.95, 50.05)


def test_a_missing_cell_is_held_against_what_else_is_printed():
    full, seven = table("50.0", *["50.0"] * 8), ["50.0"] * 7 + [""]

    def second(average, *values, first=9, **changes):
        return check_averages({first: full, 11: table(average, *values, label="1", **changes)})[1]

    near = second("49.9", *seven)
    assert near.twin is None  # another average: not the same row
    assert near.verdict == "cannot be told" and near.implied == pytest.approx((48.45, 49.95))
    far = second("49.5", *seven)
    assert far.verdict == "follows only with an odd cell" and far.elsewhere == (50.0, 50.0)
    other = second("49.5", *seven, first=10)
    assert other.verdict == "cannot be told" and other.elsewhere is None  # of another model: tells nothing
    same = second("50.0", *seven)
    assert (same.verdict, same.twin_value, same.repeats) == ("follows", "50.0", True)
    inferred = {"SST2": {"source": "inferred"}}
    assert second("49.5", *["50.0"] * 7, "46.0", **inferred).verdict == "follows only with an odd cell"
    two = second("50.0", *["50.0"] * 6)
    assert (two.verdict, len(two.missing), two.implied) == ("cannot be told", 2, None)


def test_explanations():
    texts = {(check.table, check.row): explain(check) for check in check_averages()}
    for place, words in {
        (4, "LoRA"): ("does not follow", "84.8625", "84.8125", "84.9125"),
        (9, "Regular FT"): ("cells cut off, average rounded",),
        (12, "100"): ("91.55 to 93.05", "table 10, SparseGrad", "94.2"),
    }.items():
        assert all(word in texts[place] for word in words), texts[place]
    assert check_averages({6: table("", *["50.0"] * 8)}) == []  # no average: no row
