"""A fault of each kind, from a fixed seed: the same losses or a stop with one line; and a mix under heap checks."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from scripts.reliability import fault_mounts, faults, heap
from scripts.reliability.fault_judge import GOOD
from scripts.reliability.fault_plan import KINDS, SHORT, draw
from scripts.reliability.fault_points import FUNCTIONS, holder_of
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.dist

SEED = 3


def _missing_points() -> list[str]:
    """In a rank, with Megatron: the points whose function is not there."""
    return [point for point, where in FUNCTIONS.items() if not hasattr(*holder_of(where))]


def test_every_point_is_there(tmp_path: Path) -> None:
    """A function that was renamed would leave its faults without effect: they would not strike."""
    assert run_ranks(_missing_points, 1, log_dir=tmp_path) == [[]]


def test_a_fault_of_each_kind(tmp_path: Path) -> None:
    left_out = (*fault_mounts.missing_kinds(), "cut the link", "long pause")  # these two take long
    kinds = [kind for kind in KINDS if kind not in left_out]
    many = draw(12, SEED, length=SHORT, kinds=kinds, launched_every=0, replicas=("exact",))
    drawn = list({fault.kind: fault for fault in reversed(many)}.values())
    outcomes = faults.run(tmp_path, drawn, SHORT)
    print(faults.table(outcomes))
    assert len({fault.kind for fault in drawn}) >= 5
    bad = [outcome for outcome in outcomes if outcome["outcome"] not in GOOD]
    assert not bad, bad
    assert Counter(outcome["outcome"] for outcome in outcomes)["stopped"] > 0


@pytest.mark.long
def test_the_heap_stays_whole(tmp_path: Path) -> None:
    """The mix that ended with a corrupted heap once: scripts/soak.sh repeats it 300 times."""
    if (problem := heap.checks_do_nothing()) is not None:
        pytest.skip(f"no heap checks here: {problem}")
    command = [sys.executable, str(Path(heap.__file__)), str(tmp_path), "--repeats", "2", "--iterations", "2"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 repeats of 4 ranks" in done.stdout
