"""For mkdocs: pages are written for the repository, where links lead out of ``docs``; a site has one root.

README is the first page; what pages link to outside ``docs`` is copied as it is. Of docstrings, Sphinx' roles
become links.
"""

import re
from pathlib import Path
from typing import Any

from griffe import Extension
from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
PAGES = {"README.md": "index.md"} | {name: name for name in ("CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")}
LINK = re.compile(r"\]\((?![a-z]+:|#)([^)#\s]+)")
PUBLIC = {  # name to what the reference lists: `sparsegrad.refresh` is a module too
    f"sparsegrad.{name}": listed
    for listed, name in re.findall(r"^::: (sparsegrad\.(\w+)\S*)", (ROOT / "docs" / "api.md").read_text(), re.M)
}
ROLE = re.compile(r":(?:func|class|meth|attr|mod):`([^`]+)`")


def on_files(files: Any, config: Any) -> Any:
    """Add the pages and the files outside ``docs``."""
    for name, uri in PAGES.items():
        files.append(File.generated(config, uri, abs_src_path=str(ROOT / name)))
    for page in [*(ROOT / name for name in PAGES), *(ROOT / "docs").glob("*.md")]:
        for target in LINK.findall(page.read_text()):
            uri = _uri(page, target)
            if files.get_file_from_path(uri) is None and (ROOT / uri).is_file():
                files.append(File.generated(config, uri, abs_src_path=str(ROOT / uri)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links as they are in the site."""
    source = Path(page.file.abs_src_path)
    return LINK.sub(lambda found: f"]({_uri(source, found[1])}", markdown)


def _uri(page: Path, target: str) -> str:
    """Where the site has what a page links to: the files of ``docs`` in its root, others as the repository."""
    path = (page.parent / target).resolve().relative_to(ROOT)
    name = path.relative_to("docs") if path.parts[0] == "docs" else path
    return PAGES.get(str(path), str(name))


class Roles(Extension):
    """``:func:`sparsegrad.merge``` of a docstring as a link; what is named without its package, as code."""

    def on_object(self, *, obj: Any, **_: Any) -> None:
        """Called by griffe for each module, class and function."""
        if obj.docstring is not None:
            obj.docstring.value = ROLE.sub(_link, obj.docstring.value)


def _link(found: re.Match[str]) -> str:
    name = found[1].removeprefix("~")
    public = ".".join(name.split(".")[:2])
    return f"[`{name}`][{PUBLIC[public]}{name[len(public) :]}]" if public in PUBLIC else f"`{name}`"
