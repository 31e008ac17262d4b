"""The common look: files that are the same at every run, read on any background, with their words beside them."""

import json
import re
import subprocess
import sys

import pytest

from finetune.report.figures import figure_style
from finetune.report.figures.figure_style import COLOURS, GREY, Words, new_figure, save_figure, styles

WORDS = Words("A title", "What is shown.", ("A note.",), ("results/x/a.json",))


def draw(folder, words=WORDS, name="test"):
    with new_figure(4, 3, 1, 2, sharey=True) as (figure, axes):
        for place, (label, colour) in enumerate(COLOURS.items()):
            axes[0, 0].plot([0, 1], [0, place + 1], color=colour, label=label)
        axes[0, 0].set_xlabel("k (entries)")
        axes[0, 0].legend()
        axes[0, 1].imshow([[0, 1], [2, 3]])
        return save_figure(figure, folder, name, words)


def test_a_figure_is_three_files_and_a_rerun_gives_the_same_bytes(tmp_path):
    first, second = draw(tmp_path / "a"), draw(tmp_path / "b")
    assert [path.name for path in first] == ["test.svg", "test.png", "test.json"]
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]
    words = {"title": "A title", "caption": "What is shown.", "notes": ["A note."], "source": ["results/x/a.json"]}
    assert json.loads(first[2].read_text()) == words


def test_texts_stay_texts_nothing_is_black_or_white_or_dated_and_the_background_is_transparent(tmp_path):
    from matplotlib.image import imread

    svg, png, _ = draw(tmp_path)
    assert ">k (entries)</text>" in svg.read_text() and GREY in svg.read_text()
    assert not re.search(r"#000000|#ffffff|<dc:date>|matplotlib v", svg.read_text(), flags=re.IGNORECASE)
    image = imread(png)
    assert image.shape[2] == 4 and (image[..., 3] == 0).mean() > 0.5


def test_any_number_of_names_has_colours_and_markers():
    names = ["lora", "variant", *(f"new{place}" for place in range(20))]
    found = styles(names, {"variant": "sparsegrad"})
    assert [*found] == names and found["lora"][0] == COLOURS["lora"] and found["variant"][0] == COLOURS["sparsegrad"]
    assert len({found[name] for name in names[:12]}) == 12
    assert not {found[name][0] for name in names[2:]} & set(COLOURS.values())


def test_the_style_of_other_code_is_left_alone(tmp_path):
    import matplotlib

    before = dict(matplotlib.rcParams)
    draw(tmp_path)
    assert dict(matplotlib.rcParams) == before


@pytest.mark.parametrize("words", [Words("", "c", (), ("s",)), Words("t", "", (), ("s",)), Words("t", "c")])
def test_a_figure_without_words_or_source_is_refused_and_nothing_is_written(words, tmp_path):
    with pytest.raises(ValueError, match="test: title, caption and at least one source are needed"):
        draw(tmp_path / "a", words)
    assert not (tmp_path / "a").exists()


def test_numbers_and_paths_of_labels():
    found = [figure_style.number(value) for value in (0, 0.12345, 7.0, 12.34, 123.4, 2359296)]
    assert found == ["0", "0.123", "7", "12.3", "123", "2,359,296"]
    assert figure_style.relative_paths(["b/c.json", "a.json", "a.json"]) == ("a.json", "b/c.json")


def test_pyplot_is_never_loaded():
    """It keeps figures of the whole process and picks a window system."""
    code = (
        "import sys, tempfile\n"
        "from finetune.report.figures.figure_style import *\n"
        "assert 'matplotlib' not in sys.modules\n"
        "with tempfile.TemporaryDirectory() as folder, new_figure(2, 2) as (figure, axes):\n"
        "    save_figure(figure, folder, 'a', Words('t', 'c', (), ('s',)))\n"
        "assert 'matplotlib' in sys.modules and 'matplotlib.pyplot' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
