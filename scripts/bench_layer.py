#!/usr/bin/env python3
"""What `--smartmoe` costs when there is nothing to balance: step time against stock Megatron, in pairs.

    OMP_NUM_THREADS=1 .venv/bin/python scripts/bench_layer.py [--pairs N] [--iterations N] [-- any Megatron flag...]

Trains the quickstart's model on mock data with stock Megatron and with `--smartmoe`, alternating, so that a machine
that is busy for a while slows down both. Reports the median over pairs of the ratio of the median steps.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

MODEL = (
    "--num-layers 4 --hidden-size 128 --num-attention-heads 4 --ffn-hidden-size 512 --seq-length 128 "
    "--max-position-embeddings 128 --position-embedding-type rope --normalization RMSNorm --swiglu "
    "--disable-bias-linear --untie-embeddings-and-output-weights --attention-dropout 0 --hidden-dropout 0 "
    "--num-experts 8 --moe-router-topk 2 --moe-ffn-hidden-size 256 --moe-router-load-balancing-type aux_loss "
    "--moe-aux-loss-coeff 1e-3 --moe-router-dtype fp32"
).split()
TRAINING = (
    "--micro-batch-size 4 --global-batch-size 8 --lr 1e-3 --lr-decay-style constant --eval-iters 0 "
    "--eval-interval 100000 --log-interval 1 --logging-level 40 --rerun-mode disabled --mock-data "
    "--tokenizer-type NullTokenizer --vocab-size 2047 --num-workers 0 --expert-model-parallel-size 2"
).split()
WARM_UP = 5  # steps


def step_seconds(flags: list[str], iterations: int, ranks: int) -> float:
    """Median seconds per step of one run."""
    with tempfile.TemporaryDirectory() as run_dir:
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--standalone"]
        command += ["-m", "megatron_smartmoe.adapter.pretrain", *MODEL, *TRAINING, "--train-iters", str(iterations)]
        command += ["--smartmoe-run-dir", run_dir, *flags]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(done.stdout[-2000:] + done.stderr[-4000:])
        lines = [json.loads(line) for line in (Path(run_dir) / "metrics.jsonl").read_text().splitlines()]
    return float(statistics.median(line["seconds_per_step"] for line in lines[WARM_UP:]))


def main() -> None:
    """Run the pairs and print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--iterations", type=int, default=60)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("flags", nargs="*", help="any Megatron flag, after --")
    args = parser.parse_args()
    ratios = []
    for pair in range(args.pairs):
        order = ["stock", "smartmoe"] if pair % 2 == 0 else ["smartmoe", "stock"]
        seconds = {}
        for kind in order:
            own_layer = ["--smartmoe", "--smartmoe-homes", "off"] if kind == "smartmoe" else []
            seconds[kind] = step_seconds([*args.flags, *own_layer], args.iterations, args.ranks)
        ratios.append(seconds["smartmoe"] / seconds["stock"])
        times = "  ".join(f"{kind} {seconds[kind] * 1e3:8.2f} ms" for kind in ("stock", "smartmoe"))
        print(f"pair {pair + 1}: {times}  ratio {ratios[-1]:.3f}", flush=True)
    spread = f"{min(ratios):.3f} to {max(ratios):.3f}"
    print(f"--smartmoe / stock, median of {len(ratios)} pairs: {statistics.median(ratios):.3f} ({spread})")


if __name__ == "__main__":
    main()
