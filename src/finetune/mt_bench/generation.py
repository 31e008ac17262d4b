"""Batched sampling of which a row's tokens do not depend on the rows beside it.

A token drawn from softmax(scores / temperature) is the argmax of scores / temperature + Gumbel noise (the Gumbel-max
trick). Each row has its own noise generator, so that a batch of several temperatures, an interrupted run and a run one
by one all give the same tokens, up to the rounding of the model's own batched arithmetic.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn

GREEDY_BELOW = 1e-4  # FastChat's gen_model_answer: a lower temperature means no sampling
DEFAULT_TOP_K = 50  # transformers' default where a checkpoint's generation_config.json sets none, so FastChat's too


def row_generator(seed: int, question_id: int, turn: int) -> torch.Generator:
    """The CPU noise generator of one answer, a function of these three numbers and nothing else."""
    digest = hashlib.sha256(f"{seed}/{question_id}/{turn}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


class SampleByRow:
    """Logits processor after which the argmax of a row is its sample; with a temperature near 0 that of its scores.

    The noise of the rows is drawn on the CPU whatever device the model is on; warpers are transformers' top-k and such.
    """

    def __init__(
        self, temperatures: Sequence[float], generators: Sequence[torch.Generator], warpers: Sequence[Any]
    ) -> None:
        self._rows = [row for row, temperature in enumerate(temperatures) if temperature >= GREEDY_BELOW]
        self._temperatures = torch.tensor([temperatures[row] for row in self._rows])[:, None]
        self._generators = [generators[row] for row in self._rows]
        self._warpers = warpers

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores ``(rows, vocabulary)`` with noise added.

        Raises:
            ValueError: if a score is NaN.
        """
        if torch.isnan(scores).any():
            raise ValueError("the model's outputs are NaN: its weights are damaged, or its training diverged.")
        if not self._rows:
            return scores
        sampled = scores[self._rows] / self._temperatures.to(scores)
        for warper in self._warpers:
            sampled = warper(input_ids[self._rows], sampled)
        scores = scores.clone()
        scores[self._rows] = sampled + self._noise(scores.shape[-1]).to(scores)
        return scores

    def _noise(self, vocabulary: int) -> Tensor:
        """Standard Gumbel noise ``(sampled rows, vocabulary)``, float32."""
        exponential = torch.stack([torch.empty(vocabulary).exponential_(generator=g) for g in self._generators])
        return -exponential.clamp_min(torch.finfo(torch.float32).tiny).log()  # never inf: it would win regardless


def sampling_settings(model: nn.Module) -> dict[str, float | None]:
    """``top_k``, ``top_p`` and ``min_p`` with which FastChat's ``model.generate(do_sample=True)`` samples."""
    found = model.generation_config
    top_k = DEFAULT_TOP_K if found.top_k is None else found.top_k
    return {"top_k": top_k, "top_p": found.top_p, "min_p": found.min_p}


def stop_ids(model: nn.Module, tokenizer: Any, extra: Collection[int]) -> list[int]:
    """Tokens that end an answer: the checkpoint's, the tokenizer's, the template's."""
    own = model.generation_config.eos_token_id
    own = own if isinstance(own, list) else [own]
    return sorted({token for token in (*own, tokenizer.eos_token_id, *extra) if token is not None})


@torch.inference_mode()
def generate(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    temperatures: Sequence[float],
    generators: Sequence[torch.Generator],
    stops: Sequence[int],
) -> list[list[int]]:
    """New tokens of every prompt, a stop token that ended them included.

    Args:
        model: a causal language model in evaluation mode.
        prompts: token ids, not empty; shorter ones are padded on the left and masked.
        temperatures, generators: of the rows.
        stops: tokens that end a row.

    Raises:
        ValueError: if the model's outputs are NaN.
    """
    from transformers import GenerationConfig, LogitsProcessorList

    width, padding = max(map(len, prompts)), stops[0] if stops else 0  # masked: any id of the vocabulary will do
    input_ids = torch.full((len(prompts), width), padding)
    mask = torch.zeros_like(input_ids)
    for row, prompt in enumerate(prompts):
        input_ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    # What is named here overrides the checkpoint's generation_config.json; the rest of it (repetition penalty) holds.
    config = GenerationConfig(
        do_sample=False,
        temperature=1.0,
        top_k=DEFAULT_TOP_K,
        top_p=1.0,
        num_beams=1,
        max_new_tokens=max_new_tokens,
        use_cache=True,
        pad_token_id=padding,
        eos_token_id=list(stops) or None,
    )
    sampler = SampleByRow(temperatures, generators, _warpers(sampling_settings(model)))
    output = model.generate(
        input_ids.to(model.device),
        attention_mask=mask.to(model.device),
        generation_config=config,
        logits_processor=LogitsProcessorList([sampler]),
    )
    new = output[:, width:].tolist()
    ends = [next((place for place, token in enumerate(row) if token in stops), len(row)) for row in new]
    return [row[: end + 1] for row, end in zip(new, ends, strict=True)]


def _warpers(settings: dict[str, float | None]) -> list[Any]:
    """In transformers' own order."""
    from transformers import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    top_k, top_p, min_p = settings["top_k"], settings["top_p"], settings["min_p"]
    warpers: list[Any] = [TopKLogitsWarper(int(top_k))] if top_k else []
    warpers += [TopPLogitsWarper(top_p)] if top_p is not None and top_p < 1.0 else []
    return warpers + ([MinPLogitsWarper(min_p)] if min_p is not None else [])
