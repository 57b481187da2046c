#!/usr/bin/env python3
"""Train for thousands of steps on four ranks with every loop at work, and look for what grows, drifts or differs.

    scripts/soak.sh [DIR] [--steps N] [--only NAME...]

Five runs of a small model on gloo ranks, through the real entry, routed by one synthetic trace whose load drifts, so
that experts move and replicas change all the time. They differ in this:

    off                      nothing is balanced
    rounded-1, rounded-2     nothing is balanced; every step moves the experts' gradients to neighbouring floats
    homes                    experts move between ranks
    all                      experts move, replicas come and go, and the pool takes its settings in turn

A run resumes from its last checkpoint, so the command may be ended at any time and given again. Each attempt appends a
line to outcomes.jsonl. When all runs are complete, `soak_judge` compares them, prints a table and writes soak.json, and
`soak_plot` draws soak.svg. Then one training mix is repeated under heap checks (`heap.py`). The exit status is 1 if a
claim does not hold or a heap check speaks.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the checkout, when the script is run by its path

from scripts.reliability import soak_judge
from scripts.reliability.corpus import ROOT, corpus_flags
from tests.support.synthetic import SyntheticSpec, synthetic_trace

RANKS, LAYERS, EXPERTS, SEQUENCE = 4, 1, 8, 32
MODEL = (
    f"--num-layers {LAYERS} --hidden-size 32 --num-attention-heads 2 --ffn-hidden-size 64 --seq-length {SEQUENCE} "
    f"--max-position-embeddings {SEQUENCE} --num-experts {EXPERTS} --moe-router-topk 2 --moe-ffn-hidden-size 32 "
    "--swiglu --normalization RMSNorm --position-embedding-type rope --disable-bias-linear "
    "--untie-embeddings-and-output-weights --attention-dropout 0 --hidden-dropout 0 "
    "--moe-router-load-balancing-type none --moe-router-dtype fp32"
).split()
TRAINING = (
    "--expert-model-parallel-size 4 --use-distributed-optimizer --dist-ckpt-optim-fully-reshardable "
    f"--micro-batch-size 1 --global-batch-size {RANKS} --lr 1e-3 --lr-decay-style constant --clip-grad 0 "
    "--eval-iters 1 --eval-interval 500 --save-interval 500 --log-interval 1 --logging-level 40 "
    "--rerun-mode disabled --seed 1234 --split 90,10,0 --num-workers 0 --override-opt-param-scheduler"
).split()
OFF = "--smartmoe --smartmoe-homes off".split()
HOMES = "--smartmoe --smartmoe-homes-interval 20 --smartmoe-homes-horizon 1000000".split()  # every small gain pays
ALL = [
    *HOMES,
    *"--smartmoe-spare-slots 1 --smartmoe-replicas-margin 0 --smartmoe-overlap-degree 2".split(),
    *"--smartmoe-pool auto --smartmoe-pool-interval 50".split(),
]
SETTINGS = (  # of the pool, in turn; all but one make replicas
    "homes20-K1-history-ov1,homes20-K1-history-ov2,homes20-K1-exact-ov2,homes20-K1-history-ov1,homes20-K0-off-ov2,"
    "homes20-K1-exact-ov1,homes0-K1-history-ov2"
)
ATTEMPTS = 3  # of a run that ends early without getting further


@dataclass(frozen=True, kw_only=True)
class Kind:
    """One of the runs: its flags, the seed of its rounding (0: none), the settings that its pool takes in turn."""

    flags: list[str]
    rounding: int = 0
    settings: str = ""


RUNS = {
    "off": Kind(flags=OFF),
    "all": Kind(flags=ALL, settings=SETTINGS),
    "homes": Kind(flags=HOMES),
    "rounded-1": Kind(flags=OFF, rounding=1),
    "rounded-2": Kind(flags=OFF, rounding=2),
}


def main() -> int:
    """Run what is not complete yet, then judge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, nargs="?", default=Path("runs/soak"), metavar="DIR")
    parser.add_argument("--steps", type=int, default=5000, metavar="N", help="steps of each run. Default: 5000.")
    parser.add_argument("--only", nargs="+", choices=RUNS, default=list(RUNS), metavar="NAME", help="of the five runs")
    parser.add_argument("--heap", type=int, default=300, metavar="N", help="repeats under heap checks. Default: 300.")
    args = parser.parse_args()
    args.directory.mkdir(parents=True, exist_ok=True)
    data = prepare(args.directory, args.steps)
    for name in args.only:
        if not train(args.directory, name, args.steps, data):
            print(f"soak: {name} did not get further in {ATTEMPTS} attempts; see {args.directory / name}/train.log")
            return 1
    if any(iterations_of(args.directory / name) < args.steps for name in RUNS):
        print("soak: the other runs are not complete; the same command without --only completes and judges them")
        return 0
    status = soak_judge.judge(args.directory, args.steps, RUNS)
    heap = [sys.executable, str(ROOT / "scripts" / "reliability" / "heap.py"), str(args.directory / "heap")]
    return max(status, subprocess.run([*heap, "--repeats", str(args.heap)], check=False).returncode)


def prepare(directory: Path, steps: int) -> list[str]:
    """Flags of the corpus and of the trace, which are made once."""
    trace = directory / "trace.npz"
    if not trace.exists():
        spec = SyntheticSpec(
            kind="drifting",
            num_records=steps,
            num_layers=LAYERS,
            num_sources=RANKS,
            num_experts=EXPERTS,
            tokens_per_source=SEQUENCE,
            skew=1.5,
            drift=0.15,
        )
        synthetic_trace(spec).save(trace)
    return [*corpus_flags(directory), "--smartmoe-replay-trace", str(trace)]


def train(directory: Path, name: str, steps: int, data: list[str]) -> bool:
    """Train one run to its last step, over as many attempts as it takes; False when it does not get further."""
    run_dir, failures = directory / name, 0
    while (first := iterations_of(run_dir)) < steps:
        started = time.time()
        status = attempt(run_dir, RUNS[name], steps, data)
        last = iterations_of(run_dir)
        outcome = {"run": name, "from": first, "to": last, "exit": status, "seconds": round(time.time() - started, 1)}
        with (directory / "outcomes.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(outcome) + "\n")
        print(f"soak: {json.dumps(outcome)}", flush=True)
        failures = failures + 1 if last <= first else 0
        if failures == ATTEMPTS:
            return False
    return True


def attempt(run_dir: Path, kind: Kind, steps: int, data: list[str]) -> int:
    """Start the ranks once, from the last checkpoint if there is one; returns their exit status."""
    run_dir.mkdir(parents=True, exist_ok=True)
    checkpoints = str(run_dir / "checkpoints")
    flags = [*MODEL, *TRAINING, *data, *kind.flags, "--train-iters", str(steps), "--smartmoe-run-dir", str(run_dir)]
    flags += ["--save", checkpoints, "--load", checkpoints]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(RANKS), "--standalone", "-m"]
    command += ["scripts.reliability.soak_rank", str(run_dir), str(kind.rounding), kind.settings, "--", *flags]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(ROOT)}
    with (run_dir / "train.log").open("ab") as log:
        return subprocess.run(command, env=environment, stdout=log, stderr=log, check=False).returncode


def iterations_of(run_dir: Path) -> int:
    """The iteration of the last complete checkpoint: how far a run has got for good."""
    tracker = run_dir / "checkpoints" / "latest_checkpointed_iteration.txt"
    return int(tracker.read_text()) if tracker.exists() else 0


if __name__ == "__main__":
    sys.exit(main())
