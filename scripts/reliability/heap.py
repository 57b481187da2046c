#!/usr/bin/env python3
"""Repeat one training mix under glibc's heap checks, to catch a corrupted heap that was seen once in 70 runs.

    .venv/bin/python scripts/reliability/heap.py DIR [--repeats N] [--iterations N]

The mix: pipelines of two stages with two chunks each, expert parallelism of two, the overlapped distributed optimizer,
replicas from exact counts; four ranks. Every block that is freed is filled with a pattern (MALLOC_PERTURB_) and the
heap's bookkeeping is checked at every call (MALLOC_CHECK_=3). Since glibc 2.34 that variable does nothing unless
libc_malloc_debug.so.0 is preloaded, so this program writes one byte past a block first and stops if nobody notices. A
rank that crashes prints the stacks of its threads (faulthandler) and leaves a core file where the system keeps them.

Every repeat appends a line to DIR/heap.jsonl; the same command continues where it ended. The exit status is 1 if a rank
crashed, the checks said anything, or the losses of two repeats differ in a bit.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the checkout, when the script is run by its path

from scripts.reliability.corpus import corpus_flags
from tests.support.training import train

FLAGS = (
    "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1 --expert-model-parallel-size 2 "
    "--use-distributed-optimizer --dist-ckpt-optim-fully-reshardable --overlap-grad-reduce --overlap-param-gather "
    "--clip-grad 0 --smartmoe --smartmoe-spare-slots 1 --smartmoe-replicas-margin 0 --smartmoe-homes off "
    "--smartmoe-replicas exact"
).split()
LIBRARY = "libc_malloc_debug.so.0"
CHECKS = {"MALLOC_CHECK_": "3", "MALLOC_PERTURB_": "165", "LD_PRELOAD": LIBRARY}
WRITE_PAST_THE_END = """
import ctypes, os
libc = ctypes.CDLL(None)
libc.dlvsym.restype, libc.dlvsym.argtypes = ctypes.c_void_p, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_char_p]

def called_by_programs(name):  # not what dlsym finds, which is the function without the checks
    return next(filter(None, (libc.dlvsym(None, name, version) for version in (b"GLIBC_2.2.5", b"GLIBC_2.17"))))

block = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_size_t)(called_by_programs(b"malloc"))(24)
ctypes.memset(block, 1, 25)
ctypes.CFUNCTYPE(None, ctypes.c_void_p)(called_by_programs(b"free"))(block)
os._exit(0)  # whatever is damaged now might show later, but not at the byte where it happened
"""
SIGNS = ("malloc", "free()", "corrupt", "double free", "munmap_chunk", "Fatal Python error", "Segmentation")


def main() -> int:
    """Start again under the checks, then repeat."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, metavar="DIR")
    parser.add_argument("--repeats", type=int, default=300, metavar="N", help="in all. Default: 300.")
    parser.add_argument("--iterations", type=int, default=4, metavar="N", help="of each repeat. Default: 4.")
    args = parser.parse_args()
    if any(os.environ.get(name) != value for name, value in CHECKS.items()):
        if problem := checks_do_nothing():
            print(f"heap: {problem}", file=sys.stderr)
            return 2
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **CHECKS})
    _, hard = resource.getrlimit(resource.RLIMIT_CORE)
    resource.setrlimit(resource.RLIMIT_CORE, (hard, hard))
    return repeat(args.directory, args.repeats, args.iterations)


def checks_do_nothing() -> str | None:
    """Why a write past the end of a block would not be noticed on this machine; None if it is."""
    done = subprocess.run(
        [sys.executable, "-c", WRITE_PAST_THE_END],
        env={**os.environ, **CHECKS},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode < 0:
        return None
    return (
        f"LD_PRELOAD = {LIBRARY}: a byte past the end of a block is not noticed here ({done.stderr.strip()[:120]}). "
        "Use glibc 2.34 or later with its debugging library (Debian's libc6 has it)."
    )


def repeat(directory: Path, repeats: int, iterations: int) -> int:
    """Train until there are `repeats` outcomes; returns 1 if any of them is bad."""
    directory.mkdir(parents=True, exist_ok=True)
    outcomes, data = outcomes_of(directory), corpus_flags(directory)
    while len(outcomes) < repeats:
        outcome = once(directory / "run", iterations, data)
        if outcomes and outcome["losses"] != outcomes[0]["losses"] and not outcome["error"]:
            outcome["error"] = "the losses differ from those of the first repeat"
        outcomes.append(outcome)
        with (directory / "heap.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(outcome) + "\n")
        if outcome["error"] or outcome["signs"]:
            print(f"heap: repeat {len(outcomes)}: {outcome['error']} {outcome['signs']}", flush=True)
    bad = sum(bool(outcome["error"] or outcome["signs"]) for outcome in outcomes)
    seconds = sum(outcome["seconds"] for outcome in outcomes)
    print(f"heap: {len(outcomes)} repeats of 4 ranks and {iterations} steps, {seconds:.0f} s: {bad} bad", flush=True)
    return 1 if bad else 0


def outcomes_of(directory: Path) -> list[dict[str, Any]]:
    """The outcomes of earlier calls."""
    file = directory / "heap.jsonl"
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []


def once(run_dir: Path, iterations: int, data: list[str]) -> dict[str, Any]:
    """One training; a bad one keeps its folder, under the time of its end."""
    shutil.rmtree(run_dir, ignore_errors=True)
    started, error, losses = time.time(), "", list[float]()
    try:
        losses = train(run_dir, 4, data, *FLAGS, iterations=iterations)
    except AssertionError as failure:
        error = str(failure)[-4000:]
    logs = [log.read_text(errors="replace").splitlines() for log in sorted((run_dir / "ranks").glob("*.log"))]
    signs = [line[:200] for lines in logs for line in lines if any(sign in line for sign in SIGNS)][:5]
    if error or signs:
        run_dir.rename(run_dir.with_name(f"bad-{int(time.time())}"))
    return {"seconds": round(time.time() - started, 1), "losses": losses, "error": error, "signs": signs}


if __name__ == "__main__":
    sys.exit(main())
