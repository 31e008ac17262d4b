"""One chat template for training and answering: a dialogue's text, and which of its tokens are the assistant's.

The text is FastChat's or that of the tokenizer's own template. With FastChat's ``llama-2`` a dialogue is
``[INST] question [/INST] answer </s><s>[INST] question [/INST] ...``; the first ``<s>`` is not in the text, the
tokenizer adds it. A prompt is the beginning of the text that is trained, and its token ids are the beginning of the
trained ids: both come from :meth:`ChatTemplate.encode`.
"""

from __future__ import annotations

import hashlib
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

TAG = re.compile(r"<[^\s<>]+>|<<[^\s<>]+>>|\[[^\s\[\]]+\]")  # what a template marks turns with: <s>, <<SYS>>, [INST]
SUGGESTED = ("llama-2", "mistral", "vicuna_v1.1", "zephyr", "TinyLlama")
OWN = "tokenizer"
"""The name that stands for the tokenizer's own template in ``model.template``."""

SAMPLE = ("question", "answer", "question", "answer")


@dataclass(frozen=True)
class Encoded:
    """A tokenised dialogue.

    Attributes:
        input_ids: with the beginning-of-sequence token.
        trained: one an id: true for the tokens of the assistant's turns and of their ends.
    """

    input_ids: list[int]
    trained: list[bool]


class ChatTemplate(ABC):
    """A conversation template, found by name with :func:`chat_template`.

    Attributes:
        name: identifies the text; in data, bases, checkpoints and answers.
        stop_token_ids: ids that end an answer, besides the tokenizer's end-of-sequence.
        tags: its marks in brackets, such as ``[INST]`` and ``</s>``.
    """

    name: str
    stop_token_ids: tuple[int, ...]
    tags: frozenset[str]
    writes_beginning = False  # whether the text itself holds the beginning-of-sequence token

    def prompt(self, turns: Sequence[str]) -> str:
        """The text of a dialogue, as FastChat's ``get_prompt`` or the tokenizer's ``apply_chat_template`` writes it.

        A message that spells the template's own marks in brackets can't end a turn: ``[/INST]`` in it becomes
        ``[ /INST]``. Marks that are words, such as Vicuna's ``USER:``, stay as they are.

        Args:
            turns: user, assistant, user, ...; an odd number is a prompt for the next answer. An answer may be empty, as
                models' answers may be; FastChat leaves it out.

        Raises:
            ValueError: without turns, if a user's turn is empty, or if the template refuses a role.
        """
        if not turns:
            raise ValueError("a dialogue has no turns; needed: at least the user's first.")
        if empty := [place for place in range(0, len(turns), 2) if not turns[place]]:
            raise ValueError(f"turn {empty[0]} of a dialogue, the user's, is empty; leave the dialogue out.")
        return self._render([escape(turn, self.tags) for turn in turns])

    def encode(self, tokenizer: Any, turns: Sequence[str]) -> Encoded:
        """Tokenise a dialogue: the ids of its :meth:`prompt`, without the start of a turn that nobody takes.

        Besides the template's marks, the tokenizer's special tokens are taken apart in messages: ``<unk>`` as
        ``< unk>``. Cut at any user's turn, the ids are those of that prompt: a token across the border is refused.

        Raises:
            ValueError: as :meth:`prompt`; if the tokenizer is slow or adds an end; if the template does not end an
                answer with a token that generation stops at; if a token lies across the border of a prompt.
        """
        if not tokenizer.is_fast:
            raise ValueError("encoding a dialogue needs a fast tokenizer (a tokenizer.json), received a slow one.")
        turns = [escape(turn, special_tokens(tokenizer)) for turn in turns]
        text = self.prompt(turns)
        tokens = tokenizer(
            text, return_offsets_mapping=True, verbose=False, add_special_tokens=not self.writes_beginning
        )
        ids, places = list(tokens["input_ids"]), tokens["offset_mapping"]
        if ids and tuple(places[-1]) == (0, 0):
            raise ValueError(
                f"the tokenizer adds {tokenizer.decode(ids[-1:])!r} after a text; set add_eos_token=False."
            )
        ends = {tokenizer.eos_token_id, *self.stop_token_ids}
        trained = [False] * len(ids)
        last = len(ids)
        for turn in range(1, len(turns), 2):
            if not turns[turn]:
                continue  # an empty answer has no tokens, not even an end
            start = len(self._beginning(turns, turn, text))
            stop = len(self._beginning(turns, turn + 1, text))
            inside = self._inside(places, start, stop)
            last = next((place for place in reversed(inside) if ids[place] in ends), None)
            if last is None:
                raise ValueError(
                    f"template {self.name!r} does not end an answer with {tokenizer.eos_token!r} or a stop token of "
                    "this tokenizer; a model could not learn to stop. Choose the template that the model was made with."
                )
            for place in range(inside[0], last + 1):
                trained[place] = True
        if len(turns) % 2 == 0 and turns[-1]:  # what follows the last answer would begin a turn: </s><s>
            ids, trained = ids[: last + 1], trained[: last + 1]
        return Encoded(ids, trained)

    def cut_at_stop(self, text: str) -> str:
        """The answer up to the template's stop string, where it has one."""
        return text

    @abstractmethod
    def _render(self, turns: Sequence[str]) -> str:
        """The text of a dialogue; with an odd number of turns it ends where the next answer begins."""

    def _beginning(self, turns: Sequence[str], number: int, text: str) -> str:
        beginning = self.prompt(turns[:number])
        if not text.startswith(beginning):
            raise ValueError(f"template {self.name!r} writes earlier turns anew after an answer; it can't be trained.")
        return beginning

    def _inside(self, places: Sequence[tuple[int, int]], start: int, stop: int) -> list[int]:
        """The tokens between two characters; the first of them begins a new token."""
        across = [place for place, (first, after) in enumerate(places) if first < start < after]
        if across:
            raise ValueError(
                f"template {self.name!r}: token {across[0]} lies across the end of a prompt, so that training and "
                "answering would see different ids; choose another template."
            )
        return [place for place, (first, after) in enumerate(places) if start <= first and after <= stop and after]


class FastChatTemplate(ChatTemplate):
    """A template of FastChat.

    Its ``<s>`` and ``</s>`` are LLaMA's. A tokenizer that has none such gets its own in their place, and the name says
    so: a base checkpoint of another family can be trained in ``llama-2`` and stops at its own end of text.

    Without a tokenizer it is LLaMA's.
    """

    def __init__(self, conversation: Any, tokenizer: Any = None) -> None:
        self._conversation, self._own = conversation, {}
        self.name = conversation.name
        self.stop_token_ids = tuple(conversation.stop_token_ids or ())
        if tokenizer is not None and "</s>" in self._render(SAMPLE) and "</s>" not in special_tokens(tokenizer):
            self._own = {"</s>": tokenizer.eos_token or "", "<s>": tokenizer.bos_token or ""}
            self.name = f"{self.name} with {tokenizer.eos_token}"
        self.tags = frozenset(TAG.findall(f"{self._render(SAMPLE)} {conversation.system_template}"))

    def cut_at_stop(self, text: str) -> str:
        """As FastChat's ``gen_model_answer`` cuts; a stop string at the very beginning does not cut."""
        stops = self._conversation.stop_str or []
        found = [text.find(stop) for stop in ([stops] if isinstance(stops, str) else stops)]
        return text[: min((place for place in found if place > 0), default=len(text))]

    def _render(self, turns: Sequence[str]) -> str:
        conversation = self._conversation.copy()
        for name in ("sep", "sep2"):
            text = getattr(conversation, name)
            for theirs, ours in self._own.items() if text else ():
                text = text.replace(theirs, ours)
            setattr(conversation, name, text)
        for place, turn in enumerate(turns):
            conversation.append_message(conversation.roles[place % 2], turn)
        if len(turns) % 2:
            conversation.append_message(conversation.roles[1], None)
        return conversation.get_prompt()


class TokenizerTemplate(ChatTemplate):
    """The chat template that a checkpoint's tokenizer carries, as ``apply_chat_template`` renders it.

    Its name holds a hash of the template's text. An answer ends with the first special token that the template writes
    after it: ``<end_of_turn>`` of Gemma, ``<|im_end|>`` of ChatML.
    """

    writes_beginning = True

    def __init__(self, tokenizer: Any) -> None:
        if not isinstance(tokenizer.chat_template, str):
            raise ValueError(
                f"model.template={OWN}, but the tokenizer carries no chat template (a base checkpoint, say); set "
                f"model.template to one of FastChat's, such as: {', '.join(SUGGESTED)}."
            )
        self._tokenizer = tokenizer
        self.name = f"{OWN}:{hashlib.sha256(tokenizer.chat_template.encode()).hexdigest()[:12]}"
        self.tags = frozenset(TAG.findall(self._render(SAMPLE)))
        after = self._render(SAMPLE[:2]).rpartition(SAMPLE[1])[2]
        special = set(tokenizer.convert_tokens_to_ids(sorted(special_tokens(tokenizer))))
        end = next((token for token in tokenizer(after, add_special_tokens=False).input_ids if token in special), None)
        if end is None:
            raise ValueError(
                f"the tokenizer's chat template ends an answer with {after!r}, which holds no special token of it; a "
                "model could not learn to stop. Set model.template to one of FastChat's, such as llama-2."
            )
        self.stop_token_ids = (end,)

    def _render(self, turns: Sequence[str]) -> str:
        from jinja2 import TemplateError

        messages = [{"role": ("user", "assistant")[place % 2], "content": turn} for place, turn in enumerate(turns)]
        try:
            return self._tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=len(turns) % 2 == 1
            )
        except TemplateError as error:  # raise_exception("... role not supported"), and faults in it
            raise ValueError(
                f"the tokenizer's chat template refuses turns of user and assistant ({error}); set model.template to "
                "one of FastChat's, such as llama-2."
            ) from None


def chat_template(name: str | None, tokenizer: Any = None) -> ChatTemplate:
    """The conversation template of that name: one of FastChat's, or ``tokenizer`` for the tokenizer's own.

    Args:
        name: ``model.template``. FastChat's look-up by model path would silently answer with ``one_shot``, a dialogue
            about a birthday party in front of every prompt.
        tokenizer: the model's; may be missing for a template of FastChat, if it will be LLaMA's.

    Raises:
        ValueError: if there is none of that name, or the tokenizer's own can't be used.
    """
    from fastchat.conversation import conv_templates, get_conv_template

    if name == OWN:
        return TokenizerTemplate(tokenizer)
    if name not in conv_templates:
        known = ", ".join(known for known in SUGGESTED if known in conv_templates)
        raise ValueError(
            f"no chat template named {name!r}; set model.template to the one that the model was made with: {OWN} for "
            f"that of its tokenizer, or one of FastChat's {len(conv_templates)}, such as: {known}."
        )
    try:
        return FastChatTemplate(get_conv_template(name), tokenizer)
    except ValueError as error:  # FastChat: "Invalid style: None"
        raise ValueError(f"chat template {name!r} has no text, it is for a service behind an API ({error}).") from None


def special_tokens(tokenizer: Any) -> frozenset[str]:
    """The strings that a tokenizer reads as one special token wherever they stand."""
    added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    return frozenset(added | set(tokenizer.all_special_tokens))


def escape(text: str, marks: Iterable[str]) -> str:
    """Take marks of two characters and more in a text apart, by a space after the first."""
    found = [mark for mark in marks if len(mark) > 1 and mark in text]  # few, of Gemma's 6,249
    for mark in sorted(found, key=lambda mark: (-len(mark), mark)):
        while mark in text:
            text = text.replace(mark, f"{mark[0]} {mark[1:]}")
    return text
