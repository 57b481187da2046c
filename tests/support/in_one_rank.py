"""Checks that need Megatron's process groups, one after another in one rank."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from tests.support.ranks import run_ranks


def run_in_one_rank(checks: Sequence[Callable[[], None]], log_dir: Path) -> None:
    """Call functions that are importable by name in a new rank; the log has the name of each before its output."""
    run_ranks(_run_all, 1, tuple(checks), log_dir=log_dir)


def _run_all(checks: Sequence[Callable[[], None]]) -> None:
    import torch.distributed as dist
    from megatron.core import parallel_state

    from megatron_smartmoe.adapter import cpu

    cpu.install()
    dist.init_process_group("gloo")
    parallel_state.initialize_model_parallel()
    for check in checks:
        print(check.__name__, flush=True)
        check()
