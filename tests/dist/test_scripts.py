"""Training scripts that are not ours (`examples/`): what they train with `--smartmoe`, and without."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_smartmoe.spec.megatron_names import NAMES
from tests.support.ports import free_ports
from tests.support.scripts import EXAMPLES, FLAGS, train_script
from tests.support.training import losses

pytestmark = pytest.mark.dist

SHUFFLE = ("--smartmoe", "--smartmoe-homes", "shuffle", "--smartmoe-homes-interval", "2")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("scripts")


@pytest.fixture(scope="module")
def off(runs: Path) -> list[float]:
    """The losses of the example with a provider of its own, without --smartmoe."""
    train_script(EXAMPLES / "own_provider.py", runs / "off")
    return losses(runs / "off")


@pytest.fixture(scope="module")
def balanced(runs: Path) -> dict[str, Any]:
    """The same example with experts that move."""
    first, _ = train_script(EXAMPLES / "own_provider.py", runs / "on", *SHUFFLE)
    found: dict[str, Any] = first
    return found


def moves(runs: Path, name: str) -> int:
    """Migrations that the log of rank 0 reports."""
    return (runs / f"{name}-ranks" / "rank0.log").read_text().count("experts moved")


def test_a_provider_of_ones_own(runs: Path, off: list[float], balanced: dict[str, Any]) -> None:
    assert losses(runs / "on") == off
    assert len(off) == 6
    assert moves(runs, "on") == 2
    assert moves(runs, "off") == 0
    assert balanced["argv"]


@pytest.mark.parametrize("example", ["own_loop", "own_layer"])
def test_a_loop_and_a_layer_of_ones_own(runs: Path, example: str) -> None:
    for name, flags in ((f"{example}-off", ()), (f"{example}-on", SHUFFLE)):
        train_script(EXAMPLES / f"{example}.py", runs / name, *flags)
    assert losses(runs / f"{example}-on") == losses(runs / f"{example}-off")
    assert len(losses(runs / f"{example}-on")) == 6
    assert moves(runs, f"{example}-on") == 2


def test_megatrons_norm_is_replaced_where_it_stops(runs: Path) -> None:
    """Sequence parallelism without TransformerEngine: in a script too, with --smartmoe and without."""
    parallel = ("--tensor-model-parallel-size", "2", "--sequence-parallel", "--expert-tensor-parallel-size", "1")
    for name, flags in (("tp-off", ()), ("tp-on", SHUFFLE)):
        train_script(EXAMPLES / "own_provider.py", runs / name, *parallel, *flags)
    assert losses(runs / "tp-on") == losses(runs / "tp-off")
    assert moves(runs, "tp-on") == 2


def test_every_name_that_is_hooked_is_known(balanced: dict[str, Any]) -> None:
    """The table that doctor and the patches go by is that of `hooks.py`."""
    known = {name.full for name in NAMES if name.is_hooked}
    needed = {name.full for name in NAMES if name.is_hooked and not name.is_optional}
    also = {  # replaced where it is imported to, too
        "megatron.training.pretrain",
        "megatron.training.initialize_megatron",
        "megatron.training.initialize.initialize_megatron",
        "megatron.core.dist_checkpointing.load",
        "megatron.core.dist_checkpointing.save",
        "torch.save",
    }
    assert needed <= set(balanced["replaced"]) - also <= known


def test_the_selftest_says_where_it_is(balanced: dict[str, Any]) -> None:
    head, *rows = balanced["selftest"].splitlines()
    assert head.startswith("megatron-core 0.19.2")
    assert head.endswith("names hooked")
    assert len(rows) == len(NAMES)
    assert not [row for row in rows if row.split()[0] == "missing"]


def test_two_lines_and_torchrun(runs: Path, off: list[float]) -> None:
    """The script as users start it: nothing of the project is imported before its first line."""
    ranks = ["--nproc-per-node", "2", "--master-port", str(free_ports(1)[0])]
    command = [sys.executable, "-m", "torch.distributed.run", *ranks, str(EXAMPLES / "own_provider.py")]
    flags = [*FLAGS, *SHUFFLE, "--smartmoe-run-dir", str(runs / "torchrun")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, *flags], capture_output=True, text=True, timeout=300, check=False, env=environment)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert losses(runs / "torchrun") == off
    lines = [line for line in done.stdout.splitlines() if line.startswith("smartmoe: default")]
    assert lines[-1] == (
        "smartmoe: default --distributed-backend gloo --no-bias-swiglu-fusion --no-bias-gelu-fusion   "
        "(no GPU: gloo, and functions are not compiled)"
    )
    assert "Finished after 6 iterations." in done.stdout


def test_a_wrong_flag_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(AssertionError) as caught:
        train_script(EXAMPLES / "own_provider.py", tmp_path / "run", *SHUFFLE, "--smartmoe-spare-slots", "-1", ranks=1)
    assert (
        "\nerror: --smartmoe-spare-slots = -1 (command line): must be at least 0. Remove it, or pass 0, for no "
        "replicas.\n"
    ) in str(caught.value)
