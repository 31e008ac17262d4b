"""What is odd in the print: labels of tables 11 and 12, cells that are no evidence, averages that do not add up."""

from collections.abc import Sequence

from finetune.published import paper_table
from finetune.report.model import Note
from finetune.report.paper import printed, printed_averages
from finetune.report.paper.layouts import PAPER_MODELS, K, Place

ENTRIES = 3072 * 768
"""Entries of one MLP matrix of BERT-base and RoBERTa-base, of which k is a share."""


def k_notes(cells: Sequence[Place]) -> list[str]:
    """Say what is known of the rows of table 11 or 12, as found in its printed cells."""
    number, model = cells[0].table, PAPER_MODELS[cells[0].model]
    notes = [
        "Row labels are shares of one MLP matrix in percent as printed; k itself is not printed but inferred from the "
        f"released run script's grid. Of a matrix of another width than {model}'s ({ENTRIES:,} entries) the same share "
        f"is kept. Column {K!r} is held against the row's label, whichever model ran."
    ]
    for cell in cells:
        if cell.quantity == "k" and cell.paper:
            label, share = printed.parse(cell.row.split()[0]), 100 * int(cell.paper) / ENTRIES
            if label.round(share).number != label.number:
                how = "the share cut off" if label.truncate(share).number == label.number else "another share"
                notes.append(f"Row {cell.row}: {int(cell.paper):,} is {share:.3f} %; the label is {how}.")
    for check in printed_averages.check_averages():
        if check.table == number and check.repeats:
            notes.append(
                f"Row {check.row}: every printed score and deviation is that of {check.twin}, whose k is the main one; "
                f"it is no run with {check.row} % of the entries. Ours in this row is SparseGrad with the protocol's "
                "k, or density."
            )
    lines = [(f"row {line['row']} {line['column']}", line) for line in paper_table(number) if line["column"] != K]
    inferred = [f"{where} {line['value']}" for where, line in lines if line["source"] == "inferred"]
    notes += [f"Inferred, not printed, and compared with nothing: {'; '.join(inferred)}."] if inferred else []
    unknown = [where for where, line in lines if line["source"] == "unknown"]
    return notes + ([f"Not known: {'; '.join(unknown)}."] if unknown else [])


def average_notes(number: int) -> list[Note]:
    """Name the printed averages of a table that do not follow from their rows, or lack a printed cell."""
    checks = [check for check in printed_averages.check_averages() if check.table == number]
    odd = [check for check in checks if check.verdict != printed_averages.FOLLOWS or check.implied is not None]
    return [Note("print", f"{check.row}, AVG as printed ({check.printed}): {explain(check)}.") for check in odd]


def explain(check: printed_averages.AverageCheck) -> str:
    """One clause on a printed average: what its row says of it."""
    if check.mean is not None:
        allowed = f"the printed cells' mean is {check.mean:.6g}, between {check.low:.6g} and {check.high:.6g} before"
        cut = f"; it would follow with {' or '.join(check.readings)}" if check.readings else ""
        return f"{check.verdict}: {allowed} rounding{cut}"
    if check.implied is None:
        return f"{check.verdict}: {', '.join(check.missing)} are not printed"
    low, high = check.implied
    parts = [f"{check.verdict}: {check.missing[0]} is not printed and would have to lie in {low:.2f} to {high:.2f}"]
    if check.twin_value is not None:
        parts.append(f"{check.twin} prints the same row with {check.twin_value}")
    elif check.elsewhere is not None:
        parts.append(f"printed of this model elsewhere: {check.elsewhere[0]:g} to {check.elsewhere[1]:g}")
    return ", ".join(parts)
