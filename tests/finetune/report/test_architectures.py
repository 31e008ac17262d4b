"""Exact counts on the meta device."""

from pathlib import Path

import pytest
import yaml

from finetune.report.paper.architectures import count_parameters

CONF = Path(__file__).parents[3] / "conf" / "model"


def _architecture(name):
    return yaml.safe_load((CONF / f"{name}.yaml").read_text(encoding="utf-8")).get("architecture")


@pytest.mark.parametrize(
    ("name", "total", "mlp", "attention", "embeddings"),
    [
        ("bert_base", 109_482_240, 56_669_184, 28_348_416, 23_835_648),
        ("roberta_base", 124_645_632, 56_669_184, 28_348_416, 38_999_040),
        ("roberta_large", 355_359_744, 201_449_472, 100_761_600, 51_998_720),
        ("llama2_7b", 6_738_415_616, 4_328_521_728, 32 * 4 * 4096**2, 131_072_000),
    ],
)
def test_exact_counts(name, total, mlp, attention, embeddings):
    found = count_parameters(_architecture(name))
    assert (found.total, found.mlp, found.attention, found.embeddings) == (total, mlp, attention, embeddings)


def test_parts_and_the_rest_make_the_whole():
    # BERT: LayerNorms (weight and bias, one after the embeddings and two per block) and the pooler.
    bert = count_parameters(_architecture("bert_base"))
    assert bert.total - bert.mlp - bert.attention - bert.embeddings == 25 * 2 * 768 + 768 * 768 + 768
    # LLaMa: RMSNorms (two per block and a last one) and the output head.
    llama = count_parameters(_architecture("llama2_7b"))
    assert llama.total - llama.mlp - llama.attention - llama.embeddings == 65 * 4096 + 32000 * 4096


def test_share():
    bert = count_parameters(_architecture("bert_base"))
    assert [round(bert.share(part), 2) for part in ("total", "mlp", "embeddings", "attention")] == [
        100,
        51.76,
        21.77,
        25.89,
    ]


def test_a_tied_head_counts_once():
    architecture = _architecture("llama2_7b") | {"num_hidden_layers": 1}
    tied = count_parameters(architecture | {"tie_word_embeddings": True})
    assert count_parameters(architecture).total - tied.total == 32000 * 4096


@pytest.mark.parametrize("name", sorted(path.stem for path in CONF.glob("*.yaml")))
def test_every_configured_model_can_be_counted(name):
    architecture = _architecture(name)
    if architecture is None:
        pytest.skip(f"{name} takes its architecture from its checkpoint")
    found = count_parameters(architecture)
    assert 0 < found.mlp < found.total and found.mlp + found.attention + found.embeddings <= found.total


@pytest.mark.parametrize("architecture", [{"model_type": "gpt2"}, {}])
def test_unknown_model_type(architecture):
    with pytest.raises(ValueError, match="cannot be counted by part; allowed are bert, roberta, llama"):
        count_parameters(architecture)
