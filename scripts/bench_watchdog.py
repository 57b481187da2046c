#!/usr/bin/env python3
"""What the watchdog costs a step, and how long it takes to name a rank that has been stopped.

    OMP_NUM_THREADS=1 .venv/bin/python scripts/bench_watchdog.py [--stops N] [-- any flag...]

First the nanoseconds that noting an operation adds to posting it and waiting for it, without any operation, and those
that noting a layer adds to its two passes. Then the quickstart run (4 CPU ranks): operations a step, from the ranks'
own records, and the share of the median step that all notes take. Then one rank after the other is stopped (SIGSTOP),
in an order drawn from --seed, and the time until the watchdog's line appears is taken, with default settings; each rank
is continued, and the run ended at last.
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
import timeit
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from megatron_smartmoe.adapter.pretrain import choose_device
from megatron_smartmoe.runtime.progress import ProgressRecord, ProgressTable, RankProgress, read_records

CALLS, REPEATS = 100, 300  # short, so that some are not interrupted by whatever else the machine does
WARMED_UP = 8  # iterations
LAYER_PASSES = 4  # of a rank in a quickstart step: 2 layers of its stage, 2 micro-batches


def main() -> None:
    """Measure both and print them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--stops", type=int, default=4, help="ranks to stop, one after the other; 0: measure the cost only"
    )
    parser.add_argument("--seed", type=int, default=0, help="draws which ranks are stopped")
    parser.add_argument("flags", nargs="*", help="any flag of the launcher or of Megatron, after --")
    options = parser.parse_args()
    choose_device("cpu")
    call_ns, layer_ns = added_ns(), added_layer_ns()
    print(f"noting one operation, posted and waited for: {call_ns:.0f} ns (least mean of {CALLS} of {REPEATS:,})")
    print(f"noting one layer, forward and backward pass: {layer_ns:.0f} ns (likewise)", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder) / "run"
        command = [sys.executable, "-m", "megatron_smartmoe.adapter.launch", "--config", "quickstart"]
        command += ["--run-dir", str(run_dir), "--train-iters", "100000", *options.flags]
        output = Path(folder) / "output"
        with output.open("w") as file:
            launcher = subprocess.Popen(command, stdout=file, stderr=file)
        try:
            observe(launcher, output, (call_ns, layer_ns), options.stops, random.Random(options.seed))
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


def added_layer_ns() -> float:
    """What the hooks of a layer add to a layer that only copies its input."""
    import torch
    from megatron.core.transformer.transformer_layer import TransformerLayer

    from megatron_smartmoe.adapter.records.progress import note_layers

    class Layer(TransformerLayer):  # type: ignore[misc]
        layer_number = 1
        __call__ = torch.nn.Module.__call__

        def __init__(self) -> None:
            torch.nn.Module.__init__(self)

        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            return hidden.clone()

    table = ProgressTable(1)
    plain, noted = (torch.nn.Sequential(Layer()) for _ in range(2))
    note_layers(noted, ProgressRecord(table.path, 0, rank=0, floor_s=8.0))
    parameter = torch.zeros(1, requires_grad=True)

    def passes(chunk: torch.nn.Module) -> None:
        chunk[0](parameter * 1).backward()  # type: ignore[index]

    return least(partial(passes, noted)) - least(partial(passes, plain))


def least_ns(pair: tuple[Callable[..., Any], Callable[..., Any]], group: Any) -> float:
    """Nanoseconds of one post and one wait."""
    post, wait = pair

    def both() -> None:
        wait(post(group, None, None))

    return least(both)


def least(call: Callable[[], None]) -> float:
    """Nanoseconds of a call; the least of several means, for the machine does other things too."""
    return min(timeit.repeat(call, number=CALLS, repeat=REPEATS)) / CALLS * 1e9


def observe(
    launcher: subprocess.Popen[bytes], output: Path, costs_ns: tuple[float, float], stops: int, draw: random.Random
) -> None:
    """The cost in a run that has warmed up, and then the stops."""
    ranks = wait_for(lambda: warmed_up(launcher.pid), launcher, output)
    step_s = statistics.median(rank.median_step_s or 0.0 for rank in ranks)
    operations = max(rank.posted / rank.steps for rank in ranks)
    share = (operations * costs_ns[0] + LAYER_PASSES * costs_ns[1]) / (step_s * 1e9)
    print(f"{len(ranks)} ranks, median step {step_s * 1e3:.0f} ms, at most {operations:.0f} operations in it")
    print(f"{operations:.0f} operations and {LAYER_PASSES} layers noted: {share:.3%} of the median step", flush=True)
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
