"""README and docs: every number of their tables is one of a committed record, every link leads somewhere."""

import csv
import io
import json
import re
from pathlib import Path
from statistics import fmean

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from finetune.config.check import check_script
from finetune.report.tables.targets import fill
from finetune.store.catalog import read_methods
from finetune.trust.campaign import table

ROOT = Path(__file__).parents[1]
LOCAL = ROOT / "results" / "local"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", *sorted((ROOT / "docs").glob("*.md"))]
LABELS = {facts.label: name for name, facts in read_methods(ROOT / "conf").items()}
TRUST = ("kills", "faults")
TASKS = {"STS-B": "stsb", "MRPC": "mrpc", "CoLA": "cola"}


def table_after(page, marker):
    """Rows of the Markdown table below ``<!-- marker -->``, as lists of texts, the header first."""
    lines = page.read_text().partition(f"<!-- {marker} -->\n")[2].splitlines()
    rows = []
    for line in lines:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    assert len(rows) > 2, f"{page.name}: no table after {marker}"
    return [rows[0], *rows[2:]]


def with_interval(value, places, sign=""):
    mean = value["mean"] if "mean" in value else value["value"]
    return f"{mean:{sign}.{places}f} [{value['low']:{sign}.{places}f}, {value['high']:{sign}.{places}f}]"


@pytest.fixture(scope="module")
def statistics():
    return json.loads((LOCAL / "statistics.json").read_text())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_pictures_exist(page):
    targets = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text())
    missing = [target for target in targets if "://" not in target and not (page.parent / target).exists()]
    assert not missing


def test_the_readme_is_for_newcomers():
    assert len((ROOT / "README.md").read_text().split()) <= 1500


def test_the_thirty_points_are_those_of_the_published_list():
    rows = list(csv.DictReader(io.StringIO((ROOT / "src/finetune/published/discrepancies.csv").read_text())))
    columns = ("row", "topic", "paper", "code", "tables", "printed", "released", "sound")
    lines = [line for line in (ROOT / "docs/protocol.md").read_text().splitlines() if re.match(r"\| D\d", line)]
    assert (
        lines == ["| " + " | ".join(row[name] or "-" for name in columns) + " |" for row in rows] and len(lines) == 30
    )


def test_scores_are_those_of_the_statistics(statistics):
    (entry,) = [one for one in statistics["runs"] if one["model"] == "minilm"]
    head, *rows = table_after(ROOT / "docs/results.md", "glue")
    tasks = [TASKS[cell.partition(",")[0]] for cell in head[1:]]
    for label, *cells in rows:
        summary = entry["comparison"]["methods"][LABELS[label]]["tasks"]
        assert cells == [with_interval(summary[task], 1) for task in tasks], label


def test_differences_are_those_of_the_statistics(statistics):
    (entry,) = [one for one in statistics["runs"] if one["model"] == "minilm"]
    pairs = {
        (pair["first"], pair["second"]): pair["mean"]["difference"]
        for family in entry["comparison"]["families"]
        for pair in family["pairs"]
    }
    for labels, points in table_after(ROOT / "docs/results.md", "pairs")[1:]:
        first, second = (LABELS[label] for label in labels.split(", ", 1))
        difference = pairs.get((first, second))
        assert points == with_interval(difference, 2, "+"), labels


@pytest.mark.parametrize("page", ["README.md", "docs/results.md"])
def test_losses_are_those_of_the_statistics(page, statistics):
    (decoder,) = statistics["decoders"]
    pairs = {
        (pair["first"], pair["second"]): pair["mean"]["difference"]
        for family in decoder["comparison"]["families"]
        for pair in family["pairs"]
    }
    _, *rows = table_after(ROOT / page, "decoder")
    for label, share, loss, difference in rows:
        name = LABELS[label]
        (found,) = decoder["comparison"]["methods"][name]["tasks"].values()
        trained = decoder["shares"][name]
        assert (share, loss) == (f"{trained:.{2 if trained >= 1 else 3}f} %", with_interval(found, 3)), label
        if name == "sparsegrad":
            assert not difference
        elif (name, "sparsegrad") in pairs:
            assert difference == with_interval(pairs[name, "sparsegrad"], 3, "+"), label
        else:
            found = pairs["sparsegrad", name]
            turned = {"value": -found["value"], "low": -found["high"], "high": -found["low"]}
            assert difference == with_interval(turned, 3, "+"), label


def test_base_size_on_stsb_is_that_of_its_records_and_their_statistics():
    results = ROOT / "results" / "hour_stsb"
    statistics = json.loads((results / "statistics.json").read_text())
    (scores,), (verdicts,) = statistics["runs"], statistics["equivalence"]["models"]
    _, *rows = table_after(ROOT / "docs/results.md", "stsb")
    assert {LABELS[row[0]] for row in rows} == {path.name for path in (results / "runs/mpnet_base").iterdir()}
    for label, rate, share, score in rows:
        records = [json.loads(p.read_text()) for p in (results / "runs/mpnet_base" / LABELS[label]).glob("stsb-seed*")]
        parameters = records[0]["parameters"]
        assert len(records) == 5 and {r["hyperparameters"]["learning_rate"] for r in records} == {float(rate)}
        assert share == f"{100 * parameters['trainable'] / parameters['total']:.2f} %", label
        assert score == with_interval(scores["comparison"]["methods"][LABELS[label]]["tasks"]["stsb"], 1), label
    _, *rows = table_after(ROOT / "docs/results.md", "stsb-pairs")
    pairs = [pair for question in verdicts["questions"] for pair in question["pairs"]]
    for (labels, points, verdict), pair in zip(rows, pairs, strict=True):
        assert tuple(LABELS[label] for label in labels.split(" minus ")) == (pair["first"], pair["second"])
        assert (points, verdict) == (with_interval(pair["mean"]["test"], 2, "+"), pair["mean"]["verdict"]), labels


def test_the_beginning_at_base_size_is_that_of_its_records():
    """One seed of each method: scores of both halves, and the learning rate."""
    runs = ROOT / "results" / "hour_offline" / "runs" / "mpnet_base"
    _, *rows = table_after(ROOT / "docs/results.md", "begin")
    assert {LABELS[row[0]] for row in rows} == {path.name for path in runs.iterdir()}
    for label, rate, share, selecting, reported, step in rows:
        (path,) = (runs / LABELS[label]).glob("rte-seed1-*.json")
        record = json.loads(path.read_text())
        parameters, best = record["parameters"], record["training"]["best_step"]
        at_best = next(entry for entry in record["evaluations"] if entry["step"] == best)
        trained = 100 * parameters["trainable"] / parameters["total"]
        assert float(rate) == record["hyperparameters"]["learning_rate"]
        assert share == f"{trained:.2f} %", label
        assert (selecting, reported) == (f"{100 * at_best['accuracy']:.1f}", f"{100 * record['score']:.1f}"), label
        assert step == f"{best} of {record['training']['steps']}"


def test_the_small_decoder_at_its_beginning_is_that_of_its_records():
    runs = ROOT / "results" / "hour_offline" / "runs" / "gemma3_270m"
    _, *rows = table_after(ROOT / "docs/results.md", "begin-decoder")
    assert {LABELS[row[0]] for row in rows} == {path.name for path in runs.iterdir()}
    for label, rate, before, after in rows:
        (path,) = (runs / LABELS[label]).glob("oasst1-seed1-*.json")
        record = json.loads(path.read_text())
        assert float(rate) == record["hyperparameters"]["learning_rate"]
        assert (before, after) == (f"{record['baseline']['report_loss']:.3f}", f"{record['score']:.3f}"), label


def test_ratios_at_true_size_are_those_of_the_record():
    record = json.loads((LOCAL / "efficiency/roberta_base/cola.json").read_text())
    by_name = {variant["name"]: variant for variant in record["variants"]}
    names = {
        "LoRA": "lora",
        "truncated": "truncated",
        "truncated, all outputs": "truncated_input",
        "folded": "folded",
        "the paper's layer": "rotated_regular",
    }
    peak = by_name["full"]["memory"]["peak_training"]
    for label, speed, rounds, memory in table_after(ROOT / "docs/hardware.md", "roberta_base")[1:]:
        found = by_name[names[label]]
        expected = f"{found['ratio_to_full']['mean']:.2f}", f"{found['memory']['peak_training'] / peak:.2f}"
        assert (speed, memory) == expected, label
        assert rounds == ", ".join(f"{ratio:.2f}" for ratio in found["ratio_to_full"]["rounds"]), label


def test_costs_of_a_step_and_of_the_hosvd_are_those_of_the_records():
    record = json.loads((LOCAL / "cost_curves.json").read_text())
    base = record["treatment"]["base"]
    for tokens, *ratios in table_after(ROOT / "docs/hardware.md", "cost")[1:]:
        (point,) = (one for one in record["points"] if one["point"] == base | {"tokens": int(tokens)})
        step = {name: found["step_seconds"]["median"] for name, found in point["variants"].items()}
        assert ratios == [f"{step[name] / step['lora']:.2f}" for name in ("folded", "truncated")], tokens
    (case,) = (c for c in json.loads((LOCAL / "hosvd_cost.json").read_text())["cases"] if c["name"] == "bert_base")
    found = case["ratios"]["unfoldings_float32, 360 gradients"]
    text = re.sub(r"\s+", " ", (ROOT / "docs/hardware.md").read_text())
    assert f"take {found['time']:.2f} of the time of the unfoldings in float32, and {found['cpu_time']:.2f} of" in text


def test_printed_averages_that_do_not_follow_are_counted_once(statistics):
    counts = statistics["average_counts"]
    text = re.sub(r"\s+", " ", (ROOT / "docs/results.md").read_text())
    assert f"Of {sum(counts.values())} printed averages {counts['does not follow']} do not follow" in text


@pytest.mark.parametrize(("page", "name"), [("docs/hardware.md", "paper"), ("results/h200/README.md", "h200")])
def test_what_was_reached_on_a_card_is_what_its_records_say(page, name):
    text = (ROOT / page).read_text()
    assert fill(text, ROOT / "results" / name) == text, f"python experiments/targets.py name={name} page={page}"


def test_energies_are_those_of_the_record():
    record = json.loads((LOCAL / "energy/minilm/stsb-full.json").read_text())
    steps = {step["step"]: step["spaces"] for step in record["steps"]}

    def block(step, space, kind):
        found = zip(record["layers"], steps[step][space], strict=True)
        return f"{fmean(one['block'] for layer, one in found if layer['kind'] == kind):.2f}"

    for task, kind, *cells in table_after(ROOT / "docs/results.md", "energy")[1:]:
        assert task == "STS-B"
        looks = ((0, "initial"), (50, "initial"), (50, "refreshed"))
        assert cells == [block(step, space, kind) for step, space in looks], kind


LIBRARY = ROOT / "results" / "library"


def megabytes(count):
    return f"{count / 1e6:.2f}"


def test_sizes_and_times_of_adapters_are_those_of_the_record():
    page, record = ROOT / "docs/adapters.md", json.loads((LIBRARY / "adapters.json").read_text())
    expected = [
        [row["name"], megabytes(row["bytes"]), f"{row['save_cpu_seconds']:.2f}", f"{row['load_cpu_seconds']:.2f}"]
        for row in record["rows"]
    ]
    assert table_after(page, "sizes")[1:] == expected
    sizes = f"{record['bases_bytes'] / 1e6:.0f} MB in float32, the model {record['model_bytes'] / 1e6:.0f} MB"
    assert sizes in page.read_text()
    exact = [row["logits_error"] for row in record["rows"] if "largest" not in row["name"]]
    assert len(exact) == len(expected) - 1 and max(exact) < 1e-2
    by_name = {row["name"]: row["bytes"] for row in record["rows"]}
    assert by_name["folded, k entries moved, bases by reference"] < 5e6


def test_what_more_steps_make_of_an_adapter_is_what_the_record_says():
    record = json.loads((LIBRARY / "adapter_steps.json").read_text())
    ways = ["largest_all", "largest_5", "largest_2.5", "largest_1"]
    expected = [
        [str(row["step"]), f"{100 * row['moved']:.1f} %", megabytes(row["exact_bytes"])]
        + [f"{megabytes(row[way]['bytes'])}, {row[way]['lost']:.3f}, {row[way]['logits_error']:.3f}" for way in ways]
        for row in record["rows"]
    ]
    assert table_after(ROOT / "docs/adapters.md", "steps")[1:] == expected


# Commands and promises


def commands():
    """(script, arguments) of every command that a page shows; of a list to sweep over its first value."""
    for text in (page.read_text() for page in PAGES):
        for script, arguments in re.findall(r"(?:python|launch) experiments/(\w+)\.py ([^#`\n]*)", text):
            words = [word for word in arguments.split() if re.fullmatch(r"[\w.]+=\S+|--config-name|chat", word)]
            words = [word for word in words if word.count("[") == word.count("]")]  # else it may be left out
            if "..." not in arguments:
                yield script, tuple(word if "[" in word else word.partition(",")[0] for word in words)


def test_every_command_that_is_shown_passes_the_schema():
    found = sorted({command for command in commands() if (ROOT / "experiments" / f"{command[0]}.py").is_file()})
    assert len(found) > 8
    for script, words in found:
        default = re.search(r'@script\("(\w+)"\)', (ROOT / "experiments" / f"{script}.py").read_text())
        if default is None:
            continue
        name = words[words.index("--config-name") + 1] if "--config-name" in words else default[1]
        overrides = [word for word in words if "=" in word]
        with initialize_config_dir(str(ROOT / "conf"), version_base=None):
            config = OmegaConf.to_container(compose(name, overrides), resolve=True, throw_on_missing=True)
        check_script(name, config)


def test_every_promise_names_tests_that_are_there():
    code = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    promises = re.findall(r"^\| (.+) \| (.+) \|$", (ROOT / "SECURITY.md").read_text(), re.M)[1:]
    assert len(promises) > 5
    for promise, tests in promises:
        named = re.findall(r"`(test_\w+)`", tests)
        assert named and all(f"def {name}(" in code for name in named), promise


def test_outcomes_of_kills_and_faults_are_those_of_the_records():
    totals = {name: json.loads((ROOT / f"results/trust/{name}.json").read_text())["totals"] for name in TRUST}
    text = (ROOT / "docs/trust.md").read_text()
    assert table(totals) in text and table_after(ROOT / "docs/trust.md", "trust")[-1][0] == "all"
