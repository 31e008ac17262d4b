"""Tokenizers of the smoke experiment's tiny models, each of the kind of the real model that it stands for."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SPECIAL = ("<unk>", "<s>", "</s>")  # ids 0, 1, 2, as LLaMA's


def train_tokenizer(lines: list[str], model_type: str, vocab_size: int, max_length: int) -> Any:
    """A fast tokenizer of the model type's own kind: WordPiece for BERT, byte-level BPE for RoBERTa.

    Args:
        lines: text to learn from.
        model_type: ``bert`` or ``roberta``.
        vocab_size: at most.
        max_length: ``model_max_length``.

    Raises:
        ValueError: on another model type.
    """
    if model_type == "bert":
        names = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
        special = list(names.values())
        vocabulary = _learn_pieces(lines, special, names["unk"], vocab_size)
        tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token=names["unk"]))
        tokenizer.normalizer = normalizers.BertNormalizer()
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        tokenizer.decoder = decoders.WordPiece()
        ids = tokenizer.get_vocab()
        sep, cls = ((names[key], ids[names[key]]) for key in ("sep", "cls"))
        tokenizer.post_processor = processors.BertProcessing(sep, cls)
        inputs = ["input_ids", "token_type_ids", "attention_mask"]
    elif model_type == "roberta":
        names = {"cls": "<s>", "pad": "<pad>", "sep": "</s>", "unk": "<unk>", "mask": "<mask>"}
        special = list(names.values())  # ids 0, 1, 2, 3 as in roberta-base
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=special,
            show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        )
        tokenizer.train_from_iterator(lines, trainer)
        tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
        inputs = ["input_ids", "attention_mask"]
    else:
        raise ValueError(f"model_type={model_type!r}; tiny encoders are made for: bert, roberta.")
    tokens = {f"{key}_token": value for key, value in names.items()}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=max_length, model_input_names=inputs, **tokens
    )


def _learn_pieces(lines: list[str], special: list[str], unknown: str, vocab_size: int) -> dict[str, int]:
    """WordPiece's vocabulary, the same in every process.

    The trainer numbers pieces such as ``##a`` in the order of a hash table, and breaks ties of merges by number. As
    special tokens they have their places; so this tokenizer is for learning alone.
    """
    learner = Tokenizer(models.WordPiece(unk_token=unknown))
    learner.normalizer = normalizers.BertNormalizer()
    learner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    words = {
        word
        for line in lines
        for word, _ in learner.pre_tokenizer.pre_tokenize_str(learner.normalizer.normalize_str(line))
    }
    pieces = [f"##{character}" for character in sorted({character for word in words for character in word[1:]})]
    trainer = trainers.WordPieceTrainer(vocab_size=vocab_size, special_tokens=[*special, *pieces], show_progress=False)
    learner.train_from_iterator(lines, trainer)
    return learner.get_vocab()


def train_llama_tokenizer(texts: Iterable[str], vocab_size: int, max_length: int) -> Any:
    """A fast tokenizer of LLaMA's kind: byte-pair encoding, ``▁`` before words, bytes for unknown characters.

    Ids are LLaMA's: 0 ``<unk>``, 1 ``<s>``, 2 ``</s>``, 3 to 258 the bytes. It puts ``<s>`` before a text and parses
    ``<s>`` and ``</s>`` inside it. Batches are padded with ``</s>``, on the left.

    Args:
        texts: to learn from, without special tokens.
        vocab_size: at most.
        max_length: ``model_max_length``.

    Raises:
        ValueError: if the vocabulary has no room for the bytes and the characters of the texts.
    """
    fixed = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))]
    texts = list(texts)
    alphabet = set("".join(texts)) - {"\n"}  # new lines are bytes, as LLaMA's
    if vocab_size < len(fixed) + len(alphabet) + 1:
        raise ValueError(
            f"vocab_size={vocab_size}; {len(fixed)} special tokens and bytes and {len(alphabet) + 1} characters need "
            "more."
        )
    words = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = words
    trainer = trainers.BpeTrainer(vocab_size=vocab_size - len(fixed), show_progress=False)
    learner.train_from_iterator((line for text in texts for line in text.split("\n")), trainer)
    learned = json.loads(learner.to_str())["model"]
    names = [*fixed, *sorted(learned["vocab"], key=learned["vocab"].get)]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={name: number for number, name in enumerate(names)},
            merges=[tuple(merge) for merge in learned["merges"]],
            unk_token=SPECIAL[0],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    tokenizer.pre_tokenizer = words
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=max_length, padding_side="left",
        unk_token=SPECIAL[0], bos_token=SPECIAL[1], eos_token=SPECIAL[2], pad_token=SPECIAL[2],
        model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip
