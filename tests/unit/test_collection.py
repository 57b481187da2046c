"""No folder of tests is left out: pytest and ruff have lists of names that they skip, and `dist` is on both."""

from __future__ import annotations

import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = {path.relative_to(ROOT).as_posix() for path in (ROOT / "tests").rglob("test_*.py")}


def test_pytest_visits_every_folder(pytestconfig: pytest.Config) -> None:
    patterns = pytestconfig.getini("norecursedirs")
    folders = {part for file in FILES for part in Path(file).parts[:-1]}
    assert {"dist", "unit"} <= folders
    assert [folder for folder in sorted(folders) if any(fnmatch(folder, pattern) for pattern in patterns)] == []


def test_ruff_reads_every_file() -> None:
    ruff = Path(sys.executable).with_name("ruff")
    done = subprocess.run([ruff, "check", "--show-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert {str(ROOT / file) for file in FILES} - set(done.stdout.splitlines()) == set()
