"""The guard of `tests/unit/conftest.py`: what starts ranks fails here, with a message that says what to do."""

from __future__ import annotations

import multiprocessing
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.ranks import run_ranks
from tests.unit.conftest import starts_ranks


@pytest.mark.parametrize(
    "command",
    [
        ["torchrun", "--nproc-per-node", "2", "train.py"],
        [sys.executable, "-m", "torch.distributed.run", "train.py"],
        "/usr/bin/srun -N 2 true",
        [sys.executable, "-m", "megatron_smartmoe.adapter.launch", "--nproc", "2"],
        [Path("scripts/pretrain_gpt_moe.sh"), "--config", "configs/runs/quickstart.yaml"],
    ],
)
def test_a_command_that_starts_ranks_fails(command: str | list[str]) -> None:
    with pytest.raises(pytest.fail.Exception, match=r"tests/unit starts no ranks, and this test runs `.*: move it to"):
        subprocess.run(command, check=False)


def test_other_commands_run() -> None:
    assert subprocess.run([sys.executable, "-c", "print(1)"], check=False, capture_output=True).stdout
    assert not starts_ranks([sys.executable, "-m", "megatron_smartmoe.adapter.launch", "--dry-run"])


def test_ranks_and_process_groups_fail(tmp_path: Path) -> None:
    import torch.distributed as dist

    with pytest.raises(pytest.fail.Exception, match="starts a fork server: move it to tests/dist"):
        run_ranks(multiprocessing.active_children, 1, log_dir=tmp_path)
    with pytest.raises(pytest.fail.Exception, match="forms a process group: move it to tests/dist"):
        dist.init_process_group("gloo")
