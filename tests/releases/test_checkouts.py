"""The stock `pretrain_gpt.py` of Megatron-LM checkouts: those that SMARTMOE_MEGATRON_CHECKOUTS names (`:` between)."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from scripts import release_matrix
from tests.support.ports import free_ports

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


def test_the_transcript_of_a_newcomer(release: release_matrix.Release, tmp_path: Path) -> None:
    """The commands of docs/integrate.md, in a copy of the checkout, print what is written there."""
    if release.version.startswith("0.17"):
        pytest.skip("0.17 has other losses: the transcript is of 0.19")
    shutil.copytree(release.folder, tmp_path / "fork")
    release_matrix.patch(tmp_path / "fork", "--reverse")
    (tmp_path / "megatron_smartmoe").symlink_to(release_matrix.ROOT)
    text = (release_matrix.ROOT / "docs" / "integrate.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```text\n(\$ git clone .*?)```", text, flags=re.DOTALL)
    commands = [line.removeprefix("$ ") for line in block.splitlines() if line.startswith("$ ")]
    assert [command.split()[0] for command in commands[:2]] == ["git", "pip"]  # done already
    tools = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    script = "set -e\n" + "\n".join(commands[2:]).replace("torchrun ", f"torchrun --master-port {free_ports(1)[0]} ")
    environment = os.environ | {"PATH": tools, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        ["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=600, check=False, env=environment
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    for pattern in (
        r"^ smartmoe: iteration +\d+ \| homes: \d+ experts moved",
        r"^[-+](?:# |import |megatron_).*$",
        r"^the block was .*$",
    ):
        assert re.findall(pattern, done.stdout, re.MULTILINE) == re.findall(pattern, block, re.MULTILINE)
    loss = r"iteration +(\d+)/ +20 \|.*lm loss: (\S+)"
    printed, written = (dict(re.findall(loss, text)) for text in (done.stdout, block))
    assert {number: float(printed[number]) for number in written} == pytest.approx(
        {number: float(value) for number, value in written.items()}, rel=1e-4
    )
