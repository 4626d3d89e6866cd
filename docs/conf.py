"""How sphinx builds these pages: make docs."""

import re
from pathlib import Path
from typing import Any

project = "llmlite"
author = "the llmlite authors"
extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode", "myst_parser"]
root_doc = "index"
html_theme = "furo"
html_title = "llmlite"
myst_heading_anchors = 3
myst_enable_extensions = ["dollarmath"]
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
napoleon_use_rtype = False
suppress_warnings = ["toc.not_included", "myst.header"]
default_role = "code"  # single backquotes name code, as in the pages


_plain: dict[str, list[str]] = {}


def _formulas(_app: Any, what: str, name: str, _object: Any, _options: Any, lines: list[str]) -> None:
    """Docstrings are plain text: indented paragraphs of a module's are formulas and tables, and bars are bars."""
    found: list[str] = []
    for place, line in enumerate(lines):
        if what == "module" and line.startswith("    "):
            if not lines[place - 1].startswith("    "):
                found += ["::", ""]
            found.append(line)
        else:
            found.append(line.replace("|", "\\|"))
    lines[:] = found
    if what == "attribute":
        _plain[name] = found


def _as_written(_app: Any, what: str, name: str, _object: Any, _options: Any, lines: list[str]) -> None:
    """What stands before a colon in the description of a field is no type, as napoleon would have it."""
    if what == "attribute":
        lines[:] = _plain.pop(name)


def _bare(_app: Any, what: str, *_: Any) -> tuple[str, str] | None:
    """Fields of a class are listed below it, with their types and defaults; its signature would say them twice."""
    return ("", "") if what == "class" else None


def _within(app: Any, _page: str, source: list[str]) -> None:
    """Pages and folders of the repository outside of docs/ are no pages of the site: their names stay, their links go; all others are checked."""

    def text_or_link(found: re.Match[str]) -> str:
        target = Path(app.srcdir) / found[2].partition("#")[0]
        return found[1] if target.is_dir() or target.suffix == ".md" else found[0]

    source[0] = re.sub(r"\[([^\]]*)\]\((\.\./[^)]*)\)", text_or_link, source[0])


def setup(app: Any) -> None:
    """Called by sphinx."""
    app.connect("source-read", _within)
    app.connect("autodoc-process-docstring", _formulas, priority=400)
    app.connect("autodoc-process-docstring", _as_written, priority=600)
    app.connect("autodoc-process-signature", _bare)
