"""Printed cells against the released logs, and whether two of them are exchanged."""

import numpy as np
import pytest
from scipy import stats as distributions

from finetune.report.paper import released_check
from finetune.report.paper.released_check import averages_with, exchange_counts, exchanges, printed_cells


@pytest.fixture(scope="module")
def found():
    return {(one.model, one.task): one for one in exchanges(("lora", "sparsegrad"))}


def test_mrpc_and_rte_of_bert(found):
    mrpc, rte = found["bert_base", "mrpc"], found["bert_base", "rte"]
    assert (mrpc.printed, rte.printed) == ((83.8, 86.6), (64.6, 69.3))
    assert [round(value, 1) for value in (*mrpc.logged, *rte.logged)] == [86.5, 84.2, 67.1, 64.5]
    assert (mrpc.distance, mrpc.distance_exchanged) == pytest.approx((5.15, 0.45), abs=0.01)
    assert mrpc.p_holm == pytest.approx(0.0003, abs=5e-5) and mrpc.evidence > 15
    assert rte.p_chance < 0.05 and rte.p_holm == pytest.approx(0.58, abs=0.01)  # not beyond chance among 22 tasks
    assert (mrpc.verdict, rte.verdict) == (released_check.EXCHANGED, released_check.BY_CHANCE)
    # Deviations 0.6 and 0.5 as printed beside the logs' own: nearer in this order.
    assert mrpc.stds_as_printed and rte.stds_as_printed
    assert mrpc.copies == mrpc.copies_exchanged == rte.copies == rte.copies_exchanged == 0


def test_every_task_and_model_is_looked_at(found):
    assert len(found) == 8 + 8 + 6
    assert [key for key, one in found.items() if one.p_holm <= 0.05] == [("bert_base", "mrpc")]
    stsb = found["roberta_base", "stsb"]
    assert (stsb.copies, stsb.copies_exchanged) == (0, 2)  # each cell is the other method's logged mean
    mrpc = found["roberta_base", "mrpc"]
    assert (mrpc.copies, mrpc.verdict) == (2, released_check.NOT_EXCHANGED) and mrpc.evidence < 0


def test_evidence_is_the_log_likelihood_ratio(found):
    # Written out with normal densities, for equal numbers of runs.
    cells = {(cell.method, cell.task): cell for cell in printed_cells("bert_base")}
    lora, sparse = cells["lora", "mrpc"], cells["sparsegrad", "mrpc"]
    variances = [np.var(lora.logged, ddof=1), np.var(sparse.logged, ddof=1), 0.6**2 * 5 / 4, 0.5**2 * 5 / 4]
    v = np.mean(variances) * (1 / 5 + 1 / 5) + 0.1**2 / 12

    def likelihood(p1, p2):
        normal = distributions.norm(scale=np.sqrt(v))
        return normal.logpdf(p1 - lora.mean) + normal.logpdf(p2 - sparse.mean)

    expected = likelihood(86.6, 83.8) - likelihood(83.8, 86.6)
    assert found["bert_base", "mrpc"].evidence == pytest.approx(expected)


def test_chance_is_how_often_runs_without_an_exchange_give_as_much():
    generator = np.random.default_rng(5)
    values = []
    for _ in range(4000):
        samples = generator.normal(80, 2, (4, 5))
        s2 = samples.var(axis=1, ddof=1).mean()
        p1, p2, l1, l2 = samples.mean(axis=1)
        values.append(-(p1 - p2) * (l1 - l2) / (s2 * 2 / 5))
    for threshold in (0.0, 0.5, 2.0):
        share = np.mean(np.array(values) >= threshold)
        assert released_check._chance(threshold, (5, 5, 5), 0) == pytest.approx(share, abs=0.02)


def test_matches():
    cells = {(model, c.method, c.task): c for model in ("bert_base", "roberta_large") for c in printed_cells(model)}
    assert cells["bert_base", "full", "cola"].match == "rounded" and not cells["bert_base", "full", "cola"].cut_off
    assert cells["bert_base", "full", "rte"].match == "other"
    assert len(cells["roberta_large", "full", "cola"].logged) == 3  # of five: those of the released script
    assert cells["roberta_large", "full", "cola"].match == "rounded"
    assert ("bert_base", "meprop", "cola") not in cells and ("roberta_large", "full", "mnli") not in cells


def test_how_often_an_exchange_fits_better():
    counts = {(count["model"], count["methods"]): count for count in exchange_counts()}
    assert len(counts) == 9
    bert = counts["bert_base", ("sparsegrad", "lora")]
    assert (bert["better"], bert["tasks"], bert["p"]) == (3, 8, pytest.approx(1 - (1 + 8 + 28) / 256))


def test_averages_after_an_exchange():
    found = averages_with(["mrpc", "rte"], "bert_base", ("lora", "sparsegrad"))
    assert found["lora"] == pytest.approx((81.6, 81.6 + (86.6 - 83.8 + 69.3 - 64.6) / 8, 82.3285), abs=1e-3)
    assert found["sparsegrad"] == pytest.approx((82.575, 82.575 - 7.5 / 8, 81.6639), abs=1e-3)
