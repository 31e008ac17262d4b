"""Records are not believed but checked: one value changed, or a file under another's name, is refused."""

import copy
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune.store import records
from finetune.store.checks import check_record

RESULTS = Path(__file__).parents[3] / "results"
LOCAL = RESULTS / "local"
RUN = next(LOCAL.glob("runs/minilm/full/stsb-seed1-*.json"))
SEARCH = LOCAL / "search" / "minilm" / "full" / "stsb.json"
KINDS = {
    "run": RUN,
    "decoder": next(LOCAL.glob("runs/stories260k/sparsegrad/oasst1-seed2-*.json")),
    "search": SEARCH,
    "energy": LOCAL / "energy" / "minilm" / "stsb-full.json",
    "efficiency": LOCAL / "efficiency" / "roberta_base" / "cola.json",
    "answers": LOCAL / "mt_bench" / "answers" / "stories260k" / "full" / "stories260k-full-seed1.json",
}
READ = {kind: json.loads(path.read_text()) for kind, path in KINDS.items()}


def leaves(content, path=()):
    """Where a single value stands, an empty list or mapping included."""
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    found = [leaf for key, value in items for leaf in leaves(value, (*path, key))]
    return found or [path]


LEAVES = {kind: leaves(record) for kind, record in READ.items()}
VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 10**6), st.floats(allow_nan=True), st.text(max_size=8), st.just([])
)


def changed(record, path, value):
    found = copy.deepcopy(record)
    inner = found
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return found


def test_every_committed_record_is_sound():
    kinds = ["runs/*/*/*-seed*-*", "search/*/*/*", "energy/*/*", "efficiency/*/*", "mt_bench/*/*/*/*-seed?", "*_c*s"]
    found = [path for kind in kinds for path in LOCAL.glob(f"{kind}.json")]
    assert len(found) >= 155
    for path in found:
        assert records.read_record(path)["checksum"]


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
def test_one_value_changed_is_refused(kind, data):
    """Another value or another kind of value, anywhere: also in what no table reads."""
    record, path = READ[kind], data.draw(st.sampled_from(LEAVES[kind]))
    value = data.draw(VALUES)
    other = changed(record, path, value)
    if repr(other) != repr(record):
        with pytest.raises(ValueError, match=r"it is not used: its stage, run again, makes it anew\."):
            check_record(KINDS[kind], other)


@pytest.mark.parametrize("kind", KINDS)
def test_a_part_that_is_gone_or_new_is_refused(kind):
    for key in READ[kind]:
        with pytest.raises(ValueError, match="it is not used"):
            check_record(KINDS[kind], {name: value for name, value in READ[kind].items() if name != key})
    with pytest.raises(ValueError, match="its checksum is another"):
        check_record(KINDS[kind], READ[kind] | {"remark": "checked"})


# Sealed again: whoever edits a record and its checksum is found by what the record says itself.


def sealed(kind, path, value):
    found = changed(READ[kind], path, value)
    return found | {"checksum": records.checksum(found)}


FIRST = READ["run"]["evaluations"][0]
STEP, SCORE = FIRST["step"], READ["run"]["score"]


@pytest.mark.parametrize(
    ("kind", "path", "value", "message"),
    [
        ("run", ["score"], 0.99, "has score 0.99, the best of its evaluations is"),
        ("run", ["score"], None, "'finished' with score None; a finished run has a finite score"),
        ("run", ["score"], str(SCORE), "a finished run has a finite score"),
        ("run", ["score"], True, "a finished run has a finite score"),
        ("run", ["status"], "failed", "failed, but has a score or no error"),
        ("run", ["status"], "running", "is 'running' with score"),
        ("run", ["evaluations"], [], "lacks a part"),
        ("run", ["training", "best_step"], STEP, "has score"),
        ("run", ["metric"], "accuracy", "says another metric"),
        ("run", ["hyperparameters", "learning_rate"], 1.0, "other hyper-parameters than its identity"),
        ("run", ["identity", "protocol", "weight_decay"], 0.5, "holds the identity .* under the hash"),
        ("run", ["run", "method"], "lora", "says method 'lora', its identity 'full'"),
        ("run", ["run", "seed"], 2, "says seed 2, its identity 1"),
        ("run", ["run", "seed"], True, "says seed True, its identity 1"),
        ("run", ["schema"], 2, "has schema 2, this code reads 1"),
        ("run", ["version"], 2, "is of version 2, its identity of 1"),
        ("decoder", ["score"], 9.0, "has score 9.0, the best"),
        ("search", ["best", "learning_rate"], 0.5, "has the best point"),
        ("search", ["best", "value"], 0.5, "has the best point"),
        ("search", ["trials"], [], "lacks a part"),
        ("energy", ["identity", "seed"], 9, "holds the identity"),
    ],
)
def test_an_edited_record_with_a_new_checksum_contradicts_itself(kind, path, value, message):
    with pytest.raises(ValueError, match=message):
        check_record(KINDS[kind], sealed(kind, path, value))


def test_a_number_that_is_none_is_no_json(tmp_path):
    path = tmp_path / "full" / RUN.name
    path.parent.mkdir()
    path.write_text(RUN.read_text().replace(f'"score": {SCORE}', '"score": NaN'))
    with pytest.raises(ValueError, match=r"is damaged, or no JSON \(NaN is no JSON\)"):
        records.read_record(path)


@pytest.mark.parametrize(
    "name", ["minilm/lora/{}", "minilm/full/stsb-seed2-{hash}", "minilm/full/stsb-seed1-0123456789ab", "a/full/{}"]
)
def test_a_run_under_anothers_name_is_refused(name):
    path = Path(name.format(RUN.stem, hash=READ["run"]["run"]["config_hash"]) + ".json")
    with pytest.raises(ValueError, match=f"is a record of minilm/full/{RUN.stem}"):
        check_record(path, READ["run"])


def test_what_may_be_reused(tmp_path, caplog):
    path = tmp_path / "minilm" / "full" / RUN.name
    digest = READ["run"]["run"]["config_hash"]
    assert records.reusable(path, digest) is None
    records.write_record(path, READ["run"])
    assert records.reusable(path, digest) == READ["run"] and records.reusable(path, "0123456789ab") is None
    assert not caplog.text
    records.write_json(path, READ["run"] | {"score": 0.99})
    assert records.reusable(path, digest) is None and "its checksum is another" in caplog.text


@pytest.fixture
def cell(tmp_path):
    """A cell of three real runs."""
    folder = tmp_path / "minilm" / "full"
    for path in RUN.parent.glob("stsb-seed*.json"):
        records.write_record(folder / path.name, records.read_record(path))
    records.write_json(folder / "cell.json", {"records": sorted(path.name for path in folder.glob("stsb-*.json"))})
    return folder


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda names: names[:2], r"cell.json lacks stsb-seed3-.*, which lies beside it; its stage, run again"),
        (lambda names: [*names, names[0]], "cell.json lists a record twice"),
        (lambda names: [*names, "../lora/stsb-seed1-0123456789ab.json"], "cell.json lists no records"),
        (lambda names: "".join(names), "cell.json lists no records"),
        (lambda names: [*names, "stsb-seed4-0123456789ab.json"], "stsb-seed4-0123456789ab.json does not exist"),
    ],
)
def test_a_list_that_differs_from_its_folder_is_refused(change, message, cell):
    assert len([*records.iterate(cell)]) == 3
    names = records.listed_records(cell / "cell.json")
    records.write_json(cell / "cell.json", {"records": change(names)})
    with pytest.raises(ValueError, match=message):
        list(records.iterate(cell))
