"""The script that compares results with another commit's sees a changed cell, a gone one and a moved p-value."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "experiments" / "compare_results.py"
HEAD = "row,column,ours,ours_low,ours_high,n,paper,paper_std,released,source,verdict,protocol,model,records\n"
TABLE = HEAD + "LoRA,CoLA,58.3,55.1,61.2,5,58.4,2.3,,said,agrees,printed,m,a.json\nLoRA,RTE,,,,,64.6,2.1,,,not run,,,\n"
PAIRS = [{"first": "lora", "second": "full", "p": 0.25, "mean": 1.5}, {"first": "lora", "second": "meprop", "mean": 2}]


def write(folder, table=TABLE, pairs=PAIRS):
    (folder / "tables").mkdir(parents=True, exist_ok=True)
    (folder / "tables" / "table_09.csv").write_text(table)
    (folder / "statistics.json").write_text(json.dumps({"schema": 1, "pairs": pairs}))


@pytest.fixture
def compare(tmp_path):
    git = ["git", "-c", "user.name=t", "-c", "user.email=t@t", "-C", str(tmp_path)]
    write(tmp_path / "results" / "test")
    for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "start"]):
        subprocess.run([*git, *command], check=True)

    def run(*arguments, **changes):
        write(tmp_path / "results" / "test", **changes)
        command = [sys.executable, str(SCRIPT), "test", "--commit", "HEAD", *arguments]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        return done.returncode, done.stdout

    return run


def test_other_words_order_and_new_cells_are_no_fault(compare):
    table = TABLE.replace("said", "said in other words") + "DoRA,CoLA,50,,,1,,,,,not comparable,,,\n"
    code, said = compare(table=table, pairs=[*PAIRS[::-1], {"first": "dora", "second": "full", "mean": 3}])
    assert code == 0 and " 9 new" in said


@pytest.mark.parametrize(
    ("changes", "path"),
    [
        ({"table": TABLE.replace("58.3", "58.30001")}, "differs: tables/table_09.csv/LoRA/CoLA/ours: 58.3 -> 58.30001"),
        ({"table": TABLE.replace("agrees", "differs")}, "differs: tables/table_09.csv/LoRA/CoLA/verdict"),
        ({"table": TABLE.replace("CoLA,58.3", "CoLA,")}, "differs: tables/table_09.csv/LoRA/CoLA/ours: 58.3 -> "),
        ({"table": TABLE.replace("RTE,", "RTE2,")}, "gone: tables/table_09.csv/LoRA/RTE/"),
        ({"pairs": [PAIRS[0] | {"mean": 1.6}, PAIRS[1]]}, "differs: statistics.json/pairs/lora - full/mean"),
        ({"pairs": [PAIRS[0] | {"p": 0.3}, PAIRS[1]]}, "differs: statistics.json/pairs/lora - full/p"),
        ({"pairs": PAIRS[:1]}, "gone: statistics.json/pairs/lora - meprop/mean"),
    ],
)
def test_a_planted_change_is_found(compare, changes, path):
    code, said = compare(**changes)
    assert code == 1 and path in said
    assert compare("--allow", r"RTE|CoLA|pairs/", **changes)[0] == 0


def test_sampled_p_values_may_move_a_little_and_rounding_is_none(compare):
    code, said = compare(pairs=[PAIRS[0] | {"p": 0.252, "mean": 1.5 + 1e-12}, PAIRS[1]])
    assert code == 0 and "sampled: statistics.json/pairs/lora - full/p: 0.25 -> 0.252" in said
    assert compare("--tolerance", "1e-14", pairs=[PAIRS[0] | {"mean": 1.5 + 1e-12}, PAIRS[1]])[0] == 1
