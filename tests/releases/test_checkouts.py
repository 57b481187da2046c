"""The stock `pretrain_gpt.py` of Megatron-LM checkouts: those that SMARTMOE_MEGATRON_CHECKOUTS names (`:` between)."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import pytest

from scripts import release_matrix

pytestmark = [pytest.mark.dist, pytest.mark.slow]

VARIABLE = "SMARTMOE_MEGATRON_CHECKOUTS"
CHECKOUTS = [Path(each) for each in os.environ.get(VARIABLE, "").split(os.pathsep) if each]
NONE: Any = pytest.param(None, marks=pytest.mark.skip(reason=f"{VARIABLE} is not set"), id="none")


@pytest.fixture(scope="module", params=CHECKOUTS or [NONE], ids=lambda path: path.name)
def release(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> release_matrix.Release:
    """A patched copy."""
    return release_matrix.checkout(request.param, tmp_path_factory.mktemp("release"))


def test_homes_that_move_change_no_loss(release: release_matrix.Release) -> None:
    assert "20 losses equal to off" in release_matrix.check_homes(release)


def test_losses_are_those_of_our_own_entry(release: release_matrix.Release) -> None:
    assert release_matrix.check_own_entry(release) in ("20 losses equal", "needs 0.19")


def test_replicas_save_and_resume(release: release_matrix.Release) -> None:
    assert release_matrix.check_resume(release) == "10 losses equal after iteration 10"


@pytest.mark.parametrize("path", CHECKOUTS or [NONE])
def test_the_patch_goes_in_and_out_to_the_byte(path: Path, tmp_path: Path) -> None:
    tree = release_matrix.checkout(path, tmp_path).folder
    digests = [hashlib.sha256((each / "pretrain_gpt.py").read_bytes()).hexdigest() for each in (path, tree)]
    assert digests[0] != digests[1]
    release_matrix.patch(tree, "--reverse")
    assert hashlib.sha256((tree / "pretrain_gpt.py").read_bytes()).hexdigest() == digests[0]
