"""The templates: every text is escaped, whatever it is and wherever it comes from."""

from __future__ import annotations

import re
from base64 import b64encode
from importlib import resources
from typing import Any

import jinja2
from markupsafe import Markup, escape

from finetune.published import discrepancies
from finetune.report.model import format_value
from finetune.report.page.tables import anchor_of, heading_of, interval_of
from finetune.stats.verdicts import MARKS, MEANINGS

_PACKAGE = "finetune.report.page"
"""Where the templates and the stylesheet lie."""

_ROW = re.compile(r"\bD\d+\b")

_DARK = "<style>@media (prefers-color-scheme:dark){text{fill:#b9c0cb!important}}</style></svg>"
"""Texts of a picture are a grey that reads on any page, and lighter for a reader who prefers dark ones."""


def render(template: str, **context: Any) -> str:
    """A whole HTML document.

    The template lies beside this module.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader(_PACKAGE, "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"linked": linked, "picture": picture, "anchor": anchor_of, "heading": heading_of}
    environment.globals |= {
        "marks": MARKS,
        "meanings": MEANINGS,
        "value": format_value,
        "interval": interval_of,
        "style": Markup(resources.files(_PACKAGE).joinpath("page.css").read_text(encoding="utf-8")),
    }
    return environment.get_template(template).render(context)


def linked(text: str) -> Markup:
    """A text with every row of the differences in it, such as D2, linked to its card."""
    known = {row["row"] for row in discrepancies()}
    return Markup(
        _ROW.sub(lambda row: f'<a href="#{row[0].lower()}">{row[0]}</a>' if row[0] in known else row[0], escape(text))
    )


def picture(svg: bytes) -> str:
    """An SVG as an address that an image takes: a picture loads nothing and runs nothing."""
    body, _, _ = svg.decode().rstrip().rpartition("</svg>")
    return f"data:image/svg+xml;base64,{b64encode((body + _DARK).encode()).decode()}"
