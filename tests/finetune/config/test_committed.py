"""Every committed configuration passes the schema, and the schema knows nothing else."""

import itertools
import re
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from finetune.config.check import GROUPS, SCRIPTS, check_group, check_script

CONF = Path(__file__).parents[3] / "conf"


def files(group):
    return sorted((CONF / group).glob("*.yaml"))


def read(path):
    """A group's file as it is composed: interpolations have values."""
    content = re.sub(r"\$\{scale\.judging\.\w+\}", "2", path.read_text())
    return OmegaConf.to_container(OmegaConf.create(content), resolve=False)


@pytest.mark.parametrize("group", GROUPS)
def test_every_file_of_a_group_passes(group):
    assert files(group)
    for path in files(group):
        check_group(group, read(path))


def test_every_script_has_a_schema_and_its_defaults_pass(compose):
    assert set(SCRIPTS) == {path.stem for path in CONF.glob("*.yaml")} - {"base", "script"}
    given = {"name": ["name=local"], "experiment": ["experiment=params.yaml"]}
    for name in SCRIPTS:
        text = (CONF / f"{name}.yaml").read_text()
        missing = [override for key, override in given.items() if re.search(rf"^{key}: \?\?\?", text, re.M)]
        extra = {"table": ["number=9"], "figure": ["figure=all"]}.get(name, [])
        check_script(name, compose(*itertools.chain(*missing), *extra, config_name=name))


@pytest.mark.parametrize(("script", "within"), [("glue", ""), ("chat", "/llama"), ("mt_bench", "/llama")])
def test_every_method_passes_with_every_protocol_and_scale(script, within, compose):
    """Of models, which no check ties to another group, each stands in the test above."""
    default = compose(config_name=script)
    kinds = ("method", f"protocol{within}", f"scale{within}")
    for choices in itertools.product(*([read(path) for path in files(kind)] for kind in kinds)):
        check_script(script, default | dict(zip(("method", "protocol", "scale"), choices, strict=True)))


@pytest.mark.parametrize("script", ["efficiency", "energy", "hosvd_cost", "cost_curves"])
def test_every_scale_of_a_measurement_passes(script, compose):
    default = compose(config_name=script)
    for scale, path in itertools.product(files(f"scale/{script}"), files("protocol")):
        content = read(scale)
        own = {key: content[key] for key in default.keys() & {"clock", "threads", "precision"} & content.keys()}
        protocol = {"protocol": read(path)} if "protocol" in default else {}
        check_script(script, default | protocol | own | {"scale": content})
