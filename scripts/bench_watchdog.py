#!/usr/bin/env python3
"""What the watchdog costs a step, and how long it takes to name a rank that has been stopped.

    OMP_NUM_THREADS=1 .venv/bin/python scripts/bench_watchdog.py [--stops N] [-- any flag...]

First the nanoseconds that noting an operation adds to posting it and waiting for it, without any operation; then the
quickstart run (4 CPU ranks): operations a step, from the ranks' own records, and the share of the median step that
noting them takes. Then one rank after the other is stopped (SIGSTOP), in an order drawn from --seed, and the time until
the watchdog's line appears is taken, with default settings; the rank is continued and the run ended at last.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_smartmoe.runtime.progress import ProgressRecord, ProgressTable, RankProgress, read_records

CALLS, REPEATS = 100, 3000  # short, so that some are not interrupted by whatever else the machine does
WARMED_UP = 12  # iterations


def main() -> None:
    """Measure both and print them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--stops", type=int, default=4, help="ranks to stop, one after the other; 0: measure the cost only"
    )
    parser.add_argument("--seed", type=int, default=0, help="draws which ranks are stopped")
    parser.add_argument("flags", nargs="*", help="any flag of the launcher or of Megatron, after --")
    options = parser.parse_args()
    call_ns = added_ns()
    print(f"noting one operation, posted and waited for: {call_ns:.0f} ns (least of {REPEATS} x {CALLS:,})", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder) / "run"
        command = [sys.executable, "-m", "megatron_smartmoe.adapter.launch", "--config", "quickstart"]
        command += ["--run-dir", str(run_dir), "--train-iters", "100000", *options.flags]
        output = Path(folder) / "output"
        with output.open("w") as file:
            launcher = subprocess.Popen(command, stdout=file, stderr=file)
        try:
            observe(launcher, output, call_ns, options.stops, random.Random(options.seed))
        finally:
            launcher.terminate()
            launcher.wait()


def added_ns() -> float:
    """What a wrapper around posting and one around waiting add to two functions that do nothing."""
    import torch.distributed as dist

    from megatron_smartmoe.adapter.records.operations import Operations
    from megatron_smartmoe.runtime.progress import OPERATIONS

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    table = ProgressTable(1)
    operations = Operations(ProgressRecord(table.path, 0, rank=0, floor_s=8.0))
    work, group = object(), dist.group.WORLD

    def post(group: Any, tensor: Any, options: Any) -> object:
        return work

    def wait(work: Any) -> None:
        return None

    noting = (operations.posting(OPERATIONS.index("all-to-all"), post), operations.waiting(wait))
    plain, noted = (least_ns(pair, group) for pair in ((post, wait), noting))
    return noted - plain


def least_ns(pair: tuple[Callable[..., Any], Callable[..., Any]], group: Any) -> float:
    """Nanoseconds of one post and one wait; the least of several means, for the machine does other things too."""
    post, wait = pair
    means = []
    for _ in range(REPEATS):
        began = time.perf_counter_ns()
        for _ in range(CALLS):
            wait(post(group, None, None))
        means.append((time.perf_counter_ns() - began) / CALLS)
    return min(means)


def observe(launcher: subprocess.Popen[bytes], output: Path, call_ns: float, stops: int, draw: random.Random) -> None:
    """The cost in a run that has warmed up, and then the stops."""
    ranks = wait_for(lambda: warmed_up(launcher.pid), launcher, output)
    step_s = statistics.median(rank.median_step_s or 0.0 for rank in ranks)
    operations = max(rank.posted / rank.steps for rank in ranks)
    share = operations * call_ns / (step_s * 1e9)
    print(
        f"{len(ranks)} ranks, median step {step_s * 1e3:.0f} ms, at most {operations:.0f} operations in it: {share:.3%}"
    )
    for number in range(1, stops + 1):
        victim = draw.choice(ranks)
        median_s = max(rank.median_step_s or 0.0 for rank in records(launcher.pid))
        seconds, line = stop(victim.pid, number, launcher, output)
        verdict = "right" if f"the slowest rank is {victim.rank} of" in line else f"WRONG: {line}"
        promise = f"3 x median + 10 s: {3 * median_s + 10:.1f} s"
        print(f"stop {number}: rank {victim.rank} is named after {seconds:.1f} s ({promise}): {verdict}", flush=True)


def stop(pid: int, number: int, launcher: subprocess.Popen[bytes], output: Path) -> tuple[float, str]:
    """Stop a process until the number-th warning appears; returns the seconds and the line."""

    def lines(text: str) -> list[str]:
        return [line for line in output.read_text().splitlines() if text in line]

    os.kill(pid, signal.SIGSTOP)
    began = time.monotonic()
    try:
        wait_for(lambda: len(lines("WARNING: this step")) >= number, launcher, output)
    finally:
        seconds = time.monotonic() - began
        os.kill(pid, signal.SIGCONT)
    wait_for(lambda: len(lines("training continues")) >= number, launcher, output)
    return seconds, lines("WARNING: this step")[number - 1]


def records(pid: int) -> list[RankProgress]:
    """The records that the launcher holds."""
    path = ProgressTable.path_in(pid)
    return read_records(Path(path).read_bytes()) if path is not None else []


def warmed_up(pid: int) -> list[RankProgress]:
    """All records once every rank has made some steps."""
    ranks = records(pid)
    return ranks if ranks and all(rank.steps > WARMED_UP for rank in ranks) else []


def wait_for(condition: Callable[[], Any], launcher: subprocess.Popen[bytes], output: Path) -> Any:
    """What the condition returns once that is true."""
    while not (result := condition()):
        if launcher.poll() is not None:
            raise SystemExit(f"the run ended:\n{output.read_text()[-3000:]}")
        time.sleep(0.02)
    return result


if __name__ == "__main__":
    main()
