"""What the tests of the pages share."""

import re
from html.parser import HTMLParser

import pytest


class Tree(HTMLParser):
    """Checks that tags are balanced; keeps tags with attributes, texts, and the text of table cells."""

    def __init__(self, html):
        super().__init__()
        self.open, self.tags, self.cells, self.texts = [], [], [], []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self.open.append(tag)
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)
        if {"td", "th"} & set(self.open):
            self.cells[-1] += data

    def names(self):
        return [tag for tag, _ in self.tags]

    def values(self, name):
        return [attributes[name] for _, attributes in self.tags if name in attributes]


@pytest.fixture(autouse=True)
def _believed(believed):
    """Of records made up here."""


@pytest.fixture
def whole():
    """``whole(html)``: its tree, after checks of what holds for every page: it needs and runs nothing from outside."""

    def make(html):
        tree = Tree(html)
        assert not {"script", "link", "iframe", "object", "embed", "base", "form", "svg"} & {*tree.names()}
        assert not [name for _, attributes in tree.tags for name in attributes if name.startswith("on")]
        assert all(source.startswith("data:image/svg+xml;base64,") for source in tree.values("src"))
        assert all(attributes["alt"] for tag, attributes in tree.tags if tag == "img")
        assert len(ids := tree.values("id")) == len({*ids}) and {*tree.values("aria-labelledby")} <= {*ids}
        assert not re.search(r"@import|url\(|20\d\d-\d\d-\d\dT", html)
        assert "prefers-color-scheme: dark" in html and 'name="viewport"' in html
        return tree

    return make
