#!/usr/bin/env python3
"""The planner against this machine: step times of real runs beside the predicted ones, and how well the ranks agree.

    OMP_NUM_THREADS=1 .venv/bin/python scripts/bench_planner.py [--rounds N] [--json F] [--cluster 2=F2.yaml 4=F4.yaml]

Trains one model on CPU ranks in every mix below, all in one sitting, in turns (a round measures each mix once; reported
is the median over rounds). Predictions come from a cluster file alone, for each number of ranks the one that
`smartmoe calibrate --nproc R` writes first, because ranks that share cores are slower than one alone. Nothing is fitted
to the measured steps.
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

from bench_layer import MODEL as BASE
from bench_layer import TRAINING, step_seconds
from scipy.stats import spearmanr

from megatron_smartmoe.planner.arguments import model_from_arguments, parallel_from_arguments
from megatron_smartmoe.planner.load import LoadModel, scenarios_from_model
from megatron_smartmoe.planner.pricing import Pricing
from megatron_smartmoe.spec.cluster import load_cluster_spec

MODEL = (
    "--num-layers 4 --hidden-size 256 --num-attention-heads 4 --ffn-hidden-size 1024 --seq-length 256 "
    "--max-position-embeddings 256 --num-experts 8 --moe-router-topk 2 --moe-ffn-hidden-size 768 "
    "--global-batch-size 8 --micro-batch-size 2 --smartmoe --smartmoe-homes off"
).split()
SP = "--sequence-parallel"
# Freed memory stays with the process: a page fault takes 10 us in a virtual machine, and their number varies by step.
KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(16 << 30), "MALLOC_TOP_PAD_": str(64 << 20)}
MIXES: dict[str, tuple[int, str]] = {
    "DP2": (2, ""),
    "EP2": (2, "--expert-model-parallel-size 2"),
    "EP2 mbs1": (2, "--expert-model-parallel-size 2 --micro-batch-size 1"),
    "EP2 mbs4": (2, "--expert-model-parallel-size 2 --micro-batch-size 4"),
    "PP2": (2, "--pipeline-model-parallel-size 2"),
    "PP2 VPP2": (2, "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1"),
    "TP2 ETP2": (2, f"--tensor-model-parallel-size 2 {SP}"),
    "TP2 EP2": (
        2,
        f"--tensor-model-parallel-size 2 {SP} --expert-model-parallel-size 2 --expert-tensor-parallel-size 1",
    ),
    "DP4": (4, ""),
    "EP4": (4, "--expert-model-parallel-size 4"),
    "EP4 mbs1": (4, "--expert-model-parallel-size 4 --micro-batch-size 1"),
    "EP2 EDP2": (4, "--expert-model-parallel-size 2"),
    "PP2 EP2": (4, "--pipeline-model-parallel-size 2 --expert-model-parallel-size 2"),
    "PP4": (4, "--pipeline-model-parallel-size 4"),
    "TP2 EP4": (
        4,
        f"--tensor-model-parallel-size 2 {SP} --expert-model-parallel-size 4 --expert-tensor-parallel-size 1",
    ),
    "TP2 PP2": (4, f"--tensor-model-parallel-size 2 {SP} --pipeline-model-parallel-size 2"),
    "TP4 ETP4": (4, f"--tensor-model-parallel-size 4 {SP}"),
}


def flags_of(name: str) -> list[str]:
    """The flags of a mix; those of `bench_layer` say EP 2."""
    flags = MIXES[name][1].split()
    single = [] if "--expert-model-parallel-size" in flags else ["--expert-model-parallel-size", "1"]
    return [*MODEL, *single, *flags]


def predicted_s(ranks: int, flags: list[str], cluster: Path) -> float:
    """Seconds of a step by the planner."""
    from megatron_smartmoe.adapter.pretrain import choose_device, with_defaults

    choose_device("cpu")
    from megatron_smartmoe.adapter.flags.parser import parse

    args = parse(with_defaults([*BASE, *TRAINING, *flags], cpu=True, say=False))
    model = model_from_arguments(vars(args))
    spec = parallel_from_arguments(vars(args), model, ranks)
    return Pricing(model, load_cluster_spec(cluster), LoadModel(scenarios_from_model(model))).price(spec).expected_s


def calibrated(ranks: int, folder: Path) -> Path:
    """The cluster file of so many ranks of this machine."""
    file = folder / f"{ranks}.yaml"
    command = [
        sys.executable,
        "-m",
        "megatron_smartmoe.adapter.launch.calibrate",
        "--device",
        "cpu",
        "--nproc",
        str(ranks),
    ]
    subprocess.run([*command, "--output", str(file)], check=True, stdout=subprocess.DEVNULL)
    return file


def main() -> None:
    """Calibrate, predict, measure, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cluster", nargs="+", default=[], metavar="RANKS=FILE", help="default: measured first")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--iterations", type=int, default=13)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    os.environ.update(KEEP_MEMORY)
    given = {int(ranks): Path(file) for ranks, file in (text.split("=", 1) for text in options.cluster)}
    predicted, measured = {}, {name: list[float]() for name in MIXES}
    with tempfile.TemporaryDirectory() as folder:
        files = {ranks: calibrated(ranks, Path(folder)) for ranks in {2, 4} - set(given)} | given
        for name, (ranks, _) in MIXES.items():
            os.environ["WORLD_SIZE"] = str(ranks)
            predicted[name] = predicted_s(ranks, flags_of(name), files[ranks])
    for variable in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        os.environ.pop(variable, None)
    for _ in range(options.rounds):
        for name, (ranks, _) in MIXES.items():
            measured[name].append(step_seconds(flags_of(name), options.iterations, ranks))
    report(predicted, measured, options.json)


def report(predicted: dict[str, float], rounds: dict[str, list[float]], file: Path | None) -> None:
    """The table, the rank correlation, and how much slower the predicted best is than the measured best."""
    measured = {name: statistics.median(seconds) for name, seconds in rounds.items()}
    print(f"{'ranks':>5} {'mix':<10} {'measured ms':>12} {'from':>7} {'to':>7} {'predicted ms':>13} {'ratio':>6}")
    for name in sorted(MIXES, key=lambda name: (MIXES[name][0], measured[name])):
        ratio = predicted[name] / measured[name]
        low, high = (pick(rounds[name]) * 1e3 for pick in (min, max))
        ms = f"{measured[name] * 1e3:>12.0f} {low:>7.0f} {high:>7.0f} {predicted[name] * 1e3:>13.0f}"
        print(f"{MIXES[name][0]:>5} {name:<10} {ms} {ratio:>6.2f}")
    summary = {}
    for ranks in (2, 4):
        names = [name for name, (size, _) in MIXES.items() if size == ranks]
        chosen, best = min(names, key=predicted.__getitem__), min(names, key=measured.__getitem__)
        rho = float(spearmanr([predicted[n] for n in names], [measured[n] for n in names]).statistic)
        regret = measured[chosen] / measured[best] - 1
        summary[ranks] = {"spearman": rho, "chosen": chosen, "best": best, "regret": regret}
        print(f"{ranks} ranks: Spearman {rho:.2f}; chosen {chosen}, best {best}, {regret:.1%} slower")
    rho = float(spearmanr([predicted[n] for n in MIXES], [measured[n] for n in MIXES]).statistic)
    print(f"all: Spearman {rho:.2f}")
    if file is not None:
        rows = [{"mix": n, "ranks": MIXES[n][0], "measured_s": rounds[n], "predicted_s": predicted[n]} for n in MIXES]
        content = {"rows": rows, "by_ranks": summary, "spearman": rho}
        file.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
