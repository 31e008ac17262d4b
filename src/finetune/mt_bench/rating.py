"""The rating in a judge's words: the judge's own, or the first that FastChat's pattern finds.

``last`` (the default) takes the last rating outside of reasoning, quotes and code: a judge repeats the asked format,
quotes the answer, and thinks aloud before it decides. What can't be told from a quote has no rating. ``fastchat`` is
``run_judge_single`` of FastChat's ``llm_judge/common.py``, for scores to be held against published ones: the first
``[[number]]`` anywhere, reasoning and quotes included. In neither has reasoning that never ends a rating.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence

Number = int | float

LAST, FASTCHAT = PARSINGS = ("last", "fastchat")
LEAST, MOST = 1, 10

# FastChat's one_score_pattern and one_score_pattern_backup; its package imports torch.
_FASTCHATS = (re.compile(r"\[\[(\d+\.?\d*)\]\]"), re.compile(r"\[(\d+\.?\d*)\]"))

_THOUGHT = r"think(?:ing)?|thoughts?|reason(?:ing)?|analysis|reflection|scratchpad"
_MARK = re.compile(
    rf"<(?P<xml>/?)(?:\w{{1,20}}[:_])?(?:{_THOUGHT})\b[^<>\n]{{0,40}}>"  # DeepSeek, Qwen, Seed
    r"|(?-i:\[(?P<square>/?)THINK\])"  # Mistral
    r"|◁(?P<kimi>/?)think▷"
    rf"|<\|(?P<word>end|start|begin)_(?:of_)?(?:{_THOUGHT})\|>"  # Command A, OpenThinker
    r"|<\|channel\|>(?P<channel>\w+)[^<]{0,40}<\|message\|>",  # gpt-oss
    re.IGNORECASE,
)

_BRACKETS = r"\[\[([^\[\]\n]{0,40})\]\]"
_RATING = re.compile(rf"{_BRACKETS}|\brating\W{{1,6}}(?<!\[)\[([^\[\]\n]{{1,40}})\](?!\()", re.IGNORECASE)
_NUMBER = re.compile(r"(?:0|[1-9][0-9]*)(?:\.[0-9]*)?")
_NO_QUOTE = r"[^\w\"'`“”„«»‘]*"
_ALONE = re.compile(  # "**Final rating:** [[7]]", on a line of its own
    rf"{_NO_QUOTE}(?:(?:my|the|final|overall)\s+)*(?:(?:rating|score)\b{_NO_QUOTE})?{_BRACKETS}(?:/10)?{_NO_QUOTE}",
    re.IGNORECASE,
)
_FORMAT = {"rating", "score", "number"}  # [[rating]] is the prompt's word for the format
_BETWEEN = re.compile(rf"{_BRACKETS}\s*(?:-|–|—|to|or|through)\s*{_BRACKETS}", re.IGNORECASE)
_SCALE = re.compile(rf"(?:\bout\s+of|/)\s*{_BRACKETS}", re.IGNORECASE)

_BLOCKS = (
    re.compile(r"^[ \t]*(```+|~~~+).*?(?:^[ \t]*\1|\Z)", re.DOTALL | re.MULTILINE),  # code, to the end
    re.compile(r"(?:\[|<\|)The Start of .*?(?:The End of [^\]|\n]*(?:\]|\|>)|\Z)", re.DOTALL),  # the prompt's answer
    re.compile(r"<(blockquote|q|quote|pre|code)\b[^<>\n]*>.*?(?:</\1\s*>|\Z)", re.DOTALL | re.IGNORECASE),
    re.compile(r"^[ \t]*>.*$", re.MULTILINE),
)
_QUOTES = (  # in a line or a paragraph
    re.compile(r"(?<!`)(`+)(?!`)(?:(?!\n\s*\n).){1,500}?(?<!`)\1(?!`)", re.DOTALL),
    *(
        re.compile(rf"[{left}](?:(?!\n\s*\n)[^{right}]){{0,500}}?[{right}](?!\w)")
        for left, right in (("“„", "”“"), ("«", "»"), ("‘", "’"), ("「", "」"))
    ),
    re.compile(r'"[^"\n]*"'),
    re.compile(r"(?<!\w)'(?:[^'\n]|(?<=\w)'(?=\w))*'(?!\w)"),
)


class NoRating(Exception):
    """A judgment that has no rating, and why."""


def read_rating(words: str, parsing: str, answer: str = "") -> Number:
    """The rating of a judgment, 1 to 10.

    Args:
        words: what the judge said.
        parsing: one of ``PARSINGS``.
        answer: the judged answer; a rating that stands in it too is believed on a line of its own, if no other speaks
            against it.

    Raises:
        NoRating: if there is none, or it can't be told which is the judge's own.
    """
    if parsing == FASTCHAT:
        _without_reasoning(words)
        return _in_range(_fastchats(words))
    found = _own(words)
    value = _in_range(_inside(found))
    if _inside(found) in map(_inside, _RATING.finditer(answer)):
        line = found.string[: found.end()].rpartition("\n")[2] + found.string[found.end() :].partition("\n")[0]
        others = {*map(_inside, _RATING.finditer(words))} - {_inside(found)}
        if others or not _ALONE.fullmatch(line):
            raise NoRating(f"the rating {found[0]} stands in the answer too: it may be a quote")
    return value


def rating_or_none(words: str, parsing: str) -> Number | None:
    """As `read_rating`, `None` where there is none."""
    try:
        return read_rating(words, parsing)
    except NoRating:
        return None


def differ(words: str) -> bool:
    """Whether the two parsings read a judgment differently, one of them finding no rating included."""
    return rating_or_none(words, LAST) != rating_or_none(words, FASTCHAT)


def _without_reasoning(words: str) -> str:
    """What stands outside of reasoning: all before a closing mark that nothing opened was reasoning too."""
    kept, start, thinking = [], 0, False
    for mark in _MARK.finditer(words):
        if not thinking:
            kept.append(words[start : mark.start()])
        found = mark.groupdict()
        closes = any(found[name] == "/" for name in ("xml", "square", "kimi")) or found["word"] in ("end", "END")
        closes = closes or found["channel"] == "final"
        if closes and not thinking:
            kept.clear()
        start, thinking = mark.end(), not closes
    if thinking:
        raise NoRating("the judgment ends inside its reasoning")
    return "".join([*kept, words[start:]])


def _own(words: str) -> re.Match[str]:
    """The last rating that no quote holds; or the one in quotes with which it ends, as GPT-4 writes at times."""
    outside = _SCALE.sub(" ", _without_reasoning(_without(_BLOCKS + _QUOTES, words)))
    outside = _BETWEEN.sub(lambda found: " " if found.groups() == (str(LEAST), str(MOST)) else found[0], outside)
    if found := _ratings(outside):
        if pair := next((pair for pair in _BETWEEN.finditer(outside) if pair.end() == found[-1].end()), None):
            raise NoRating(f"the judgment names a range ({pair[0]})")
        return found[-1]
    found = _ratings(_without_reasoning(_without(_BLOCKS, words)))
    if found and not re.search(r"\w", found[-1].string[found[-1].end() :]) and len({*map(_inside, found)}) == 1:
        return found[-1]
    quoted = " outside of quotes, code and reasoning" if _RATING.search(words) else ""
    raise NoRating(f"no rating [[{LEAST}]] to [[{MOST}]] in the judgment{quoted}")


def _ratings(words: str) -> list[re.Match[str]]:
    return [match for match in _RATING.finditer(words) if _inside(match).lower() not in _FORMAT]


def _without(quotes: Sequence[re.Pattern[str]], words: str) -> str:
    for quote in quotes:
        words = quote.sub(" ", words)
    return words


def _inside(found: re.Match[str]) -> str:
    return (found[1] if found[1] is not None else found[2]).strip(" *_")


def _fastchats(words: str) -> str:
    found = next((match for pattern in _FASTCHATS if (match := pattern.search(words))), None)
    if found is None:
        raise NoRating(f"no rating [[{LEAST}]] to [[{MOST}]] in the judgment")
    return found[1]


def _in_range(text: str) -> Number:
    if not _NUMBER.fullmatch(text):
        raise NoRating(f"no number as rating ({text!r:.40})")
    if not LEAST <= float(text) <= MOST:
        raise NoRating(f"the rating {text:.40} is not from {LEAST} to {MOST}")
    return ast.literal_eval(text)  # as FastChat: 7 stays a whole number
