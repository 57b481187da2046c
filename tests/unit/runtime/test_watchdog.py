"""The watchdog of one node, turn by turn, over records that a test writes and processes that it stops."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import pytest

from megatron_smartmoe.runtime.progress import Phase, ProgressRecord, ProgressTable, Word, process_state
from megatron_smartmoe.runtime.watchdog.watch import Watchdog

# A process that keeps a record, answers with its stacks, and begins a step for every line that it reads.
RANK = """
import faulthandler, os, signal, sys
from megatron_smartmoe.runtime.progress import ProgressRecord
record = ProgressRecord(sys.argv[1], 1, rank=1, floor_s=8.0)
stacks = os.memfd_create("stacks")
faulthandler.register(signal.SIGRTMIN + 10, file=stacks, all_threads=True)
record.accept_stack_signal(signal.SIGRTMIN + 10, stacks)
def train():
    for number, line in enumerate(sys.stdin, start=1):
        record.begin_step(number)
        print(number, flush=True)
train()
"""


class Node:
    """A watchdog over two ranks: rank 0 is this process, rank 1 a process of its own."""

    def __init__(self, run_dir: Path | None) -> None:
        self.said: list[str] = []
        self.table = ProgressTable(2)
        self.own = ProgressRecord(self.table.path, 0, rank=0, floor_s=8.0)
        self.process = subprocess.Popen(
            [sys.executable, "-c", RANK, self.table.path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.iteration, self.passed_s = 0, 0.0
        self.watchdog = Watchdog(self.table, run_dir=run_dir, say=self.said.append)

    def step(self, count: int = 1) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        for _ in range(count):
            self.iteration += 1
            self.own.begin_step(self.iteration)
            self.process.stdin.write("step\n")
            self.process.stdin.flush()
            self.process.stdout.readline()

    def let_time_pass(self, seconds: float) -> None:
        """As if the present step had begun, and everything had last moved, that much earlier."""
        ns = round(seconds * 1e9)
        words = ProgressRecord.words_of(self.table.path, 1)
        for record in (self.own.words, words):
            record[Word.BEGUN_NS] -= ns
            record[Word.MOVED_NS] -= ns
        self.passed_s += seconds
        self.watchdog.watched_from(time.monotonic() - self.passed_s)

    def turns(self, count: int = 2) -> None:
        for _ in range(count):
            self.watchdog.turn()

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self.table.close()


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    node = Node(tmp_path)
    node.step(6)
    yield node
    node.close()


def wait_for_state(pid: int, states: str) -> None:
    deadline = time.monotonic() + 20
    while (process_state(pid) or "gone") not in states:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_stopped_rank_is_named_once_and_so_is_the_end_of_it(node: Node, tmp_path: Path) -> None:
    node.turns()
    node.process.send_signal(signal.SIGSTOP)
    wait_for_state(node.process.pid, "T")
    node.let_time_pass(9)
    node.turns(1)
    assert node.said == []  # two turns have to agree
    node.turns(5)
    (line,) = node.said
    assert line.startswith("iteration        6 | WARNING: this step has taken 9.")
    assert f"the slowest rank is 1 of 2 (pid {node.process.pid} on " in line
    assert "it is stopped by a signal, and 0 ranks wait in a collective" in line
    where = f"{tmp_path}/stacks-rank1.txt has what /proc says of it |"
    assert line.endswith(f"a stopped process cannot print its stacks: {where}")
    assert "State:\tT (stopped)" in (tmp_path / "stacks-rank1.txt").read_text()
    node.process.send_signal(signal.SIGCONT)
    node.step()
    node.turns()
    assert len(node.said) == 1  # this step may be late too
    node.step()
    node.turns()
    end = "iteration        8 | training continues; it was held up for 9 s, the slowest rank was 1 |"
    assert node.said[1:] == [end]
    node.turns(5)
    assert len(node.said) == 2


def test_the_stacks_of_a_rank_are_written_and_it_lives_on(node: Node, tmp_path: Path) -> None:
    node.own.words[Word.WAITING] = 1
    node.own.words[Word.PEER] = 1
    node.let_time_pass(9)
    node.turns()
    (line,) = node.said
    assert "the slowest rank is 1 of 2" in line
    assert line.endswith(f"and 1 rank waits in a collective; its stacks: {tmp_path}/stacks-rank1.txt |")
    text = (tmp_path / "stacks-rank1.txt").read_text()
    assert "in train" in text
    assert "==== " in text
    node.step()
    assert node.process.poll() is None


def test_without_a_run_directory_stacks_are_printed() -> None:
    node = Node(None)
    try:
        node.step(6)
        node.own.words[Word.WAITING] = 1
        node.own.words[Word.PEER] = 1
        node.let_time_pass(9)
        node.turns()
        stacks, line = node.said
        assert stacks.startswith(f"stacks of rank 1, pid {node.process.pid} on ")
        assert "in train" in stacks
        assert line.endswith("its stacks: printed above |")
    finally:
        node.close()


def test_a_directory_that_cannot_be_written_costs_the_stacks_alone(node: Node, tmp_path: Path) -> None:
    (tmp_path / "stacks-rank1.txt").mkdir()
    node.own.words[Word.WAITING] = 1
    node.own.words[Word.PEER] = 1
    node.let_time_pass(9)
    node.turns()
    (line,) = node.said
    assert line.endswith(f"its stacks could not be written to {tmp_path}/stacks-rank1.txt: Is a directory |")


def test_a_file_of_stacks_does_not_grow_for_ever(node: Node, tmp_path: Path) -> None:
    path = tmp_path / "stacks-rank1.txt"
    path.write_text("x" * (2**20 + 1))
    node.own.words[Word.WAITING] = 1
    node.own.words[Word.PEER] = 1
    node.let_time_pass(9)
    node.turns()
    assert "x" * 100 not in path.read_text()


def test_a_process_that_took_over_the_pid_gets_no_signal(node: Node) -> None:
    ProgressRecord.words_of(node.table.path, 1)[Word.STARTED_TICKS] = 1
    node.let_time_pass(9)
    node.turns(10)
    (line,) = node.said
    assert "its process has ended" in line
    assert line.endswith("it left no stacks |")


def test_a_suspended_job_is_no_alarm(node: Node) -> None:
    """The watchdog was suspended too; only what it sees from then on counts."""
    node.turns()
    node.let_time_pass(60)
    node.watchdog.watched_from(time.monotonic())
    node.turns(5)
    assert node.said == []


def test_saves_and_evaluations_may_take_longer(node: Node) -> None:
    with node.own.within(Phase.SAVE):
        node.let_time_pass(200)
        node.turns(5)
        assert node.said == []
        node.let_time_pass(101)
        node.turns()
        (line,) = node.said
    assert line.startswith("iteration        6 | WARNING: no progress for 301 s; the slowest rank is ")


def test_a_mistake_of_the_watchdog_costs_the_watchdog_alone(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    def read() -> NoReturn:
        raise KeyError("what")

    monkeypatch.setattr(node.table, "read", read)
    with node.watchdog:
        deadline = time.monotonic() + 30
        while not node.said:
            assert time.monotonic() < deadline
            time.sleep(0.05)
    (line,) = node.said
    assert line.startswith("the watchdog of ")
    assert line.endswith(" has ended (KeyError: 'what'); training goes on")


def test_the_thread_ends_with_the_context(node: Node) -> None:
    with node.watchdog:
        node.process.send_signal(signal.SIGSTOP)
        wait_for_state(node.process.pid, "T")
        node.let_time_pass(9)
        deadline = time.monotonic() + 30
        while not node.said:
            assert time.monotonic() < deadline
            time.sleep(0.05)
    assert "it is stopped by a signal" in node.said[0]
    os.kill(node.process.pid, signal.SIGCONT)
