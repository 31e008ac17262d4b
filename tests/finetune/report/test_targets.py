"""What was asked of a step on a card: each quantity is looked up where a card's records have it."""

from pathlib import Path

import pytest

from finetune.report.evidence.step_evidence import Setting, Step
from finetune.report.tables.targets import TARGETS, Found, fill, profile_rows, read_found, target_rows
from finetune.store import records

BEFORE = Path(__file__).parents[3] / "results/paper/before"


def setting(place, **modes):
    """Mode -> variant -> (milliseconds, bytes); full fine-tuning is in all of them."""
    steps = {}
    for mode, found in modes.items():
        time, peak = found["full"]
        steps[mode] = {n: Step(t / 1000, p, t / time, p / peak, place) for n, (t, p) in found.items()}
    return Setting(place, "m", "M", place.split("/")[1], "bf16", 32, 16.0, False, steps)


FOUND = Found(
    {
        one.place: one
        for one in (
            setting(
                "roberta_base-sound/cola",
                eager={"full": (40, 10), "folded": (44, 8), "meprop": (48, 9), "lora": (30, 9), "truncated": (36, 6.9)},
                graphs={"full": (8, 10), "lora": (10, 9), "truncated": (9, 7)},
                before={"full": (40, 10), "folded": (120, 8), "meprop": (90, 9)},
            ),
            setting("roberta_base-sound/mrpc", eager={"full": (40, 10), "folded": (50, 8)}),
            setting("roberta_base-sound/tokens16", graphs={"full": (6, 10), "folded": (9, 9)}),
            setting(
                "roberta_base-sound/tokens128",
                graphs={"full": (10, 10), "folded": (14, 9), "lora": (16, 9), "truncated_input": (11, 8)},
            ),
            setting("llama2_7b/rows8", eager={"full": (300, 40), "truncated_input": (270, 30), "lora": (300, 31)}),
        )
    },
    counts={"eager": {"waits": 7, "operations": 390}, "before": {"waits": 288, "operations": 2522}},
    hosvd={"before": 1.67},
)


def test_each_quantity_is_looked_up_in_its_mode():
    rows = {what: rest for what, *rest in target_rows(FOUND)}
    assert len(rows) == len(TARGETS) == 15
    assert rows["waits a step, 24 layers"] == ["288", "at most 8", "7", "yes"]
    assert rows["operations of the optimizer's step"] == ["2,522", "at most 400", "390", "yes"]
    assert rows["folded / full, bf16, CoLA and MRPC"] == ["3.000, -", "at most 1.15", "1.100, 1.250", "no"]
    graphs = rows["folded / full in graphs, bf16: 512 and 4,096 tokens, CoLA and MRPC"]
    assert graphs == ["-", "at most 1.5, 1.3, 1.5, 1.3", "1.500, 1.400, -, -", "no"]
    assert rows["folded / full, fp32, padded to 128"][2:] == ["-", "not measured"]
    assert rows["MeProp / full, bf16, CoLA and MRPC"] == ["2.250, -", "at most 1.1", "1.200, -", "no"]
    gain = rows["eager / graphs, CoLA: full, LoRA, truncated"]
    assert gain == ["-", "at least 3", "5.00, 3.00, 4.00", "yes"]
    assert rows["truncated (the faster) / LoRA in graphs, 4,096 tokens: bf16, fp32"][2:] == [
        "0.688, -",
        "partly measured",
    ]
    assert rows["peak, truncated / full: CoLA, MRPC, padded"][2:] == ["0.690, -, -", "partly measured"]
    assert rows["LLaMa-2-7B, 8 rows: truncated (inputs) / LoRA"][2:] == ["0.900", "yes"]
    assert rows["the same, peak"][2:] == ["0.968", "no"]
    assert rows["seconds of a HOSVD, 11008 x 4096"] == ["1.67", "at most 1.7", "-", "not measured"]


def test_records_are_read_from_the_folders_of_a_card(tmp_path):
    entries = [
        {"way": "streaming", "status": "finished", "seconds": {"factors": 1.5}},
        {"way": "streaming", "status": "not run"},
        {"way": "tensorly", "status": "finished", "seconds": {"factors": 0.1}},
    ]
    cases = [{"shape": [11008, 4096], "entries": entries}, {"shape": [3072, 768], "entries": entries[2:]}]
    records.write_json(tmp_path / "hosvd_cost.json", {"cases": cases})
    records.write_json(tmp_path / "counts.json", {"waits": 3})
    found = read_found(tmp_path)
    assert (found.hosvd, found.counts, found.steps) == ({"eager": 1.5}, {"eager": {"waits": 3}}, {})
    assert read_found(BEFORE.parent).hosvd["before"] == pytest.approx(1.6736, abs=1e-4)


def test_tables_of_a_page_are_replaced_whole(tmp_path):
    page = "a\n<!-- targets -->\n| stale |\n| --- |\nb\n<!-- profile -->\nc\n"
    once = fill(page, tmp_path)
    assert once.startswith("a\n<!-- targets -->\n| quantity |") and once.endswith("\nb\n<!-- profile -->\nc\n")
    assert "stale" not in once
    parts = [{"name": "rotate", "ms": 1.0}, {"name": "select", "ms": 3.0}]
    records.write_json(tmp_path / "profile.json", {"parts": parts, "step_ms": 5.0, "mode": "eager", "tokens": 4096})
    twice = fill(once, tmp_path)
    assert (
        "| select | 3.00 | 60% |\n| rotate | 1.00 | 20% |\n| the whole step, timed in one | 5.00 | 100% |\nc\n" in twice
        and fill(twice, tmp_path) == twice
    )
    assert profile_rows({"parts": parts, "step_ms": 5.0})[0][0] == "select"
    with pytest.raises(ValueError, match="no line <!-- targets -->"):
        fill("nothing", tmp_path)
