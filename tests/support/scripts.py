"""Run a training script of somebody else on gloo ranks, with the door that `megatron_smartmoe.enable()` opens."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from tests.support.ranks import run_ranks

EXAMPLES = Path(__file__).parents[2] / "examples"
FLAGS = (EXAMPLES / "flags.txt").read_text(encoding="utf-8").split()


def train_script(script: Path, run_dir: Path, *flags: str, ranks: int = 2) -> list[Any]:
    """Train with a script of `examples/`; returns what `_rank` does, for each rank."""
    argv = [*FLAGS, *flags, "--smartmoe-run-dir", str(run_dir)]
    return run_ranks(_rank, ranks, script, argv, log_dir=run_dir.parent / f"{run_dir.name}-ranks")


def _rank(script: Path, argv: list[str]) -> dict[str, Any]:
    import runpy

    import megatron_smartmoe
    from megatron_smartmoe.adapter import door, hooks

    # Megatron is there already in a forked rank, so the script's own call finds the door open, and does nothing.
    door.open_door(cpu=True, is_own_entry=False)
    sys.argv = [str(script), *argv]
    sys.path.insert(0, str(script.parent))
    runpy.run_path(str(script), run_name="__main__")
    return {
        "argv": sys.argv == [str(script), *argv],
        "replaced": hooks.replaced_names(),
        "selftest": str(megatron_smartmoe.selftest()),
    }
