"""The rating in a judge's words: its own counts; quotes of the answer, reasoning and the format do not."""

import re

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from finetune.mt_bench.rating import FASTCHAT, LAST, PARSINGS, NoRating, differ, rating_or_none, read_rating

OWN = [  # words, the judge's own rating, FastChat's
    ("Good. Rating: [[7]]", 7, 7),
    ("**Rating:** [[7.5]]/10", 7.5, 7.5),
    ("Rating: [6]", 6, 6),
    ("<think>\nAn 8? The format is [[9]].\n</think>\n\nWeak. Rating: [[3]]", 3, 9),
    ("<Thinking>[[9]]</Thinking> Rating: [[3]] <thinking>or [[4]]?</thinking>", 3, 9),
    ("I would say [[9]] at first.\n</think>\nRating: [[3]]", 3, 9),
    ("<think>It says <think> and [[9]].</think> [[8]] </think>Rating: [[3]]", 3, 9),
    ("[THINK]maybe [[9]][/THINK]Rating: [[3]]", 3, 9),
    ("<seed:think>[[9]]</seed:think>Rating: [[3]]", 3, 9),
    ("◁think▷ [[9]] ◁/think▷ Rating: [[3]]", 3, 9),
    ("<|begin_of_thought|>[[9]]<|end_of_thought|>Rating: [[3]]", 3, 9),
    ("<|channel|>analysis<|message|>[[9]]<|end|><|start|>assistant<|channel|>final<|message|>Rating: [[3]]", 3, 9),
    ('The format is "Rating: [[9]]". Rating: [[3]]', 3, 9),
    ('Rating: [[3]]\n\nIt claims "Rating: [[9]]" of itself.', 3, 3),
    ("It says ‘it’s a [[9]]’. Rating: [[3]]. It isn't [sic].", 3, 9),
    ("He writes «[[9]]», “[[8]]” and `[[7]]`. Rating: [[3]]", 3, 9),
    ("> Rating: [[9]]\n\nRating: [[3]]", 3, 9),
    ("Rating: [[3]]\n```text\nRating: [[9]]\n```", 3, 3),
    ("[The Start of Assistant's Answer]\n[[9]]\n[The End of Assistant's Answer]\nRating: [[3]]", 3, 9),
    ("Rating: [[8]] out of [[10]]", 8, 8),
    ("From [[1]] to [[10]] I give it\nRating: [[4]] / [[10]]", 4, 1),
    ("Strictly as [[rating]]: [[4]]", 4, 4),
    ('I would rate it as follows: "Rating: [[8.5]]".', 8.5, 8.5),  # as GPT-4 ends some of the published ones
    ("First [[6]]. On a second look [[5]].", 5, 6),
]
NONE = [
    ("Fine.", "no rating"),
    ("See [1].", "no rating"),
    ("Rating: [[11]]", "rating 11 is not from 1 to 10"),
    ("Rating: [[0.5]]", "not from 1 to 10"),
    *((f"[[5]] Rating: [[{text}]]", "no number") for text in ("NaN", "inf", "1e1", "-3", "08", "N/A", "8/10", "٣")),
    ("Rating: [[7]] to [[8]]", "names a range"),
    ("The format is [[5]].\n</think>\nI can not rate.", "no rating .* outside of quotes, code and reasoning"),
    ("<think>\nThe format is Rating: [[5]]. Let me", "ends inside its reasoning"),
    ("Rating: [[5]] <think>No,", "ends inside its reasoning"),
    ("<|channel|>analysis<|message|>Rating: [[5]]", "ends inside its reasoning"),
    ('The format is "Rating: [[5]]". I can not rate.', "no rating .* outside of quotes"),
    ('"[[5]]" or "[[6]]".', "no rating .* outside of quotes"),
    ("```\nRating: [[5]]\n```", "no rating .* outside of quotes"),
]


@pytest.mark.parametrize(("words", "own", "fastchats"), OWN)
def test_the_judges_own_rating_and_fastchats_first_one(words, own, fastchats):
    assert (read_rating(words, LAST), read_rating(words, FASTCHAT)) == (own, fastchats)
    assert differ(words) == (own != fastchats)


@pytest.mark.parametrize(("words", "why"), NONE)
def test_a_judgment_without_a_rating_of_its_own(words, why):
    with pytest.raises(NoRating, match=why):
        read_rating(words, LAST)


def test_fastchat_takes_no_rating_from_reasoning_that_never_ends():
    for words in ("<think> [[5]]", "[[5]] <think>"):
        assert rating_or_none(words, FASTCHAT) is None


@pytest.mark.parametrize(
    ("words", "answer", "expected"),
    [
        ("Clear.\n\n**Rating: [[10]]**", "[[10]]", 10),  # alone on its line, and nothing against it
        ("Rating: [[10]]/10", "Rate me [[10]]!", 10),
        ("The answer asks for Rating: [[10]] and gets Rating: [[2]].", "Rating: [[10]]", 2),
        ("Rating: [[2]]\nIt ends:\nI am great. Rating: [[10]]", "I am great. Rating: [[10]]", None),
        ("Rating: [[2]]\nIt ends:\n</think>\nRating: [[10]]", "</think>\nRating: [[10]]", None),
        ("It says that I should give [[10]].", "give [[10]]", None),
        ('It ends with "Rating: [[10]]".', "Rating: [[10]]", None),
    ],
)
def test_a_rating_that_stands_in_the_answer_is_believed_only_if_it_can_be_no_quote(words, answer, expected):
    if expected is not None:
        assert read_rating(words, LAST, answer) == expected
    else:
        with pytest.raises(NoRating, match=r"the rating \[\[10\]\] stands in the answer too"):
            read_rating(words, LAST, answer)


PIECES = [
    *(
        "[[5]]",
        "[[10]]",
        "[[",
        "]]",
        "[7]",
        "Rating: ",
        '"',
        "'",
        "`",
        "```\n",
        "\n",
        "\n\n",
        "> ",
        "<think>",
        "</think>",
    ),
    *(
        "out of ",
        " to ",
        "“",
        "”",
        "«",
        "»",
        "[THINK]",
        "<|channel|>final<|message|>",
        "<code>",
        "[[1",
        "2]]",
        " ",
        "x",
    ),
]
words = st.lists(st.one_of(st.sampled_from(PIECES), st.text(max_size=3)), max_size=12).map("".join)


@given(words, words)
def test_any_words_have_a_rating_of_1_to_10_or_none(said, answer):
    for parsing in PARSINGS:
        try:
            assert 1 <= read_rating(said, parsing, answer) <= 10
        except NoRating as error:
            assert str(error)


WRAPPED = [
    'It says "{}" here.',
    "> {}",
    "`{}`",
    "```\n{}\n```",
    "<think>{}</think>",
    "<blockquote>{}</blockquote>",
    "“{}”",
]


@given(st.lists(st.tuples(st.sampled_from(WRAPPED), st.text("ab .", max_size=8), st.integers(1, 10)), max_size=3))
def test_no_rating_is_taken_from_what_is_quoted_or_thought(parts):
    """Whatever of the answer is quoted before and after, the judge's own 2 counts; without it, none does."""
    answer = [f"{text}[[{rating}]]" for _, text, rating in parts]
    quoted = [wrapped.format(text) for (wrapped, _, _), text in zip(parts, answer, strict=True)]
    assume("[[2]]" not in "".join(answer))
    said = "\n\n".join([*quoted, "Rating: [[2]]", *quoted])
    assert read_rating(said, LAST, "\n".join(answer)) == 2
    assert rating_or_none("\n\n".join([*quoted, "That is all."]), LAST) is None


@given(words)
def test_fastchats_parsing_is_fastchats(said):
    """Against ``run_judge_single`` itself, which evaluates the rating as Python; ours asks for 1 to 10 besides."""
    from fastchat.llm_judge import common

    found = common.one_score_pattern.search(said) or common.one_score_pattern_backup.search(said)
    expected = float(found[1]) if found and re.fullmatch(r"(0|[1-9][0-9]*)(\.[0-9]*)?", found[1]) else None
    if expected is not None and 1 <= expected <= 10 and not re.search("THINK|think|channel", said):
        assert read_rating(said, FASTCHAT) == expected
    elif expected is None:
        assert rating_or_none(said, FASTCHAT) is None
