"""Train a tiny GPT-MoE through the real entry, on gloo ranks, and read its losses back."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.support.ports import free_ports
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


_ONE_PER_PROCESS = ("--smartmoe-watchdog", "off")  # what is made for one run per process
INITIAL_WEIGHTS = ("--finetune", "--no-load-optim", "--no-load-rng")  # with --load: weights only, from iteration 0


def train(run_dir: Path, world_size: int, data_flags: list[str], *flags: str, iterations: int) -> list[float]:
    """Train and return the loss of each iteration, as Megatron reduced it (exact values, not the log's rounding)."""
    argv = [*TINY_MODEL, *TINY_TRAINING, *data_flags, "--train-iters", str(iterations), *flags]
    run_ranks(_main, world_size, [*argv, "--smartmoe-run-dir", str(run_dir)], log_dir=run_dir / "ranks")
    return losses(run_dir)


def train_in_turn(
    run_dir: Path,
    world_size: int,
    data_flags: list[str],
    runs: Mapping[str, Sequence[str]],
    *,
    iterations: int,
    ranks_per_node: int,
) -> dict[str, list[float]]:
    """What `train` returns for each of several runs, which one job of ranks makes one after the other.

    It takes two thirds of the CPU time of as many jobs. The log of a rank names each run before its output.

    Args:
        run_dir: each run's directory is in there.
        world_size: ranks.
        data_flags: of the dataset.
        runs: name -> further flags.
        iterations: of each run.
        ranks_per_node: as the ranks are told.
    """
    argvs = {}
    for number, (name, flags) in enumerate(runs.items()):
        argv = [*TINY_MODEL, *TINY_TRAINING, *data_flags, "--train-iters", str(iterations), *flags]
        argvs[name] = [*argv, "--smartmoe-run-dir", str(run_dir / str(number)), *_ONE_PER_PROCESS]
    ports = free_ports(len(runs))
    run_ranks(_main_in_turn, world_size, argvs, ports, ranks_per_node, log_dir=run_dir / "ranks", timeout_s=900)
    return {name: losses(run_dir / str(number)) for number, name in enumerate(runs)}


def losses(run_dir: Path) -> list[float]:
    """The "lm loss" of every logged iteration of a run directory."""
    return [line["lm loss"] for line in metrics(run_dir) if "lm loss" in line]


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl."""
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def _main(argv: list[str]) -> None:
    from megatron_smartmoe.adapter.pretrain import main

    main(argv)


def _main_in_turn(argvs: Mapping[str, list[str]], ports: Sequence[int], ranks_per_node: int) -> None:
    from megatron.core import parallel_state
    from megatron.core.num_microbatches_calculator import destroy_num_microbatches_calculator
    from megatron.core.rerun_state_machine import destroy_rerun_state_machine
    from megatron.training.global_vars import destroy_global_vars

    local_rank = int(os.environ["RANK"]) % ranks_per_node
    os.environ.update({"LOCAL_WORLD_SIZE": str(ranks_per_node), "LOCAL_RANK": str(local_rank)})
    for (name, argv), port in zip(argvs.items(), ports, strict=True):
        print(f"--- {name}", flush=True)
        os.environ["MASTER_PORT"] = str(port)  # the store of the run before may not be gone yet
        _main(argv)
        parallel_state.destroy_model_parallel()
        destroy_num_microbatches_calculator()
        destroy_rerun_state_machine()
        destroy_global_vars()
