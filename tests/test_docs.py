"""The pages of docs/: links lead somewhere, generated ones are up to date, quoted lines are what the code prints."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.flags_page import PATH, page

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_the_pages_build_and_every_link_leads_somewhere(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "sphinx", "--quiet", "--fail-on-warning", "--keep-going", "--builder", "html"]
    done = subprocess.run([*command, "docs", str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    front = (tmp_path / "index.html").read_text()
    for name in (path.stem for path in (ROOT / "docs").glob("*.md")):
        assert f"{name}.html" in front or name == "index", f"no way from the front page to {name}"


def test_the_page_of_flags_is_that_of_the_parsers() -> None:
    assert PATH.read_text(encoding="utf-8") == page(), "run .venv/bin/python -m scripts.flags_page"


SYMPTOMS = re.findall(r"```text\n(.+?)\n```", (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def texts() -> set[tuple[str, ...]]:
    """Every text in the sources, cut where it has a field."""
    found = set()
    for path in (ROOT / "megatron_smartmoe").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            values = node.values if isinstance(node, ast.JoinedStr) else [node]
            parts = [
                value.value for value in values if isinstance(value, ast.Constant) and isinstance(value.value, str)
            ]
            found.add(tuple(parts))
    return found


@pytest.fixture(scope="module")
def passages(texts: set[tuple[str, ...]]) -> set[tuple[str, ...]]:
    """Parts of a text that follow each other: enough words to tell one line from another, and not more than a line."""
    longest = max(map(len, SYMPTOMS))
    cut = {parts[at : at + 3] for parts in texts for at in range(len(parts))}
    return {parts for parts in cut if 14 <= sum(map(len, parts)) <= longest}


@pytest.mark.parametrize("line", SYMPTOMS)
def test_a_symptom_is_what_the_code_prints(line: str, passages: set[tuple[str, ...]]) -> None:
    assert any(_prints(parts, line) for parts in passages)


def _prints(parts: tuple[str, ...], line: str) -> bool:
    """Whether the line has these parts of a text, and the example's numbers and names between them."""
    if any(part not in line for part in parts):
        return False
    return re.search(".{0,60}".join(map(re.escape, parts)), line) is not None


def test_the_words_of_the_watchdog(texts: set[tuple[str, ...]]) -> None:
    endings = re.findall(r"^\| `([^`]+)` \| ", (ROOT / "docs" / "troubleshooting.md").read_text(), flags=re.MULTILINE)
    assert len(endings) == 6
    for ending in endings:
        assert any(ending in part for parts in texts for part in parts), ending
