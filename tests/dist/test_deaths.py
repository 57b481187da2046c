"""Ranks that die under the real torchrun: the last line says which one and by what, and the others end in seconds.

The ranks are small programs that wait as ranks of a training do; tests/dist/test_kill.py kills one of a training.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

pytestmark = [pytest.mark.dist, pytest.mark.timeout(180)]

HOST = os.uname().nodename
LAUNCHER = """
import sys
from pathlib import Path
from megatron_smartmoe.adapter.launch import process
from megatron_smartmoe.adapter.launch.ending import Ending
command = [sys.executable, "-m", "megatron_smartmoe.adapter.launch.torchrun", "--nproc-per-node", "2", "--standalone"]
ending = Ending(resume="launch --run-dir D")
sys.exit(process.run([*command, "--module", "rank_program"], {}, Path("train.log"), ending=ending))
"""
WAY_ON = "no folder of checkpoints (--save) | to start again: launch --run-dir D"
# Rank 0 waits, with a handler for SIGTERM that never gets to run, as in a collective whose other side is gone.
PROGRAM = """
import os, signal, sys, time
if os.environ["RANK"] == "0":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    open("rank0", "w").write(str(os.getpid()))
    time.sleep(600)
while not os.path.exists("rank0"):
    time.sleep(0.05)
"""
RAISES = """
from megatron_smartmoe.adapter.pretrain import note_exception
try:
    raise ValueError("x = 3:\\n    too small")
except ValueError as error:
    note_exception(error)
    raise
"""


@dataclass(frozen=True, kw_only=True)
class Ended:
    """A launch whose rank 1 has died."""

    status: int
    out: str
    log: str
    peer: int


@pytest.fixture
def die(tmp_path: Path) -> Callable[[str], Ended]:
    def die(how: str) -> Ended:
        (tmp_path / "rank_program.py").write_text(PROGRAM + how)
        environ = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(Path(__file__).parents[2])])}
        done = subprocess.run(
            [sys.executable, "-c", LAUNCHER], cwd=tmp_path, env=environ, capture_output=True, text=True, check=False
        )
        return Ended(
            status=done.returncode,
            out=done.stdout + done.stderr,
            log=(tmp_path / "train.log").read_text(),
            peer=int((tmp_path / "rank0").read_text()),
        )

    return die


def assert_ended(ended: Ended, status: int, what: str) -> None:
    """One line on the terminal; torchrun's table is in the log; no rank is left, and none was waited for 30 s."""
    last = f"smartmoe: rank 1 on {HOST} {what} | {WAY_ON}"
    assert ended.status == status
    assert ended.out.splitlines()[-1] == ended.log.splitlines()[-1] == last
    assert "rank_program FAILED" not in ended.out
    assert "Root Cause (first observed failure)" in ended.log
    assert not Path(f"/proc/{ended.peer}").exists()
    assert "Unable to shutdown process" not in ended.log  # what torchrun writes when its 30 s are over


def test_a_rank_that_is_killed(die: Callable[[str], Ended]) -> None:
    ended = die("os.kill(os.getpid(), signal.SIGKILL)")
    assert_ended(ended, 137, "was killed by SIGKILL")
    assert len(ended.out.splitlines()) == 1


def test_a_rank_that_raises(die: Callable[[str], Ended]) -> None:
    ended = die(RAISES)
    assert_ended(ended, 1, "stopped with ValueError: x = 3: too small")
    assert ended.out.count("Traceback") == 1  # the rank's own


def test_by_hand_the_cause_is_the_last_line_too(tmp_path: Path) -> None:
    """command.sh of a run directory starts the same program, without the launcher."""
    (tmp_path / "rank_program.py").write_text("import os; os.kill(os.getpid(), 9)")
    command = [sys.executable, "-m", "megatron_smartmoe.adapter.launch.torchrun", "--nproc-per-node", "1"]
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(Path(__file__).parents[2])])}
    done = subprocess.run(
        [*command, "--standalone", "--module", "rank_program"],
        cwd=tmp_path,
        env=environ,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 137
    assert "rank_program FAILED" in done.stderr
    assert done.stderr.splitlines()[-1] == f"smartmoe: rank 0 on {HOST} was killed by SIGKILL"


def test_ranks_that_could_not_be_started(tmp_path: Path) -> None:
    """torchrun's own traceback is in the log; its last line is on the terminal."""
    program = LAUNCHER.replace('"--standalone"', '"--nnodes", "2", "--master-addr", "256.0.0.1", "--node-rank", "1"')
    program = program.replace('"--nnodes"', '"--rdzv-conf", "timeout=1", "--nnodes"')
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stdout + done.stderr
    last = done.stdout.splitlines()[-1]
    assert last.startswith(f"smartmoe: torchrun on {HOST} failed: ")
    assert last.endswith(f"(more in train.log) | {WAY_ON}")
    assert "Traceback" in (tmp_path / "train.log").read_text()


def test_ranks_do_not_outlive_a_launcher_that_is_killed(tmp_path: Path) -> None:
    program = "import os, time\nopen(f'rank{os.environ[\"RANK\"]}', 'w').write(str(os.getpid()))\ntime.sleep(600)"
    (tmp_path / "rank_program.py").write_text(program)
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(Path(__file__).parents[2])])}
    quiet = subprocess.DEVNULL
    launcher = subprocess.Popen([sys.executable, "-c", LAUNCHER], cwd=tmp_path, env=environ, stdout=quiet, stderr=quiet)
    files = [tmp_path / "rank0", tmp_path / "rank1"]
    while not all(file.exists() and file.read_text() for file in files):
        assert launcher.poll() is None
        time.sleep(0.05)
    ranks = [psutil.Process(int(file.read_text())) for file in files]
    launcher.kill()
    launcher.wait()
    assert psutil.wait_procs(ranks, timeout=60)[1] == []
