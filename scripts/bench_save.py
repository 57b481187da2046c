#!/usr/bin/env python3
"""How much longer training stands still for a save because of its manifest: saves with and without it, in turn.

    torchrun --nproc-per-node 2 scripts/bench_save.py [--gb 1] [--saves 10] [--folder /tmp]

A small model is trained by the project's own entry, and saved after each step, in torch_dist format and synchronously.
Every other save is Megatron's alone. Reported are the medians and the best of each, which is more telling on a machine
that does other work too. The first save of each kind is left out: it starts processes and fills caches.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

BYTES_PER_PARAMETER = 12  # fp32 weights and two moments
LAYERS, EXPERTS, HIDDEN = 2, 8, 512
MODEL = (
    f"--num-layers {LAYERS} --hidden-size {HIDDEN} --num-attention-heads 8 --seq-length 32 "
    f"--max-position-embeddings 32 --num-experts {EXPERTS} --moe-router-topk 2 --swiglu --normalization RMSNorm "
    "--position-embedding-type rope --disable-bias-linear --untie-embeddings-and-output-weights "
    "--moe-router-load-balancing-type none --mock-data --tokenizer-type NullTokenizer --vocab-size 128 "
    "--micro-batch-size 1 --lr 1e-4 --eval-iters 0 --eval-interval 1000 --log-interval 1000 --logging-level 40 "
    "--num-workers 0 --save-interval 1 --smartmoe --rerun-mode disabled"
)


def main() -> None:
    """Train, save, and print a line for each kind of save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=1.0, help="size of a checkpoint (default: 1)")
    parser.add_argument("--saves", type=int, default=10, help="saves of each kind (default: 10)")
    parser.add_argument("--folder", type=Path, help="where to write (default: the system's folder for such files)")
    options = parser.parse_args()
    ffn = round(options.gb * 1e9 / BYTES_PER_PARAMETER / (3 * LAYERS * EXPERTS * HIDDEN) / 64) * 64
    ranks = int(os.environ["WORLD_SIZE"])
    folder = (options.folder or Path(tempfile.gettempdir())) / f"bench_save-{os.environ['MASTER_PORT']}"
    argv = [*MODEL.split(), "--ffn-hidden-size", str(ffn), "--moe-ffn-hidden-size", str(ffn), "--save", str(folder)]
    argv += ["--global-batch-size", str(ranks), "--train-iters", str(2 * options.saves + 2)]
    argv += ["--expert-model-parallel-size", str(ranks)]
    seconds: dict[bool, list[float]] = {True: [], False: []}
    _run(argv, folder, seconds)
    if int(os.environ["RANK"]) == 0:
        shutil.rmtree(folder, ignore_errors=True)
        _report(seconds)


def _run(argv: list[str], folder: Path, seconds: dict[bool, list[float]]) -> None:
    from megatron_smartmoe.adapter.pretrain import choose_device, main

    choose_device("auto")
    import torch.distributed as dist

    from megatron_smartmoe.adapter.checkpoint.saving import CheckpointSaves

    put_around = CheckpointSaves.around_save_checkpoint

    def in_turn(saves: CheckpointSaves, save: Callable[..., Any]) -> Callable[..., Any]:
        guarded = put_around(saves, save)

        def timed(iteration: int, *args: Any, **kwargs: Any) -> None:
            has_manifest = iteration % 2 == 0
            os.sync()
            dist.barrier()
            started = time.perf_counter()
            (guarded if has_manifest else save)(iteration, *args, **kwargs)
            dist.barrier()
            if iteration > 2:
                seconds[has_manifest].append(time.perf_counter() - started)
            if dist.get_rank() == 0:
                shutil.rmtree(folder / f"iter_{iteration:07d}")
            dist.barrier()

        return timed

    CheckpointSaves.around_save_checkpoint = in_turn  # type: ignore[method-assign, assignment]
    main(argv)


def _report(seconds: dict[bool, list[float]]) -> None:
    medians = {kind: statistics.median(times) for kind, times in seconds.items()}
    best = {kind: min(times) for kind, times in seconds.items()}
    for kind, name in ((False, "Megatron's save alone"), (True, "with a manifest")):
        print(f"{name}: median {medians[kind]:.3f} s, best {best[kind]:.3f} s of {len(seconds[kind])}", flush=True)
    for name, of in (("median", medians), ("best", best)):
        print(f"{name}: {100 * (of[True] / of[False] - 1):+.1f} %", flush=True)


if __name__ == "__main__":
    main()
