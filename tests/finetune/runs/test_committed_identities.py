"""Every committed record is found again: its name's hash comes from its content, and from the configuration of today.

What does not decide numbers (a label, a mark, a key of the loop around the runs) must stay out of a run's identity.
"""

from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace

import pytest

from finetune.data.glue import Task
from finetune.runs.chat import ChatProblem
from finetune.runs.choices import for_task
from finetune.runs.glue import GlueProblem
from finetune.runs.problem import Run
from finetune.store.records import read_record

LOCAL = Path(__file__).parents[3] / "results" / "local"
RUNS = sorted(LOCAL.glob("**/*-seed*-*.json"))
BEGUN = sorted((LOCAL.parent / "hour_offline" / "runs").glob("*/*/*-seed*-*.json"))
CARD = sorted((LOCAL.parent / "hour_stsb" / "runs").glob("*/*/*-seed*-*.json"))
SEARCHES = sorted(LOCAL.glob("search/*/*/*.json"))
READ = {path: read_record(path) for path in RUNS}


def compose_as(compose, record):
    """Today's configuration of a record's experiment, model and method."""
    run, decoder = record["run"], record["run"]["kind"] == "llama"
    nested = "llama/" if decoder else ""
    names = [f"model={run['model']}", f"method={run['method']}"]
    names += [f"{group}={nested}{run[group]}" for group in ("protocol", "scale")]
    return compose(*names, config_name="chat" if decoder else "glue")


def with_facts(compose, config, record):
    """A configuration with what a run adds to it: hyper-parameters, and where its bases come from."""
    group = "chat" if record["run"]["kind"] == "llama" else "data"
    basis = "a file" if "task" in record["basis"] else None
    data = compose(config_name="chat" if group == "chat" else "glue")[group]
    return config | {"version": record["version"], "basis": basis, group: data} | record["hyperparameters"]


def splits_of(record):
    facts = record["data"]
    length = record["treatment"].get("packed_tokens")

    class Rows(SimpleNamespace):
        def __len__(self):
            return self.rows

    return {
        role: Rows(content=digest, rows=facts["rows"][role], longest=length)
        for role, digest in facts["content"].items()
    }


def digest_of(config, record, **changes):
    """The hash of a run: everything that data and weights decide is the record's."""
    run, splits = record["run"], splits_of(record)
    contents = {name: record["model"][name] for name in ("sha256", "config_sha256")}
    known = {"contents": contents, "bases": lambda task: ({}, record["basis"])}
    if run["kind"] == "llama":
        text = config["model"].get("chat_template")  # a tokenizer's is named by the hash of its text
        own = {"template": f"tokenizer:{sha256(text.encode()).hexdigest()[:12]}"} if text else None
        problem = ChatProblem(config | {"carried": own})
        problem.__dict__.update(known, _packed=splits, tokenizer=None)
    else:
        problem = GlueProblem(config)
        facts = Task.from_config(config["data"] | {"task": run["task"]})
        problem.__dict__.update(known, _load=lambda task: (facts, splits))
    named = {"task": run["task"], "seed": run["seed"], "hyperparameters": problem.hyperparameters()}
    return problem.digest(Run(**named | changes))


def test_all_committed_records_are_here():
    assert len(RUNS) >= 102 and len(SEARCHES) >= 25 and len(BEGUN) == 8 and len(CARD) == 30


@pytest.mark.parametrize("path", RUNS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_a_run_is_named_by_its_content_and_by_todays_configuration(path, compose):
    record = READ[path]
    assert path.stem.endswith(record["run"]["config_hash"])
    assert record["migration"]["checked"][:3] == ["hash", "weights", "data"] and not record["migration"]["unchecked"]
    for config in (compose(config_name="chat") | record["config"], compose_as(compose, record)):
        assert digest_of(with_facts(compose, config, record), record) == record["run"]["config_hash"]


@pytest.mark.parametrize("path", CARD, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_what_a_card_ran_without_hydra_is_what_its_experiment_would_run(path, compose):
    record = read_record(path)
    assert digest_of(with_facts(compose, compose_as(compose, record), record), record) == record["run"]["config_hash"]


@pytest.mark.parametrize("path", BEGUN, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_what_hour_begin_left_is_what_its_experiment_would_run(path, compose):
    """Learning rate and batch size come from the scale, as no search and no hand gives them there."""
    record = read_record(path)
    config = with_facts(compose, compose_as(compose, record), record) | {"learning_rate": None, "batch_size": None}
    assert record["run"]["scale"] == "hour_begin"
    assert digest_of(config, record) == record["run"]["config_hash"]


@pytest.mark.parametrize("path", SEARCHES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_a_search_is_named_by_todays_configuration(path, compose):
    search = read_record(path)
    run = next(r for r in READ.values() if all(r["run"][k] == search["run"][k] for k in ("model", "method", "task")))
    config = with_facts(compose, compose_as(compose, run), run)
    steps = for_task(config["scale"]["search"]["max_steps"], run["run"]["task"])
    found = digest_of(config, run, seed=search["seed"], hyperparameters={"max_steps": steps}, search=True)
    assert found == search["run"]["config_hash"]
    assert f'"{found}"' in path.with_suffix(".journal").read_text()  # the study's name: its trials are found again
