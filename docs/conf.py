"""Sphinx's settings: `scripts/docs.sh` builds these pages into build/docs, and refuses links that lead nowhere."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

project = "megatron_smartmoe"
extensions = ["myst_parser"]
html_theme = "furo"
html_title = "megatron_smartmoe"
html_show_sphinx = False
html_show_copyright = False
html_copy_source = False
html_static_path = ["_static"]
html_css_files = ["wide.css"]
myst_heading_anchors = 4  # links to headings are checked like all others

_DOCS = Path(__file__).parent
_LINK = re.compile(r"(?<!!)\[([^\]]+)\]\((\.\.?/[^)\s#]+)[^)]*\)")


def _without_links_to_code(app: Any, name: str, source: list[str]) -> None:
    """Links to the repository's files are for those who browse it. What does not exist stays a link, and is refused."""
    folder = (_DOCS / name).parent

    def text_of(link: re.Match[str]) -> str:
        target = (folder / link[2]).resolve()
        return link[1] if target.exists() and _DOCS not in target.parents else link[0]

    source[0] = _LINK.sub(text_of, source[0])


def setup(app: Any) -> dict[str, bool]:
    """Called by Sphinx."""
    app.connect("source-read", _without_links_to_code)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
