"""Configuration of the documentation site: ``make docs``."""

from __future__ import annotations

import re
from typing import Any

import mae_core

project = "mae-transfer"
author = "The mae-transfer contributors"
version = release = mae_core.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc"]
exclude_patterns = ["images"]
html_theme = "furo"
html_title = f"mae-transfer {version}"
myst_heading_anchors = 3
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
autodoc_inherit_docstrings = False
# Files of the repository that are linked from pages and are no part of the site.
suppress_warnings = ["myst.xref_missing"]

TABLE = re.compile(r"^(\s+\S|\S+(, \S+)*\s{2,}\S)")
"""A line of an aligned list, such as ``hidden       (B, N) bool``."""


def as_restructured_text(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Show aligned lists of a docstring as they are written, and let nothing but ``code`` be markup."""
    paragraphs = "\n".join(lines).strip("\n").split("\n\n")
    lines[:] = []
    for paragraph in paragraphs:
        rows = paragraph.split("\n")
        if any(TABLE.match(row) for row in rows):
            lines += ["::", "", *(f"    {row}" for row in rows), ""]
        else:
            pieces = re.split(r"(``.*?``)", paragraph, flags=re.DOTALL)
            pieces[::2] = [re.sub(r"([*|`\\]|_\b)", r"\\\1", piece) for piece in pieces[::2]]
            lines += [*"".join(pieces).split("\n"), ""]


def setup(app: Any) -> None:
    """Called by Sphinx."""
    app.connect("autodoc-process-docstring", as_restructured_text)
