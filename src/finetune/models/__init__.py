"""Checkpoints and tokenizers, from a folder or the hub; tiny models that the pipeline pretrains itself."""

from finetune.models.load import (
    cast_frozen,
    checkpoint_activations,
    contents,
    fingerprint,
    load_causal,
    load_classifier,
    load_tokenizer,
    no_file_bars,
    positions,
    resolve,
    store_trained,
)

__all__ = [
    "cast_frozen",
    "checkpoint_activations",
    "contents",
    "fingerprint",
    "load_causal",
    "load_classifier",
    "load_tokenizer",
    "no_file_bars",
    "positions",
    "resolve",
    "store_trained",
]
