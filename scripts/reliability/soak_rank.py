"""One rank of a soak run: real training, and every few steps a line about what this process holds."""

from __future__ import annotations

import json
import os
import sys
import time
from itertools import cycle
from pathlib import Path
from typing import Any
from unittest import mock

EVERY = 10  # iterations between two lines
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


def main(argv: list[str]) -> None:
    """Train with the flags after `--`; before it: the folder of the samples, the seed of the rounding or 0, settings.

    Args:
        argv: `FOLDER SEED SETTING,... -- FLAG...`; no setting: the pool, if there is one, decides by itself.
    """
    folder, seed, settings = Path(argv[0]), int(argv[1]), [name for name in argv[2].split(",") if name]
    from megatron_smartmoe.adapter.hooks import Callback
    from megatron_smartmoe.adapter.pretrain import main as train

    rank = int(os.environ["RANK"])

    class Observe(Callback):
        """Writes the samples; with a seed, changes the last bit of the experts' gradients."""

        def on_start(self, run: Any) -> None:
            self.file = (folder / f"rank{rank}.jsonl").open("a", encoding="utf-8", buffering=1)
            if seed:
                round_gradients([layer for _, layer in run.layers], seed * 1000 + rank)

        def between_steps(self, iteration: int) -> None:
            if iteration % EVERY == 0:
                self.file.write(json.dumps({"iteration": iteration, **sample()}) + "\n")

    if settings:
        with take_in_turn(settings):
            train(argv[4:], callbacks=[Observe()])
    else:
        train(argv[4:], callbacks=[Observe()])


def sample() -> dict[str, Any]:
    """What this process holds now."""
    from torch.distributed import distributed_c10d

    return {
        "pid": os.getpid(),
        "cpu_s": time.process_time(),
        "wall_s": time.time(),
        "rss_bytes": int(Path("/proc/self/statm").read_text().split()[1]) * PAGE_BYTES,
        "threads": len(os.listdir("/proc/self/task")),
        "files": len(os.listdir("/proc/self/fd")) - 1,  # without the one that lists them
        "groups": len(distributed_c10d._world.pg_map),
    }


def round_gradients(layers: list[Any], seed: int) -> None:
    """Move every element of the experts' gradients to a neighbouring float, up or down at random, in every step.

    Replicas change training by no more than this: they sum an expert's gradient in two parts.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)

    def rounded(gradient: torch.Tensor) -> torch.Tensor:
        up = torch.rand(gradient.shape, generator=generator) < 0.5
        infinity = torch.tensor(float("inf"), dtype=gradient.dtype)
        return torch.nextafter(gradient, torch.where(up, infinity, -infinity))

    for layer in layers:
        for weight in (layer.experts.weight1, layer.experts.weight2):
            weight.register_hook(rounded)


def take_in_turn(settings: list[str]) -> Any:
    """Have the pool take these settings in turn, one per re-evaluation, so that every one of them is in use for long.

    Left to itself it would soon stay with the fastest. It predicts and measures all the same.
    """
    from megatron_smartmoe.runtime.pool.switchboard import PoolVerdict, Switchboard

    turn = cycle(settings)

    def evaluate(board: Any, iteration: int, times: Any, predict: Any) -> PoolVerdict:
        seconds, before, name = predict(), board.now, next(turn)
        board.now = next(setting for setting in seconds if setting.key == name)
        return PoolVerdict(setting=board.now, before=before, reason="forced", why="the soak takes settings in turn")

    return mock.patch.object(Switchboard, "evaluate", evaluate)


if __name__ == "__main__":
    main(sys.argv[1:])
