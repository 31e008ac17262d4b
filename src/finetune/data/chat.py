"""One chat template for training and answering: FastChat's text, and which of its tokens are the assistant's.

With the ``llama-2`` template a dialogue is ``[INST] question [/INST] answer </s><s>[INST] question [/INST] ...``; the
first ``<s>`` is not in the text, the tokenizer adds it. A prompt is the beginning of the text that is trained, and its
token ids are the beginning of the trained ids: both come from :meth:`ChatTemplate.encode`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

TAG = re.compile(r"<[^\s<>]+>|<<[^\s<>]+>>|\[[^\s\[\]]+\]")  # what a template marks turns with: <s>, <<SYS>>, [INST]
SUGGESTED = ("llama-2", "mistral", "vicuna_v1.1", "zephyr", "TinyLlama")


@dataclass(frozen=True)
class Encoded:
    """A tokenised dialogue.

    Attributes:
        input_ids: with the beginning-of-sequence token.
        trained: one an id: true for the tokens of the assistant's turns and of their ends.
    """

    input_ids: list[int]
    trained: list[bool]


class ChatTemplate:
    """A conversation template of FastChat, found by name with :func:`chat_template`.

    Attributes:
        name: FastChat's.
        stop_token_ids: ids that end an answer, besides the tokenizer's end-of-sequence.
        tags: its marks in brackets; ``[INST]``, ``[/INST]``, ``<s>``, ``</s>``, ``<<SYS>>``, ``<</SYS>>`` in llama-2.
    """

    def __init__(self, conversation: Any) -> None:
        self._conversation = conversation
        self.name: str = conversation.name
        self.stop_token_ids: tuple[int, ...] = tuple(conversation.stop_token_ids or ())
        skeleton = self._render(["question", "answer", "question", "answer"])
        self.tags = frozenset(TAG.findall(f"{skeleton} {conversation.system_template}"))

    def prompt(self, turns: Sequence[str]) -> str:
        """The text of a dialogue, as FastChat's ``get_prompt`` writes it.

        A message that spells the template's own marks in brackets can't end a turn: ``[/INST]`` in it becomes
        ``[ /INST]``. Marks that are words, such as Vicuna's ``USER:``, stay as they are.

        Args:
            turns: user, assistant, user, ...; an odd number is a prompt for the next answer. An answer may be empty, as
                models' answers may be; FastChat leaves it out.

        Raises:
            ValueError: without turns, or if a user's turn is empty.
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

        Args:
            tokenizer: a fast Hugging Face tokenizer; adds its beginning-of-sequence token, and no end.
            turns: as for :meth:`prompt`.

        Raises:
            ValueError: as :meth:`prompt`; if the tokenizer is slow or adds an end; if the template does not end an
                answer with a token that generation stops at; if a token lies across the border of a prompt.
        """
        if not tokenizer.is_fast:
            raise ValueError("encoding a dialogue needs a fast tokenizer (a tokenizer.json), received a slow one.")
        turns = [escape(turn, special_tokens(tokenizer)) for turn in turns]
        text = self.prompt(turns)
        tokens = tokenizer(text, return_offsets_mapping=True, verbose=False)
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
        """The answer up to the template's stop string, as FastChat's ``gen_model_answer`` cuts it.

        As there, a stop string at the very beginning does not cut.
        """
        stops = self._conversation.stop_str or []
        found = [text.find(stop) for stop in ([stops] if isinstance(stops, str) else stops)]
        return text[: min((place for place in found if place > 0), default=len(text))]

    def _render(self, turns: Sequence[str]) -> str:
        conversation = self._conversation.copy()
        for place, turn in enumerate(turns):
            conversation.append_message(conversation.roles[place % 2], turn)
        if len(turns) % 2:
            conversation.append_message(conversation.roles[1], None)
        return conversation.get_prompt()

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
                f"template {self.name!r}: token {across[0]} lies across the end of a prompt, so that the model would "
                "be trained on ids that it never sees when it answers; choose another template."
            )
        return [place for place, (first, after) in enumerate(places) if start <= first and after <= stop and after]


def chat_template(name: str | None) -> ChatTemplate:
    """FastChat's conversation template of that name.

    Raises:
        ValueError: if there is none. FastChat's look-up by model path would silently answer with ``one_shot``, a
            dialogue about a birthday party in front of every prompt.
    """
    from fastchat.conversation import conv_templates, get_conv_template

    if name not in conv_templates:
        known = ", ".join(known for known in SUGGESTED if known in conv_templates)
        raise ValueError(
            f"no chat template named {name!r}; set model.template to the one that the model was made with, "
            f"such as: {known} (FastChat has {len(conv_templates)})."
        )
    try:
        return ChatTemplate(get_conv_template(name))
    except ValueError as error:  # FastChat: "Invalid style: None"
        raise ValueError(
            f"chat template {name!r} has no text, it is for a service behind an API ({error}); set model.template to "
            "the one that the model was made with."
        ) from None


def special_tokens(tokenizer: Any) -> frozenset[str]:
    """The strings that a tokenizer reads as one special token wherever they stand."""
    added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    return frozenset(added | set(tokenizer.all_special_tokens))


def escape(text: str, marks: Iterable[str]) -> str:
    """Take marks in a text apart, by a space after their first character.

    Args:
        marks: strings of at least two characters.
    """
    for mark in sorted(marks, key=lambda mark: (-len(mark), mark)):
        while mark in text and len(mark) > 1:
            text = text.replace(mark, f"{mark[0]} {mark[1:]}")
    return text
