"""Train a tiny GPT-MoE through the real entry, on gloo ranks, and read its losses back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.support.ranks import run_ranks

# 4 MoE layers, 8 experts top-2, fp32, no dropout: everything that equality needs and nothing that costs time.
TINY_MODEL = (
    "--num-layers 4 --hidden-size 64 --num-attention-heads 4 --ffn-hidden-size 128 --seq-length 64 "
    "--max-position-embeddings 64 --num-experts 8 --moe-router-topk 2 --moe-ffn-hidden-size 96 --swiglu "
    "--normalization RMSNorm --position-embedding-type rope --disable-bias-linear "
    "--untie-embeddings-and-output-weights --attention-dropout 0 --hidden-dropout 0 "
    "--moe-aux-loss-coeff 0 --moe-router-load-balancing-type none --moe-router-dtype fp32"
).split()
TINY_TRAINING = (
    "--micro-batch-size 1 --global-batch-size 4 --lr 1e-3 --lr-decay-style constant --eval-iters 0 "
    "--eval-interval 1000 --log-interval 1 --logging-level 40 --rerun-mode disabled --seed 1234 --split 90,10,0 "
    "--num-workers 0 --smartmoe-rehearsal off"  # a second and a half for each training; tests of it switch it on
).split()


INITIAL_WEIGHTS = ("--finetune", "--no-load-optim", "--no-load-rng")  # with --load: weights only, from iteration 0


def two_layers(flags: str) -> list[str]:
    """The flags of a model of two layers, which show what four do, unless a mix of parallelism needs all four."""
    needs_four = any(part in flags for part in ("virtual", "layout", "layer-freq"))
    return [] if needs_four else ["--num-layers", "2"]


def train(
    run_dir: Path,
    world_size: int,
    data_flags: list[str],
    *flags: str,
    iterations: int,
    without: tuple[str, ...] = (),
    ranks_per_node: int | None = None,
) -> list[float]:
    """Train and return the loss of each iteration, as Megatron reduced it (exact values, not the log's rounding).

    Args:
        run_dir: of the run.
        world_size: ranks.
        data_flags: of the data.
        flags: of the run.
        iterations: until which it trains.
        without: flags of the tiny model that it does not have.
        ranks_per_node: see `run_ranks`.
    """
    model = [flag for flag in TINY_MODEL if flag not in without]
    argv = [*model, *TINY_TRAINING, *data_flags, "--train-iters", str(iterations), *flags]
    argv += ["--smartmoe-run-dir", str(run_dir)]
    run_ranks(_main, world_size, argv, log_dir=run_dir / "ranks", ranks_per_node=ranks_per_node)
    return losses(run_dir)


def losses(run_dir: Path) -> list[float]:
    """The "lm loss" of every logged iteration of a run directory."""
    return [line["lm loss"] for line in metrics(run_dir) if "lm loss" in line]


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl."""
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def _main(argv: list[str]) -> None:
    from megatron_smartmoe.adapter.pretrain import main

    main(argv)
