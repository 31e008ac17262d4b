"""Experiment files: what they leave out, what they may not say, what dvc.yaml gets of them."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from finetune.store.catalog import read_group
from finetune.store.experiment import expand, load, read_experiment, write_params

ROOT = Path(__file__).parents[3]
CONF, NAMES = ROOT / "conf", ("smoke", "local", "paper", "paper_released")


def expanded(name):
    return expand(read_experiment(ROOT / "experiments" / f"{name}.yaml"), CONF)


@pytest.fixture
def written(tmp_path):
    """``written(text)``: the expansion of an experiment file with that text, beside the real ones."""
    for path in (ROOT / "experiments").glob("*.yaml"):
        (tmp_path / path.name).write_text(path.read_text())

    def expand_text(text, name="mine"):
        (tmp_path / f"{name}.yaml").write_text(text)
        return load(tmp_path / f"{name}.yaml", CONF)

    return expand_text


MINE = "models: [minilm]\ntasks: [cola]\nseeds: [1, 2]\n"


def test_what_a_file_leaves_out_is_filled_in(written):
    found = written(MINE)
    assert (found["name"], found["protocol"], found["data"]) == ("mine", "sound", "glue")
    assert found["methods"] == ["full", "lora", "meprop", "sparsegrad"] and found["decoder_seeds"] == [1, 2]
    assert found["ablation_models"] == found["efficiency_models"] == ["minilm"]
    assert set(found["stands_for"].values()) == {None} and found["tables"] == [1, 3, 7, 8]
    assert found["figures"] == ["figure_efficiency", "figure_cost_curves", "methods_scores"]


def test_a_model_of_the_paper_stands_for_itself_and_fills_its_tables(written):
    found = written("models: [roberta_base, minilm]\ntasks: [cola]\nseeds: [1]\nstands_for: {bert_base: minilm}\n")
    stands = {"bert_base": "minilm", "roberta_base": "roberta_base", "roberta_large": None, "llama2_7b": None}
    assert found["stands_for"] == stands and found["efficiency_models"] == ["roberta_base"]
    assert found["tables"] == [1, 3, 5, 7, 8, 9, 10, 11, 12, 13, 14, 15]


def test_an_entry_of_a_stage_holds_all_that_its_command_needs():
    stages = expanded("local")["stages"]
    cell = {"model": "minilm", "problem": "glue", "choices": "data=glue protocol=sound scale=local"}
    cell |= {"data": "data/glue", "protocol": "sound", "scale": "local", "tasks": ["cola", "mrpc", "stsb"]}
    cell |= {"checkpoint": "data/models/minilm", "examples": "data/glue", "method": "frozen_mlp", "seeds": [1, 2, 3]}
    assert stages["train"]["local-minilm-frozen_mlp"] == cell | {"launch": "python", "kept": "search"}
    decoder = stages["train"]["local-stories260k-lora"]
    assert decoder["choices"] == "chat=oasst1 protocol=llama/sound scale=llama/local" and decoder["kept"] == "models"
    assert (decoder["problem"], decoder["tasks"]) == ("chat", ["oasst1"])
    answered = {"model": "stories260k", "methods": ["full", "lora", "meprop", "sparsegrad"], "seeds": [1, 2, 3]}
    assert stages["answers"] == {"local-stories260k": answered}
    assert stages["generate"] == [] and stages["pretrain"] == {} and stages["examples"] == ["local"]


def test_an_experiment_that_makes_its_own_depends_on_what_it_makes():
    found = expanded("smoke")["stages"]
    assert found["generate"] == ["smoke"] and found["evidence"]["questions"] == "results/smoke/chat/mt_bench"
    made = {entry["checkpoint"] for entry in found["pretrain"].values()}
    assert made == {"results/smoke/data/models/tiny_bert", "results/smoke/chat/models/tiny_llama"}
    assert made == {entry["checkpoint"] for entry in found["train"].values()}
    assert found["pretrain"]["smoke-tiny_llama"]["text"] == "results/smoke/chat/text"


def test_variants_are_cells_of_their_own_models_and_are_not_answered():
    found = expanded("paper")
    cells = found["stages"]["train"]
    assert "paper-roberta_large-full" in cells and "paper-roberta_large-truncated" not in cells
    assert "paper-llama2_7b-truncated" in cells and len(cells) == 3 * 4 + 2 * 10 + 4 + 2
    assert "truncated" not in found["stages"]["answers"]["paper-llama2_7b"]["methods"]


def test_several_decoders_have_their_own_cells_and_checkpoints(written):
    found = written(MINE + "decoders: [stories260k, llama2_7b]\n")["stages"]
    assert found["bases"]["mine-stories260k"]["checkpoint"] == "data/models/stories260K"
    assert found["bases"]["mine-llama2_7b"]["checkpoint"] == "data/models/llama-2-7b"
    assert set(found["answers"]) == {"mine-stories260k", "mine-llama2_7b"}


@pytest.mark.parametrize(
    ("text", "lacking"),
    [
        (MINE, {"mt_bench", "questions", "examples", "judge"}),
        ("decoders: [stories260k]\nseeds: [1]\n", {"search", "energy", "efficiency", "examples", "judge"}),
    ],
)
def test_where_there_are_no_encoders_or_no_decoders_the_runs_stand_in(written, text, lacking):
    found = written(text)["stages"]["evidence"]
    assert {kind for kind, path in found.items() if path == "results/mine/runs"} == lacking | {"runs"}


def test_an_expansion_of_an_expansion_is_itself(tmp_path):
    for name in NAMES:
        write_params(ROOT / "experiments" / f"{name}.yaml", tmp_path / "params.yaml", CONF)
        assert expand(read_experiment(tmp_path / "params.yaml"), CONF) == expanded(name)


def test_the_two_papers_differ_in_what_the_file_says():
    one, other = (expanded(name) for name in ("paper", "paper_released"))
    differing = {key for key in one if one[key] != other[key]}
    assert differing == {"name", "protocol", "ablations", "decoder_ablations", "stages"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (MINE + "modles: [minilm]\n", r"mine.yaml: modles: there is no such option; nearest: models\."),
        (MINE + "tables: 9\n", r"mine.yaml: tables=9; allowed: a list\."),
        (MINE + "generate: 1\n", r"mine.yaml: generate=1; allowed: true, false\."),
        (MINE + "methods: [full, dore]\n", r"mine.yaml: methods: dore; nearest: dora; allowed: full, lora, "),
        (MINE + "ablations: [full]\n", r"ablations: full; allowed: .*truncated"),
        (MINE + "protocol: sond\n", r"mine.yaml: protocol: sond; nearest: sound; allowed: printed, released, sound"),
        (MINE.replace("minilm", "minlm"), r"mine.yaml: models: minlm; nearest: minilm; allowed: bert_base, "),
        (MINE.replace("minilm", "stories260k"), r"models: stories260k; allowed: bert_base"),
        (MINE + "decoders: [minilm]\n", r"decoders: minilm; allowed: .*stories260k"),
        (MINE + "ablation_models: [bert_base]\n", r"ablation_models: bert_base; allowed: minilm\."),
        (MINE.replace("cola", "colla"), r"mine.yaml: tasks: colla; nearest: cola; allowed: cola, stsb"),
        (MINE + "tables: [1, 9]\n", r"tables: 9; allowed: 1, 3, 7, 8\."),
        (MINE + "figures: [figure_02]\n", r"figures: figure_02; allowed: figure_efficiency"),
        (MINE + "stands_for: {bert: minilm}\n", r"mine.yaml: stands_for has the name 'bert'; allowed: 'bert_base', "),
        (MINE + "stands_for: {bert_base: tiny_bert}\n", r"mine.yaml: stands_for: tiny_bert; allowed: minilm\."),
        (MINE.replace("[1, 2]", "[1, 1]"), r"mine.yaml: seeds=\[1, 1\]; allowed: each only once\."),
        (MINE.replace("[1, 2]", "[-1]"), r"mine.yaml: seeds\[0\]=-1; allowed: greater than or equal to 0\."),
        (MINE.replace("[1, 2]", "[true]"), r"mine.yaml: seeds\[0\]=True; allowed: a whole number\."),
        (MINE.replace("cola", "../cola"), r"mine.yaml: tasks\[0\]='../cola'; allowed: a name"),
        (MINE + "models: [minilm]\n", r"mine.yaml is no YAML: 'models' stands twice"),
        (MINE + "name: ../mine\n", r"mine.yaml: name='../mine'; allowed: a name"),
        (MINE + "launch: python; ls\n", r"mine.yaml: launch='python; ls'; allowed: a command"),
        ("extends: mine\n", r"mine.yaml: extends='mine' comes back to itself"),
        (MINE.replace("[1, 2]", "[]"), r"mine.yaml: seeds: models need at least one\."),
        ("tasks: [cola]\n", r"needs models \(encoders\) or decoders"),
        ("extends: papper\n", r"there is no .*papper.yaml; its folder has .*paper.yaml"),
        ("- cola\n", r"mine.yaml holds a list, no mapping"),
        ("tasks: [cola\n", r"mine.yaml is no YAML"),
    ],
)
def test_what_an_experiment_may_not_say(written, text, message):
    with pytest.raises(ValueError, match=message):
        written(text)


def test_parameters_are_written_when_they_differ_and_errors_are_one_line(tmp_path):
    target = tmp_path / "params.yaml"
    smoke = ROOT / "experiments" / "smoke.yaml"
    assert write_params(smoke, target, CONF) and not write_params(smoke, target, CONF)
    assert write_params(ROOT / "experiments" / "local.yaml", target, CONF)
    command = [sys.executable, "-m", "finetune.store.experiment", "none.yaml", str(target)]
    failed = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert failed.returncode == 1 and failed.stderr.startswith("error: there is no none.yaml")
    assert failed.stderr.count("\n") == 1


def test_a_params_file_that_is_not_whole_is_refused(tmp_path):
    path = tmp_path / "params.yaml"
    write_params(ROOT / "experiments" / "smoke.yaml", path, CONF)
    whole = yaml.safe_load(path.read_text())
    for key in ("name", "ablation_models", "judge"):
        path.write_text(yaml.safe_dump({name: value for name, value in whole.items() if name != key}))
        with pytest.raises(ValueError, match=f"params.yaml: {key} is missing; make repro"):
            load(path, CONF)
    (tmp_path / "base.yaml").write_text("protocol: sound\n")
    (tmp_path / "mine.yaml").write_text(MINE)
    with pytest.raises(ValueError, match="base.yaml: scale is missing; it holds every key"):
        load(tmp_path / "mine.yaml", CONF)
    path.write_text(yaml.safe_dump({"stages": {"train": {}}}))
    with pytest.raises(ValueError, match="params.yaml: name is missing"):
        load(path, CONF)


def test_a_file_of_the_configuration_that_is_none_of_its_group_is_refused(tmp_path):
    shutil.copytree(CONF, tmp_path / "conf")
    for group, name, key in (("model", "minilm", "target_modules"), ("protocol/llama", "sound", "density")):
        path = tmp_path / "conf" / group / f"{name}.yaml"
        text = path.read_text()
        path.write_text(text[: text.index(key)])
        with pytest.raises(ValueError, match=f"{name}.yaml: {key} is missing"):
            read_group(group, tmp_path / "conf")
        path.write_text(text.replace(f"name: {name}\n", "name: other\n"))
        with pytest.raises(ValueError, match="name is 'other'; it must be that of the file"):
            read_group(group, tmp_path / "conf")


def test_the_committed_parameters_are_those_of_smoke(tmp_path):
    """As committed: another experiment may be in place here."""
    shown = subprocess.run(["git", "-C", ROOT, "show", "HEAD:params.yaml"], capture_output=True, text=True)
    committed = yaml.safe_load(shown.stdout if shown.returncode == 0 else (ROOT / "params.yaml").read_text())
    assert committed == expanded("smoke")
