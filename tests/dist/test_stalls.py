"""Ranks that are stopped or killed and a link that is cut, under the real launcher: what the watchdog says of them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from megatron_smartmoe.runtime.progress import ProgressTable, read_records
from tests.support.training import TINY_MODEL, TINY_TRAINING

pytestmark = pytest.mark.dist

FLAGS = ["--expert-model-parallel-size", "2", "--smartmoe", "--train-iters", "100000"]
PATIENCE_S = 120.0  # a busy machine is slow, not wrong
CONTINUES = re.compile(r"smartmoe: iteration +\d+ \| training continues; it was held up for \d+ s, .*")


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


class Launch:
    """A launcher, for one node or for one of several."""

    def __init__(
        self, run_dir: Path, log: Path, data_flags: list[str], nproc: int, prefix: list[str], **environ: str
    ) -> None:
        command = [*prefix, sys.executable, "-m", "megatron_smartmoe.adapter.launch", "--nproc", str(nproc)]
        command += ["--run-dir", str(run_dir), *TINY_MODEL, *TINY_TRAINING, *data_flags, *FLAGS]
        self._log = log
        with log.open("w") as file:
            self.process = subprocess.Popen(command, env={**os.environ, **environ}, stdout=file, stderr=file)

    def ranks(self) -> list[psutil.Process]:
        children = psutil.Process(self.process.pid).children(recursive=True)
        commands = {child: child.cmdline() for child in children}
        return [
            child for child, words in commands.items() if "--num-layers" in words and "--nproc-per-node" not in words
        ]

    def output(self) -> str:
        return self._log.read_text(errors="replace")

    def wait_for(self, pattern: str | re.Pattern[str], count: int = 1) -> str:
        """The line with the count-th match of a pattern."""

        def found() -> list[str]:
            lines = [line for line in self.output().splitlines() if re.search(pattern, line)]
            assert len(lines) >= count or self.process.poll() is None, self.output()[-3000:]
            return lines[count - 1 :]

        wait_until(found)
        return found()[0]

    def end(self) -> None:
        if self.process.poll() is None:
            for child in psutil.Process(self.process.pid).children(recursive=True):
                child.kill()
            self.process.kill()
        self.process.wait()


def test_a_stopped_rank_is_named_and_the_record_of_a_killed_one_is_left(tmp_path: Path, data_flags: list[str]) -> None:
    run_dir = tmp_path / "run"
    launch = Launch(run_dir, tmp_path / "log", data_flags, 2, [])
    try:
        launch.wait_for(r"iteration +8/")
        path = ProgressTable.path_in(launch.process.pid)
        assert path is not None
        with open(path, "rb") as table:
            victim = launch.ranks()[1]
            victim.suspend()
            line = launch.wait_for("WARNING: this step has taken")
            number = next(rank.rank for rank in read_records(table.read()) if rank.pid == victim.pid)
            assert f"the slowest rank is {number} of 2 (pid {victim.pid} on " in line
            assert f"it is stopped by a signal, and 1 rank waits in a collective; kill -CONT {victim.pid}" in line
            assert re.search(r"layer \d|no collective yet|(waits in|after) an? ", line)
            stacks = run_dir / f"stacks-rank{number}.txt"
            assert line.endswith(f"a stopped process cannot print its stacks: {stacks} has what /proc says of it |")
            victim.resume()
            launch.wait_for(CONTINUES)
            victim.kill()
            assert launch.process.wait(PATIENCE_S) != 0
            table.seek(0)
            (record,) = [rank for rank in read_records(table.read()) if rank.pid == victim.pid]
        assert record.iteration > 8
        assert record.place.startswith(f"iteration {record.iteration}, ")
        assert line in (run_dir / "train.log").read_text()
        end = launch.output().splitlines()[-1]
        assert f"rank {number} on " in end
        assert f"was killed by SIGKILL | it was in {record.place} | no folder of checkpoints (--save)" in end
        assert launch.output().count("WARNING: this step") == 1
    finally:
        launch.end()


@pytest.fixture
def hosts() -> Iterator[tuple[str, str]]:
    """Two network namespaces with one cable between them; 10.99.0.1 and 10.99.0.2 are known inside them only."""
    names = (f"smartmoe{os.getpid()}a", f"smartmoe{os.getpid()}b")
    if shutil.which("ip") is None:
        pytest.skip("no network namespaces: iproute2 is not installed")

    def ip(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["ip", *words], check=False, capture_output=True, text=True)

    made = ip("netns", "add", names[0])
    if made.returncode:
        pytest.skip(f"no network namespaces: {made.stderr.strip()}")
    try:
        ip("netns", "add", names[1])
        made = ip("-n", names[0], "link", "add", "eth0", "type", "veth", "peer", "name", "eth0", "netns", names[1])
        if made.returncode:
            pytest.skip(f"no network namespaces: {made.stderr.strip()}")
        for number, name in enumerate(names, start=1):
            ip("-n", name, "addr", "add", f"10.99.0.{number}/24", "dev", "eth0")
            ip("-n", name, "link", "set", "eth0", "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield names
    finally:
        for name in names:
            ip("netns", "del", name)


@pytest.mark.long
def test_two_nodes(tmp_path: Path, data_flags: list[str], hosts: tuple[str, str]) -> None:
    """Node 0 names a rank of node 1, node 1 writes its stacks; a cut link is named by both."""
    run_dir = tmp_path / "run"
    launches = []
    for node, host in enumerate(hosts):
        slurm = {"JOB_ID": "1", "STEP_ID": "0", "STEP_NUM_TASKS": "2", "STEP_NUM_NODES": "2", "NODEID": str(node)}
        slurm |= {"PROCID": str(node), "STEP_TASKS_PER_NODE": "1(x2)", "STEP_NODELIST": "two", "LOCALID": "0"}
        environ = {f"SLURM_{name}": value for name, value in slurm.items()}
        environ |= {"MASTER_ADDR": "10.99.0.1", "MASTER_PORT": "29500", "GLOO_SOCKET_IFNAME": "eth0"}
        prefix = ["ip", "netns", "exec", host]
        launches.append(Launch(run_dir, tmp_path / f"log{node}", data_flags, 1, prefix, **environ))
    first, second = launches
    try:
        second.wait_for(r"iteration +8/")  # the last rank logs
        (victim,) = second.ranks()
        victim.suspend()
        line = first.wait_for("WARNING: this step has taken")
        assert f"the slowest rank is 1 of 2 (pid {victim.pid} on " in line
        assert "it is stopped by a signal, and 1 rank waits in a collective" in line
        assert f"its stacks: {run_dir}/stacks-rank1.txt (written on " in line
        stacks = run_dir / "stacks-rank1.txt"
        wait_until(lambda: stacks.exists() and "State:\tT (stopped)" in stacks.read_text())  # node 1 writes it
        victim.resume()
        first.wait_for(CONTINUES)
        assert "WARNING: this step" not in second.output()

        subprocess.run(["ip", "-n", hosts[1], "link", "set", "eth0", "down"], check=True)
        line = first.wait_for("WARNING: this step has taken", count=2)
        assert "the slowest rank is 1 of 2" in line
        assert re.search(r"its node has not answered for \d+ s: look at the host and at its network", line)
        line = second.wait_for("WARNING: this step has taken")
        assert re.search(r"this is node 1, which has not reached node 0 for \d+ s and knows its own ranks only", line)
    finally:
        for launch in launches:
            launch.end()
