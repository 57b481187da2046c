"""Starts the ranks of one measured run, and collects their times."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_smartmoe.adapter.orphans import end_with_parent

ROOT = Path(__file__).resolve().parents[2]


def run_ranks(variant: str, num_ranks: int, flags: Sequence[str], folder: Path, *, name: str) -> NDArray[Any]:
    """Train, in a process per rank; returns the times `[step, rank, field]`, fields as in `rank.FIELDS`.

    Args:
        variant: what `scripts/bench_train.py --rank` runs.
        num_ranks: on this host.
        flags: Megatron's, and this project's.
        folder: where the ranks leave their times.
        name: of the run, for the message that ends the program when it fails.

    Raises:
        SystemExit: it failed.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(num_ranks), "--standalone"]
    command += [str(ROOT / "scripts" / "bench_train.py"), "--rank", variant, str(folder), "--", *flags]
    done = subprocess.run(
        command,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=partial(end_with_parent, signal.SIGTERM),  # torchrun then ends the ranks
    )
    if done.returncode:
        raise SystemExit(f"{name}: {done.stdout[-2000:]}{done.stderr[-6000:]}")
    return np.stack([np.load(folder / f"times{number}.npy") for number in range(num_ranks)], axis=1)
