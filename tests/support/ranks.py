"""Run a function on N gloo ranks: real processes, forked from one that has torch and Megatron imported already.

Importing them and building the parser takes 2 s of CPU time per rank; a fork server does it once
(`tests.support.preload`), which leaves 0.6 s for a rank that trains for one iteration. Ranks that live on from one test
to the next would save half of that, and Megatron's global state would tie the tests together.
"""

from __future__ import annotations

import contextlib
import faulthandler
import multiprocessing
import os
import pickle
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any

from tests.support.ports import free_ports

_DEVICE_VARIABLE = "SMARTMOE_TEST_RANKS"  # read by `tests.support.preload`, which imports too much to be imported here


def _context() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.support.preload"])
    return context


@contextlib.contextmanager
def on_the_gpu() -> Iterator[None]:
    """Start ranks from a fork server of their own, which has no CPU facade and has not touched the GPU.

    A process whose parent has initialized CUDA cannot use it. So while the server imports everything, torch must ask
    NVML and not CUDA whether there is a GPU.
    """
    os.environ.update(variables := {_DEVICE_VARIABLE: "cuda", "PYTORCH_NVML_BASED_CUDA_CHECK": "1"})
    forkserver._forkserver._stop()  # type: ignore[attr-defined]  # the next start makes a new one
    try:
        yield
    finally:
        for name in variables:
            del os.environ[name]
        forkserver._forkserver._stop()  # type: ignore[attr-defined]


def run_ranks(
    function: Callable[..., Any],
    world_size: int,
    *args: Any,
    log_dir: Path,
    timeout_s: float = 300.0,
    ranks_per_node: int | None = None,
    **kwargs: Any,
) -> list[Any]:
    """Call `function(*args, **kwargs)` on every rank of a new job and return what each rank returned.

    Args:
        function: importable by name; it finds RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT in its environment and
            forms its own process groups.
        log_dir: each rank's output goes to `rank<N>.log` there.
        timeout_s: the whole job is killed after that long.
        ranks_per_node: as the ranks are told; None for one node.

    Raises:
        AssertionError: a rank failed or hung; the message ends with the log of the first rank that did.
    """
    ranks = start_ranks(function, world_size, *args, log_dir=log_dir, ranks_per_node=ranks_per_node, **kwargs)
    _wait(ranks, log_dir, timeout_s)
    return [pickle.loads((log_dir / f"rank{rank}.pickle").read_bytes()) for rank in range(world_size)]


def start_ranks(
    function: Callable[..., Any],
    world_size: int,
    *args: Any,
    log_dir: Path,
    ranks_per_node: int | None = None,
    **kwargs: Any,
) -> list[ForkServerProcess]:
    """Start what `run_ranks` starts, and leave the waiting to the caller."""
    log_dir.mkdir(parents=True, exist_ok=True)
    for old in log_dir.glob("rank*.pickle"):
        old.unlink()
    (port,), per_node = free_ports(1), ranks_per_node or world_size
    ranks = []
    for rank in range(world_size):
        environment = {
            "RANK": str(rank),
            "WORLD_SIZE": str(world_size),
            "LOCAL_RANK": str(rank % per_node),
            "LOCAL_WORLD_SIZE": str(per_node),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        process = _context().Process(
            target=_rank_main, args=(function, args, kwargs, environment, log_dir), name=f"rank{rank}"
        )
        process.start()
        ranks.append(process)
    return ranks


def _wait(ranks: list[ForkServerProcess], log_dir: Path, timeout_s: float) -> None:
    """Wait for all; when one fails, end the others, which would wait for it for ever."""
    deadline = time.monotonic() + timeout_s
    failed: list[ForkServerProcess] = []
    while not failed and any(rank.is_alive() for rank in ranks):
        time.sleep(0.02)
        failed = [rank for rank in ranks if rank.exitcode not in (None, 0)]
        if time.monotonic() > deadline:
            for rank in ranks:  # a rank answers with the stacks of its threads
                if rank.is_alive() and rank.pid is not None:
                    os.kill(rank.pid, signal.SIGABRT)
            time.sleep(1)
            failed = [rank for rank in ranks if rank.exitcode != 0]
    failed = failed or [rank for rank in ranks if rank.exitcode != 0]
    ends = ", ".join(f"{rank.name}: {rank.exitcode}" for rank in ranks)
    for rank in ranks:
        if failed:
            rank.kill()
        rank.join()
    if failed:
        log = (log_dir / f"{failed[0].name}.log").read_text(errors="replace")
        late = f" after {timeout_s:.0f} s" if time.monotonic() > deadline else ""
        raise AssertionError(
            f"{failed[0].name} failed{late} (exit status of each, -N for signal N: {ends}); the end of its log:\n"
            f"{log[-6000:]}"
        )


def _wait_for_the_others(log_dir: Path, world_size: int) -> None:
    """Rank 0 serves the store that the others may still be reading from, and outlives them for it.

    In a job of torchrun's, the agent serves it. Whoever has not ended 5 s later fails or hangs for another reason.
    """
    deadline = time.monotonic() + 5
    for rank in range(1, world_size):
        while not (log_dir / f"rank{rank}.pickle").exists() and time.monotonic() < deadline:
            time.sleep(0.01)


def _rank_main(
    function: Callable[..., Any], args: Any, kwargs: Any, environment: dict[str, str], log_dir: Path
) -> None:
    os.environ.update(environment)
    multiprocessing.set_start_method("fork", force=True)  # as in a program started by torchrun
    name = f"rank{environment['RANK']}"
    log = os.open(log_dir / f"{name}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    faulthandler.enable()  # a crash, or SIGABRT after the time limit, leaves the stacks of all threads in the log
    try:
        from tests.support import ready_groups  # imports torch, which the process that starts the ranks can do without

        ready_groups.install()
        result = function(*args, **kwargs)
        (log_dir / f"{name}.pickle").write_bytes(pickle.dumps(result))
        if environment["RANK"] == "0":
            _wait_for_the_others(log_dir, int(environment["WORLD_SIZE"]))
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
