"""The page of Appendix E from answers and judgments on disk."""

import hashlib
import json
import re
from html.parser import HTMLParser

import pytest

from finetune.mt_bench.judged import read_judgments
from finetune.report.page.examples import choose_page, read_answers, to_html

QUESTIONS = [
    {"question_id": 84, "category": "writing", "turns": ["Write about <b>rain</b> & snow.", "Second turn 84"]},
    {"question_id": 95, "category": "math", "turns": ["What is 1 + 1?", "Second turn 95"]},
]
LABELS = ["Regular FT", "LoRA", "SparseGrad", "MeProp"]
METHODS = ["full", "lora", "sparsegrad", "meprop"]


def answer_of(method, seed, number):
    return f'Answer of {method} {seed} to {number}: <script>alert("x")</script> & "quotes"'


def run_of(kind, method, seed):
    run = {"experiment": "test", "kind": kind, "model": "tiny", "method": method, "task": "mt_bench", "seed": seed}
    return run | {"protocol": "sound", "scale": "smoke", "config_hash": "abc"}


def write_lines(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def write_answers(root, method, seed, *, numbers=(84, 95), cut=(), refused=(), text=answer_of):
    """As the answers stage leaves them."""
    folder = root / "answers" / "tiny" / method
    folder.mkdir(parents=True, exist_ok=True)
    name = f"tiny-{method}-seed{seed}"
    model = {"title": "Tiny LLaMA"}
    record = {"run": run_of("answers", method, seed), "template": "llama-2", "options": {}, "model": model}
    (folder / f"{name}.json").write_text(json.dumps(record))
    lines = [
        {
            "question_id": number,
            "answer_id": "x",
            "model_id": name,
            "choices": [{"index": 0, "turns": [text(method, seed, number), "second answer"]}],
            "config_hash": "abc",
            "cut": [number in cut, False],
            "refused": [number in refused, True],
        }
        for number in numbers
    ]
    write_lines(folder / f"{name}.jsonl", lines)


def write_judgments(root, method, seed, scores, *, quality=True, repeats=3, text=answer_of):
    """As the judgments stage leaves them; scores: (question, repeat) -> score of the first turn."""
    folder = root / "judgments" / "tiny" / method
    folder.mkdir(parents=True, exist_ok=True)
    name = f"tiny-{method}-seed{seed}"
    judge = {"model": "judge<1>", "measures_quality": quality, "temperature": 0, "max_tokens": 64, "repeats": repeats}
    record = {
        "run": run_of("judgments", method, seed),
        "judge": judge,
        "questions": {"file": "question.jsonl", "sha256": "0" * 64, "count": 2},
        "answers": {"cut": 0, "refused": 0},
    }
    (folder / f"{name}.json").write_text(json.dumps(record))
    lines = [
        {
            "question_id": number,
            "model": name,
            "judge": ["judge<1>", "single-v1"],
            "judgment": f"Words {repeat} <i>on</i> {method}. Rating: [[{score}]]",
            "score": score,
            "turn": 1,
            "repeat": repeat,
            "answer_sha256": hashlib.sha256(json.dumps([text(method, seed, number)]).encode()).hexdigest(),
            "config_hash": "abc",
        }
        for (number, repeat), score in scores.items()
    ]
    write_lines(folder / f"{name}.jsonl", lines)


def page_of(root, *, examples=(84, 95), model="tiny"):
    return to_html(
        choose_page(
            experiment="test",
            model=model,
            questions=QUESTIONS,
            examples=examples,
            answers=read_answers(root / "answers"),
            judgments=read_judgments(root / "judgments"),
        )
    )


class Tree(HTMLParser):
    """Checks that tags are balanced and gathers tags, attributes and texts."""

    VOID = frozenset({"meta", "!doctype"})

    def __init__(self, html):
        super().__init__()
        self.open, self.tags, self.attributes, self.texts = [], [], [], []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if data.strip():
            self.texts.append(data.strip())


@pytest.fixture
def root(tmp_path):
    for method in METHODS:
        write_answers(tmp_path, method, 1)
        write_judgments(tmp_path, method, 1, {(n, r): s for n in (84, 95) for r, s in enumerate((2, 9, 7))})
    return tmp_path


def article(html, number, label):
    """The card of a method under a question."""
    section = re.search(rf'<h2 id="q{number}">.*?</section>', html, re.DOTALL)[0]
    (found,) = [card for card in re.findall(r"<article>.*?</article>", section, re.DOTALL) if f"<h3>{label}<" in card]
    return found


def test_questions_answers_scores_and_words(root):
    html = page_of(root)
    tree = Tree(html)
    assert tree.tags.count("section") == 2 and tree.tags.count("article") == 8 and tree.tags.count("details") == 24
    assert [text for text in tree.texts if text in LABELS] == LABELS * 2
    assert QUESTIONS[0]["turns"][0] in tree.texts
    for method in METHODS:
        assert answer_of(method, 1, 84) in tree.texts and answer_of(method, 1, 95) in tree.texts
    card = Tree(article(html, 84, "LoRA"))
    assert "7" in card.texts and "median of 2, 9, 7" in card.texts
    assert "Words 1 <i>on</i> lora. Rating: [[9]]" in card.texts
    assert "Second turn" not in html and "second answer" not in html
    assert "Tiny LLaMA (tiny) stands in the place of LLaMa-2 (llama2_7b)." in tree.texts
    assert "Judge: judge<1>, median of 3 repeats." in tree.texts
    assert "Conversation template: llama-2." in tree.texts
    assert "Seeds shown: Regular FT 1, LoRA 1, SparseGrad 1, MeProp 1." in tree.texts


def test_every_text_is_escaped(root):
    html = page_of(root)
    assert "<script" not in html and "<i>" not in html and "<b>rain" not in html
    assert "&lt;script&gt;alert(&quot;x&quot;)&lt;/script&gt; &amp; &quot;quotes&quot;" in html


def test_nothing_from_outside(root):
    html = page_of(root)
    tree = Tree(html)
    assert not {"link", "script", "img", "iframe", "object"} & set(tree.tags)
    assert not {"src", "href", "srcset", "onclick", "onload"} & {name for name, _ in tree.attributes}
    assert not re.search(r"https?:|url\(|@import", html)


def test_for_a_phone_and_in_the_dark(root):
    html = page_of(root)
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in html
    assert "prefers-color-scheme: dark" in html and "auto-fit" in html


def test_scores_that_measure_no_quality(tmp_path):
    write_answers(tmp_path, "full", 1)
    write_judgments(tmp_path, "full", 1, {(84, 0): 5}, quality=False)
    assert "not a measure of quality" in page_of(tmp_path)
    write_judgments(tmp_path, "full", 1, {(84, 0): 5}, quality=True)
    assert "not a measure of quality" not in page_of(tmp_path)


def test_what_is_missing_is_said(tmp_path):
    write_answers(tmp_path, "full", 1, numbers=(84,))
    write_answers(tmp_path, "lora", 1, text=lambda *_: " ")
    write_judgments(tmp_path, "full", 1, {(84, 0): 5})
    html = page_of(tmp_path)
    assert "2 of 3 repeats failed" in article(html, 84, "Regular FT")
    assert "this question was not answered" in article(html, 95, "Regular FT")
    assert "not judged" in article(html, 84, "LoRA") and "an empty answer" in article(html, 84, "LoRA")
    assert "no answers of this method" in article(html, 84, "MeProp")


def test_cut_and_refused_prompts(tmp_path):
    write_answers(tmp_path, "full", 1, cut=(84,), refused=(95,))
    html = page_of(tmp_path)
    assert "and was cut" in article(html, 84, "Regular FT") and "and was refused" not in article(html, 84, "Regular FT")
    assert "and was refused" in article(html, 95, "Regular FT")
    # Second turns were refused too: the sum is over all answers, the cards show first turns.
    assert "1 cut, 3 refused." in html


def test_judgments_of_another_answer_are_not_shown(tmp_path):
    write_answers(tmp_path, "full", 1)
    write_judgments(tmp_path, "full", 1, {(84, 0): 5}, text=lambda *_: "an older answer")
    card = article(page_of(tmp_path), 84, "Regular FT")
    assert "not judged" in card and "Judgments of another answer" in card and "Rating" not in card


def test_seed_that_all_methods_have(tmp_path):
    for method, seeds in (("full", (1, 2, 3)), ("lora", (2, 3))):
        for seed in seeds:
            write_answers(tmp_path, method, seed)
    assert "Seeds shown: Regular FT 2, LoRA 2." in page_of(tmp_path)
    write_answers(tmp_path, "meprop", 7)
    assert "Seeds shown: Regular FT 1, LoRA 2, MeProp 7." in page_of(tmp_path)


def test_lines_of_an_older_configuration_are_no_answers(tmp_path):
    write_answers(tmp_path, "full", 1)
    path = tmp_path / "answers" / "tiny" / "full" / "tiny-full-seed1.jsonl"
    path.write_text(path.read_text().replace('"config_hash": "abc"', '"config_hash": "old"'))
    assert "this question was not answered" in article(page_of(tmp_path), 84, "Regular FT")


def test_no_model_and_no_answers(tmp_path):
    assert "Nothing ran in the place of LLaMa-2 (llama2_7b)." in page_of(tmp_path, model=None)
    html = page_of(tmp_path)
    assert html.count("no answers of this method") == 8 and "Nothing was judged." in html


@pytest.mark.parametrize("examples", [(), (84, 159)])
def test_unknown_examples(root, examples):
    with pytest.raises(ValueError, match=r"name at least one question, each of them of \[84, 95\]"):
        page_of(root, examples=examples)
