"""A decoder of another architecture is one YAML file: it trains and answers in its tokenizer's own template."""

import json
import shutil
from copy import deepcopy
from pathlib import Path

import pytest
import torch
import yaml

from finetune.mt_bench.answer_cells import answer_one
from finetune.runs.chat import ChatProblem
from finetune.runs.problem import Run
from finetune.runs.run import run_once
from finetune.store.records import read_json

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
SIZES |= {"max_position_embeddings": 128}
LAYER = r".*\.layers\.(?P<layer>\d+)\.mlp"
NEOX = {
    "architecture": {"model_type": "gpt_neox", **SIZES},
    "target_modules": {"up": rf"{LAYER}\.dense_h_to_4h", "down": rf"{LAYER}\.dense_4h_to_h"},
}
COMMON = {"title": "Tiny", "checkpoint": None, "revision": None, "files": [], "random_weights": False}
COMMON |= {"layers_to_transform": [0], "lora_rank": 1, "k": 40, "template": "tokenizer"}


@pytest.fixture
def family(chat_root, llama_tokenizer, tmp_path):
    """``chat.root`` with a checkpoint of random weights of GPT-NeoX, and ``conf`` with its YAML file."""
    from transformers import AutoConfig, AutoModelForCausalLM

    root, conf = tmp_path / "root", tmp_path / "conf"
    shutil.copytree(chat_root / "oasst1", root / "oasst1")
    shutil.copytree(Path(__file__).parents[3] / "conf", conf)
    tokenizer = deepcopy(llama_tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHATML
    torch.manual_seed(0)
    config = AutoConfig.for_model(**NEOX["architecture"], vocab_size=len(tokenizer), bos_token_id=1, eos_token_id=2)
    folder = root / "models" / "own"
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (conf / "model/neox.yaml").write_text(yaml.safe_dump({"name": "neox", "folder": "models/own", **COMMON, **NEOX}))
    return root, conf


@pytest.mark.parametrize("method", ["full", "sparsegrad"])
def test_a_step_and_an_answer(method, family, tmp_path):
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    root, conf = family
    overrides = [
        "model=neox", f"method={method}", f"chat.root={root}", "chat=generated_chat", "scale=llama/smoke",
        "scale.max_length=32", "scale.batch_size=4", "scale.micro_batch_size=4", "scale.max_steps=1",
        "scale.evaluation_steps=1", "protocol.preliminary.steps=1", "device=cpu", "progress=false",
        "wandb.mode=disabled", f"checkpoints={tmp_path / 'checkpoints'}", f"output={tmp_path / 'output'}",
    ]  # fmt: skip
    with initialize_config_dir(str(conf), version_base=None):
        config = OmegaConf.to_container(compose("chat", overrides), resolve=True)
    inputs = ChatProblem(config)
    record = run_once(inputs, Run(inputs.task, 1, inputs.hyperparameters()), keep=tmp_path / "merged")
    assert record["status"] == "finished" and record["training"]["steps"] == 1
    assert inputs.template.name.startswith("tokenizer:") and record["data"]["template"] == inputs.template.name

    question = {"question_id": 1, "category": "math", "turns": ["One?", "Two?"]}
    (tmp_path / "question.jsonl").write_text(json.dumps(question) + "\n")
    sizes = {"max_new_tokens": 4, "batch_size": 1, "long_prompts": "cut", "reserve": 4, "seed": 0, "dtype": "fp32"}
    asked = {"name": "own", "root": str(tmp_path), "folder": "", "questions": "question.jsonl"}
    answering = config | {"questions": asked, "scale": {"name": "smoke", "answers": sizes}}
    answers = read_json(answer_one(answering, 1, tmp_path / "merged", tmp_path / "answers"))
    assert answers["template"] == inputs.template.name and answers["counts"]["questions"] == 1
    assert "chat_template.jinja" in answers["model"]["settings"]
    (line,) = map(json.loads, (tmp_path / "answers" / answers["answers"]["file"]).read_text().splitlines())
    assert all(0 < tokens <= 4 for tokens in line["new_tokens"])
    encoded = inputs.template.encode(inputs.tokenizer, ["One?"])
    assert line["prompt_tokens"][0] == len(encoded.input_ids)
