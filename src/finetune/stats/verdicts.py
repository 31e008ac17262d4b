"""The words of every judgement on numbers, their order, their marks and their meanings; the level behind them.

Tables, pages, figures and statistics take them from here, so that none of them compares words of its own.
"""

CONFIDENCE = 0.95
"""Coverage of every interval."""

LEVEL = 0.05
"""Largest corrected p-value that separates two methods."""

AGREES = "agrees"
DIFFERS = "differs"
INCONCLUSIVE = "inconclusive"
NOT_COMPARABLE = "not comparable"
NOT_RUN = "not run"

VERDICTS = (AGREES, DIFFERS, INCONCLUSIVE, NOT_COMPARABLE, NOT_RUN)
"""What a value of ours says of the printed one, in the order of legends (`intervals.verdict` has the rule)."""

MARKS = {AGREES: "=", DIFFERS: "≠", INCONCLUSIVE: "?", NOT_COMPARABLE: "n/c", NOT_RUN: "–"}
"""Verdict -> its mark in a cell."""

MEANINGS = {
    AGREES: "within the margin of the printed value, or the same printed digits",
    DIFFERS: "away from the printed value by more than chance and rounding, or other digits",
    INCONCLUSIVE: "too few runs to say either",
    NOT_COMPARABLE: "another model, protocol, size or machine than the paper's, or nothing printed",
    NOT_RUN: "no finished run behind the cell",
}
"""Verdict -> what it says."""

FIRST_BETTER = "first is better"
SECOND_BETTER = "second is better"
NOT_SEPARATED = "not separated"


def of_test(difference: float, p: float | None, *, lower_is_better: bool = False) -> str:
    """Say what a two-sided test of a paired difference tells.

    Args:
        difference: First minus second.
        p: Corrected p-value, up to `LEVEL` of two that are separated; `None` where no test was possible.
        lower_is_better: Whether a smaller value is the better one, as of a loss.
    """
    if p is None or p > LEVEL:
        return NOT_SEPARATED
    return FIRST_BETTER if (difference > 0) != lower_is_better else SECOND_BETTER


BETTER = "better"
WORSE = "worse"
EQUAL = "equal"
UNDECIDED = "undecided"

EQUIVALENCES = {
    BETTER: "the first method's score is the better one",
    WORSE: "the second method's is",
    EQUAL: "the difference lies within the margin stated before the runs",
    UNDECIDED: "too few seeds or examples to say either",
}
"""What a test of equivalence says of two methods -> its meaning."""


def of_equivalence(value: float, p: float | None, p_equal: float | None, *, lower_is_better: bool = False) -> str:
    """Say whether a method is better than another, worse, or equal within the margin.

    A difference that is there and within the margin is `equal`: the margin says what does not matter.

    Args:
        value: First minus second.
        p: Corrected p-value that the difference is 0; `None` where no test was possible.
        p_equal: Corrected p-value that it is beyond the margin; likewise.
        lower_is_better: Whether a smaller value is the better one.
    """
    if p_equal is not None and p_equal <= LEVEL:
        return EQUAL
    separated = of_test(value, p, lower_is_better=lower_is_better)
    return {FIRST_BETTER: BETTER, SECOND_BETTER: WORSE}.get(separated, UNDECIDED)
