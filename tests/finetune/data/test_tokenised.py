"""Tokenised splits come back from files as they were: what a model sees, and the hash of it."""

import pytest
import torch

from finetune.data.oasst import pack
from finetune.data.tokenised import load_split, save_split
from sparsegrad import load_tensors, save_tensors


@pytest.mark.parametrize(("task", "padding"), [("cola", "longest"), ("stsb", "max_length"), ("mrpc", "longest")])
def test_a_split_of_glue_comes_back(task, padding, load, tmp_path):
    for role, split in load(task, padding=padding)[1].items():
        save_split(tmp_path / role, split)
        found = load_split(tmp_path / role)
        for name in ("input_ids", "token_type_ids", "pad_token_id", "length", "content", "sha256"):
            assert getattr(found, name) == getattr(split, name)
        batch, before = found.batch([3, 0, 5]), split.batch([3, 0, 5])
        assert batch.keys() == before.keys() and found.labels.dtype == split.labels.dtype
        assert all(torch.equal(batch[name], before[name]) for name in batch)


def test_packed_dialogues_come_back(tmp_path):
    generator = torch.Generator().manual_seed(0)
    split = pack(torch.randint(0, 262_144, (90,), generator=generator), torch.rand(90, generator=generator) < 0.5, 8)
    split.sha256 = "ab"
    save_split(tmp_path / "a", split)
    found = load_split(tmp_path / "a")
    assert (found.content, found.sha256, found.facts) == (split.content, "ab", split.facts)
    assert torch.equal(found.labels, split.labels) and found.input_ids.dtype == torch.int64


def test_another_content_and_no_split_are_refused(load, tmp_path):
    path = tmp_path / "a"
    save_split(path, load("cola")[1]["train"])
    tensors, facts = load_tensors(path)
    save_tensors(path, tensors | {"labels": 1 - tensors["labels"]}, facts)
    with pytest.raises(ValueError, match="a is not the split that it was written of"):
        load_split(path)
    save_tensors(path, tensors, {"content": "bases"})
    with pytest.raises(ValueError, match="a holds 'bases', no tokenised split"):
        load_split(path)
