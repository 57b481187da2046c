"""The import contracts of pyproject.toml: they hold, and they fail where a module breaks them."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = "megatron_smartmoe"
NO_SIMULATOR = "what trains imports neither the simulator nor a peer's rule"


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """The package and its contracts in another folder, from which the linter reads them."""
    shutil.copytree(ROOT / PACKAGE, tmp_path / PACKAGE, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path / PACKAGE


def broken_contracts(package: Path) -> list[str]:
    """The names of the contracts that the linter, started beside `package`, calls broken."""
    linter = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run(
        [linter, "--no-cache", "--no-logo"], cwd=package.parent, capture_output=True, text=True, check=False
    )
    broken = [line.removesuffix(" BROKEN") for line in done.stdout.splitlines() if line.endswith(" BROKEN")]
    assert done.returncode == (1 if broken else 0), done.stdout + done.stderr
    return broken


def test_the_package_keeps_its_contracts(copied: Path) -> None:
    assert broken_contracts(copied) == []


@pytest.mark.parametrize(
    ("module", "imported"),
    [
        ("placement/policy.py", "simulate.baselines.eplb"),
        ("runtime/controller.py", "simulate.run"),
        ("adapter/loops/homes.py", "simulate.run"),
    ],
)
def test_what_trains_must_not_import_the_simulator(copied: Path, module: str, imported: str) -> None:
    with (copied / module).open("a", encoding="utf-8") as file:
        file.write(f"\nimport {PACKAGE}.{imported}\n")
    assert NO_SIMULATOR in broken_contracts(copied)
