"""What the schema refuses, in one line: which option, what was received, what is allowed."""

import math
import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from finetune.config import types
from finetune.config.check import check, check_group, check_script
from finetune.config.names import is_name

WRONG = {
    "glue": {
        "protocol.max_grad_norm": [0, -1, True, "1", math.nan],
        "protocol.weight_decay": [-0.1, math.inf],
        "protocol.warmup_ratio": [-0.1, 1.1],
        "protocol.epochs": [0, 1.5],
        "protocol.patience": [0],
        "protocol.max_length": [0, 1, 2, None],
        "protocol.train": ["some", None],
        "protocol.density": [0, 1.01, -1],
        "protocol.orientation": ["hosv"],
        "protocol.frozen": [{"sparsgrad": ["LayerNorm"]}, {"full": ["("]}],
        "protocol.search.learning_rate": [[0.1, 0.01], [0, 0.1], [0.1], [0.1, 0.1]],
        "protocol.search.batch_sizes": [[], [8, 8], [0]],
        "protocol.search_seed": [-1, 2**31],
        "protocol.preliminary.steps": [0],
        "protocol.lora_scale": ["rank", 0, -1.0, True],
        "scale.epochs": [0, True],
        "scale.max_steps": [0, {"cola": 5}, {"default": 0}],
        "scale.evaluation_batch_size": [0],
        "scale.search.trials": [0],
        "scale.search.points": [
            [{"learning_rate": 1.0, "batch_size": 8}],
            [{"learning_rate": 0.01, "batch_size": 7}],
            [1.0],
            {},
            {"full": [1e-4, 3e-4], "lora": [1e-3]},  # another number of points
            {"full": [1.0]},
        ],
        "scale.search.extend": [-1, 1.0, True],
        "scale.search": [
            {"trials": trials, "points": points, "max_steps": None, "extend": 1}
            | {"pruning": {"startup_trials": 1, "warmup_steps": 0}}
            for trials, points in ((2, [1e-3]), (2, []), (1, [1e-3, 1e-2]))
        ],
        "learning_rate": [0, -1e-3, math.nan, math.inf, "1e-3", {}, {"full": 0}],
        "batch_size": [0, True, 1.0, {"lora": 0}],
        "seed": [-1, 2**31, 2**64, True, "1", None],
        "threads": [0, -1, True],
        "workers": [
            0,
            "all",
            True,
            None,
            {"executor": "pbs", "count": 2},
            {"executor": "slurm", "count": 0},
            {"executor": "local", "count": 2, "slurm": {"partition": "gpu"}},
        ],
        "device": ["gpu"],
        "wandb.mode": ["on"],
        "method.form": ["fold"],
        "method.core": ["round"],
        "method.base": ["sparsgrad"],
        "method.refresh": [{"steps": 0, "batches": 1}, {"steps": 5, "batches": 1}],
        "method.protocol": [{"density": 2}, {"densty": 0.1}, {"preliminary": {"steps": 0}}],
        "model.k": [0, -1],
        "model.lora_rank": [0],
        "model.layers_to_transform": [[], [-1], [1, 1]],
        "model.target_modules": [{}, {"up": "("}, {"up": r".*\.up"}, {"../up": r"(?P<layer>\d+)"}],
        "model.architecture": [{"model_type": "bert", "num_hidden_layers": 0}],
        "data.task": ["colla"],
        "data.tasks": [{}, {"cola": {"columns": [], "num_labels": 2, "metric": "accuracy"}}],
    },
    "chat": {
        "protocol.gate": [["sparsgrad"], "lora"],
        "protocol.also_train": [["everything"]],
        "protocol.every_block": [["lora", "lora"]],
        "protocol.warmup_steps": [-1],
        "protocol.loss_on": ["questions"],
        "scale.frozen_dtype": ["fp16", "bf16"],  # bf16 with precision fp32
        "scale.max_length": [2],
        "scale.micro_batch_size": [0],
        "chat.threads": ["some"],
        "chat.validation_share": [0, 1],
    },
    "mt_bench": {
        "judge.temperature": [-0.1, "0"],
        "judge.max_retries": [-1],
        "judge.timeout": [0, math.inf],
        "judge.parallel": [0],
        "judge.allowed_failures": [-1],
        "judge.base_url": [None, "ftp://judge", "http://me:secret@judge/v1"],
        "judge.serve": [True, "yes"],  # it would pass as a measure of quality
        "scale.answers.max_new_tokens": [0],
        "scale.answers.dtype": ["int8"],
        "methods": [[], ["full", "full"]],
    },
    "efficiency": {"scale.rounds": [0], "scale.keep": ["some"], "variants": [[], ["full", "full"]]},
    "energy": {
        "scale.steps": [[], [10, 0], {"cola": [0]}, [-1]],
        "scale.picture": [[64], [0, 64]],
        "scale.trajectories": [["lora"], []],
        "measure.shares": [[0], [0.5, 0.1], [2]],
        "measure.threshold": [0],
    },
    "cost_curves": {"scale.densities": [[0], []], "decay": [-1], "threads": [2], "scale.base.hidden": [0]},
    "hosvd_cost": {
        "rank": [0, 10**6],
        "noise": [-1],
        "scale.limit_seconds": [0],
        "scale.cases": [{}, {"a": {"shape": [8], "asked": 1, "ways": {"streaming": [1]}}}],
    },
    "plan": {
        "touched": [0, 2],
        "questions": [0],
        "cards": [{}, {"A": {"price": -1}}],
        "utilisation.fp32": [1.5],
        "detectable.accuracy.score": [-1, 101],
        "detectable.correlation.rows": [1, -0.1],
    },
    "statistics": {
        "margin.score": [0, -1.0, "baseline", None],
        "patience": [0],
        "questions": [
            [{"ask": "?", "first": "most", "second": ["lora"]}],
            [{"ask": "?", "first": "all", "second": []}],
        ],
    },
    "pretrain": {"encoder.warmup": [0], "decoder.length": [2], "encoder.beta2": [1], "device": ["auto"]},
    "generate": {"glue.train": [0], "glue.tasks": [["rte"], ["cola", "cola"]], "chat.trees": [0]},
}
GIVEN = {"statistics": ["name=a"], "pretrain": ["name=a"], "generate": ["name=a"], "mt_bench": ["judge=open_weight"]}
SAYS = re.compile("allowed: |glue has: |no measure|renews|there is no")
NAMES = ["../../x", "/x", "a/b", "..", ".x", "-x", "", " x", "a\nb", "a\0", "a" * 65, 7, None]


def changed(config, key, value):
    *path, last = key.split(".")
    place = config
    for part in path:
        place = place[part]
    place[last] = value
    return config


def refusal(script, config):
    with pytest.raises(ValueError) as caught:
        check_script(script, config)
    assert str(caught.value).count("\n") == 0
    return str(caught.value)


@pytest.mark.parametrize(("script", "key"), [(script, key) for script, keys in WRONG.items() for key in keys])
def test_what_is_out_of_range_is_refused_by_name(script, key, compose):
    for value in WRONG[script][key]:
        told = refusal(script, changed(compose(*GIVEN.get(script, []), config_name=script), key, value))
        assert key.split(".")[0] in told and SAYS.search(told), told


@pytest.mark.parametrize(
    ("script", "key"),
    [
        *[("glue", key) for key in ("name", "model.name", "method.name", "data.name", "protocol.name", "scale.name")],
        *[("mt_bench", key) for key in ("name", "judge.name", "questions.name")],
        *[(script, "name") for script in ("generate", "pretrain", "report", "table", "figure", "statistics")],
    ],
)
def test_names_stay_in_their_folder(script, key, compose):
    given = GIVEN.get(script, []) + (["name=a"] if script in ("report", "table", "figure") else [])
    given += {"table": ["number=9"], "figure": ["figure=all"]}.get(script, [])
    for name in NAMES:
        told = refusal(script, changed(compose(*given, config_name=script), key, name))
        assert told.startswith(f"{key}={name!r}"[:60])
    for name in ("minilm", "Qwen2.5-0.5B", "a_b+c"):
        check_script(script, changed(compose(*given, config_name=script), key, name))


@pytest.mark.parametrize("key", ["model.folder", "data.folder"])
def test_folders_below_another_stay_there(key, compose):
    for path in ("../x", "/x", "a/../../b", "~/x", ""):
        assert refusal("glue", changed(compose(), key, path)).startswith(key)


def test_a_task_and_a_layer_kind_are_names_too(compose):
    config = compose()
    config["data"]["tasks"]["../x"] = config["data"]["tasks"]["cola"]
    assert refusal("glue", config).startswith("data.tasks has the name '../x'; allowed: a name of letters")


def test_an_error_says_what_was_received_and_what_is_allowed(compose):
    def told(key, value, script="glue"):
        return refusal(script, changed(compose(config_name=script), key, value))

    assert told("protocol.max_grad_norm", -1) == "protocol.max_grad_norm=-1; allowed: greater than 0."
    assert told("scale.epochs", True) == "scale.epochs=True; allowed: a whole number."
    assert told("scale.epoch", 3) == "scale.epoch: there is no such option; nearest: epochs."
    assert told("protocol.train", "al") == "protocol.train='al'; allowed: 'all', 'mlp' or 'targets'."
    assert told("protocol.search.batch_sizes", []) == "protocol.search.batch_sizes=[]; allowed: at least 1."
    assert (
        told("method.protocol", {"densty": 1}) == "method.protocol.densty: there is no such option; nearest: density."
    )
    assert told("data.task", "x").startswith("data.task='x'; glue has: cola, mnli")
    assert told("protocol.gate", ["lore"], "chat").endswith("nearest: lora.")
    config = compose()
    del config["scale"]["epochs"], config["model"]["title"]
    assert refusal("glue", config) == "model.title is missing. (and 1 more)"


def test_a_key_is_not_shown_wherever_it_slips_into(compose):
    secret = "sk-0123456789abcdef"
    for key in ("judge.api_key_env", "judge.api_key", "judge.base_url"):
        told = refusal("mt_bench", changed(compose(config_name="mt_bench"), key, secret))
        assert key in told and secret not in told


def test_a_method_of_a_module_elsewhere_has_options_of_its_own():
    check_group("method", {"name": "rows", "base": "added.rows", "every": 2})
    with pytest.raises(ValueError, match="every: there is no such option"):
        check_group("method", {"name": "rows", "base": "full", "every": 2})
    with pytest.raises(ValueError, match=r"method.name='../rows'; allowed: a name"):
        check_group("method", {"name": "../rows", "base": "added.rows"})


# Properties

SCALARS = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), st.lists(st.integers()))
NUMBERS = {
    "Count": lambda v: type(v) is int and v >= 1,
    "Whole": lambda v: type(v) is int and v >= 0,
    "Seed": lambda v: type(v) is int and 0 <= v < 2**31,
    "Positive": lambda v: type(v) in (int, float) and 0 < v < math.inf,
    "NotNegative": lambda v: type(v) in (int, float) and 0 <= v < math.inf,
    "Share": lambda v: type(v) in (int, float) and 0 < v <= 1,
    "Fraction": lambda v: type(v) in (int, float) and 0 <= v <= 1,
    "Below1": lambda v: type(v) in (int, float) and 0 <= v < 1,
}


@pytest.mark.parametrize("kind", NUMBERS)
@given(value=SCALARS)
@example(value=math.inf)
@example(value=math.nan)
@example(value=True)
def test_a_number_is_taken_if_it_is_one_in_its_range(kind, value):
    try:
        check(getattr(types, kind), value)
    except ValueError:
        assert not NUMBERS[kind](value)
    else:
        assert NUMBERS[kind](value)


@given(st.one_of(st.text(max_size=70), st.from_regex(r"[./~a-z\n-]{1,6}", fullmatch=True)))
def test_a_name_joined_to_a_folder_lies_in_it(text):
    from pathlib import Path

    if is_name(text):
        path = Path("results") / text
        assert path.parent == Path("results") and path.name == text and not text.startswith(("-", "."))
    else:
        with pytest.raises(ValueError, match="allowed: a name of letters"):
            check(types.Name, text)


@given(st.recursive(SCALARS, lambda inner: st.dictionaries(st.text(max_size=8), inner, max_size=3), max_leaves=6))
def test_whatever_a_group_is_given_it_answers_in_one_line(value):
    for group in ("model", "method", "protocol", "judge", "scale/energy"):
        with pytest.raises(ValueError) as caught:
            check_group(group, value)
        assert "\n" not in str(caught.value) and str(caught.value).startswith(group)
