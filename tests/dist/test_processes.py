"""What must be the same in every process: decisions, because ranks compare them, and the scripts of a checkout."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.unit.placement.test_homes_planner import decisions_of_a_run

pytestmark = pytest.mark.dist
ROOT = Path(__file__).parents[2]


def test_decisions_are_equal_across_processes() -> None:
    code = "from tests.unit.placement.test_homes_planner import decisions_of_a_run as run; print('\\n'.join(run()))"
    command = [sys.executable, "-c", code]
    there = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    assert there == decisions_of_a_run()


@pytest.mark.parametrize("script", ["validation/validate_layer_model.py", "validation/validate_planner.py"])
def test_a_script_runs_from_the_checkout(script: str) -> None:
    """By its path, as the documentation has it, with nothing of the checkout on the import path."""
    command = [sys.executable, f"scripts/{script}", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--predict" in done.stdout
