#!/usr/bin/env python3
"""How much longer training stands still for a save because of its manifest: saves with and without it, in turn.

    torchrun --nproc-per-node 2 scripts/bench_save.py [--gb 1] [--saves 10] [--folder /tmp]

A small model is trained by the project's own entry, and saved after every third step, in torch_dist format and
synchronously. Every other save is Megatron's alone, its tracker too. Training stands still while Megatron's call lasts,
while the optimizer waits for the digests in the step after it, and while the next save waits for the end of this one:
the sum is reported, of the rank that stands still longest; the CPU time of the training's thread within the save, which
other work on the machine does not lengthen; and the time of the step after the save, in which the manifest is made. The
medians, and the best of each, which is more telling on a machine that does other work too. The first save of each kind
is left out: it fills caches.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_smartmoe.adapter.checkpoint.saving import CheckpointSaves

BYTES_PER_PARAMETER = 12  # fp32 weights and two moments
LAYERS, EXPERTS, HIDDEN = 2, 8, 512
SAVE_EVERY = 3  # iterations
MODEL = (
    f"--num-layers {LAYERS} --hidden-size {HIDDEN} --num-attention-heads 8 --seq-length 32 "
    f"--max-position-embeddings 32 --num-experts {EXPERTS} --moe-router-topk 2 --swiglu --normalization RMSNorm "
    "--position-embedding-type rope --disable-bias-linear --untie-embeddings-and-output-weights "
    "--moe-router-load-balancing-type none --mock-data --tokenizer-type NullTokenizer --vocab-size 128 "
    "--micro-batch-size 1 --lr 1e-4 --eval-iters 0 --eval-interval 1000 --log-interval 1000 --logging-level 40 "
    f"--num-workers 0 --save-interval {SAVE_EVERY} --smartmoe --rerun-mode disabled"
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
    argv += ["--global-batch-size", str(ranks), "--train-iters", str(SAVE_EVERY * (2 * options.saves + 2) + 1)]
    argv += ["--expert-model-parallel-size", str(ranks)]
    still, steps = defaultdict[bool, list[float]](list), defaultdict[bool, list[float]](list)
    busy = defaultdict[bool, list[float]](list)
    _run(argv, folder, still, busy, steps)
    if int(os.environ["RANK"]) == 0:
        shutil.rmtree(folder, ignore_errors=True)
        _report("training stands still", still)
        _report("its thread's CPU time is", busy)
        _report("the step after it takes", steps)


def _run(
    argv: list[str],
    folder: Path,
    still: dict[bool, list[float]],
    busy: dict[bool, list[float]],
    steps: dict[bool, list[float]],
) -> None:
    from megatron_smartmoe.adapter.pretrain import choose_device, main

    choose_device("auto")
    import torch
    import torch.distributed as dist

    from megatron_smartmoe.adapter.checkpoint.finishing import Finishing
    from megatron_smartmoe.adapter.checkpoint.saving import CheckpointSaves
    from megatron_smartmoe.adapter.hooks import Callback

    put_around, waiting = CheckpointSaves.around_save_checkpoint, Finishing.wait_for_digests
    stood = [0.0]  # for the last save, on this rank
    turns = [0]  # saves so far

    def waited(finishing: Finishing) -> None:
        began = time.perf_counter()
        waiting(finishing)
        stood[0] += time.perf_counter() - began

    def in_turn(saves: CheckpointSaves, save: Callable[..., Any]) -> Callable[..., Any]:
        guarded = put_around(saves, save)

        def timed(iteration: int, *args: Any, **kwargs: Any) -> None:
            turns[0] += 1
            has_manifest = turns[0] % 2 == 0
            # Step 1: the save before this one has come to its end.
            began = time.perf_counter()
            saves.finish_saves()
            stood[0] += time.perf_counter() - began
            longest = torch.tensor(stood, dtype=torch.float64)
            dist.all_reduce(longest, op=dist.ReduceOp.MAX)
            if turns[0] > 3:  # the save before it was not the first of its kind
                still[not has_manifest].append(float(longest))
            # Step 2: this one.
            if dist.get_rank() == 0:
                shutil.rmtree(folder, ignore_errors=True)
            os.sync()
            dist.barrier()
            began, began_cpu = time.perf_counter(), time.thread_time()
            if has_manifest:
                guarded(iteration, *args, **kwargs)
            else:
                with _megatrons_tracker(saves):
                    save(iteration, *args, **kwargs)
            if turns[0] > 2:
                busy[has_manifest].append(time.thread_time() - began_cpu)
            dist.barrier()
            stood[0] = time.perf_counter() - began

        return timed

    class Steps(Callback):
        def before_step(self, iteration: int) -> None:
            self._began = time.perf_counter()

        def after_step(self, iteration: int, losses: Mapping[str, torch.Tensor]) -> None:
            if iteration % SAVE_EVERY == 1 and turns[0] > 2:
                steps[turns[0] % 2 == 0].append(time.perf_counter() - self._began)

    Finishing.wait_for_digests = waited  # type: ignore[method-assign, assignment]
    CheckpointSaves.around_save_checkpoint = in_turn  # type: ignore[method-assign, assignment]
    main(argv, callbacks=[Steps()])


@contextlib.contextmanager
def _megatrons_tracker(saves: CheckpointSaves) -> Iterator[None]:
    """Have Megatron write the tracker as it does by itself: it does not wait until the disk has it."""
    tracker: Any = saves._tracker
    tracker.open = tracker._files.open
    try:
        yield
    finally:
        del tracker.open


def _report(what: str, seconds: Mapping[bool, list[float]]) -> None:
    medians = {kind: statistics.median(times) for kind, times in seconds.items()}
    best = {kind: min(times) for kind, times in seconds.items()}
    for kind, name in ((False, "Megatron's save alone"), (True, "with a manifest")):
        print(f"{name}: {what} {medians[kind]:.3f} s (median), {best[kind]:.3f} s (best) of {len(seconds[kind])}")
    for name, of in (("median", medians), ("best", best)):
        print(f"a manifest adds {100 * (of[True] / of[False] - 1):+.1f} % ({name})", flush=True)


if __name__ == "__main__":
    main()
