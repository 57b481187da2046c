#!/usr/bin/env python3
"""The imbalance benchmark, measured on CPU ranks: W0 to W7 through every rule that this project's executor can run.

    OMP_NUM_THREADS=1 .venv/bin/python scripts/bench_imbalance.py --out DIR --markdown docs/imbalance_measured.md

`smartmoe bench-imbalance` predicts; this runs a real MoE layer on gloo ranks, forward and backward, with the same
workloads, seeds and rules. The routers' choices are the workload's; homes stay. Every rule has a layer, and in every
step all of them take a turn, so that a machine which is busy for a while slows all down alike. The plans are made
beforehand, so what planning takes is not in it: `smartmoe bench-imbalance` has a column for it. Counted is the CPU
time of the busiest rank's thread: of a step the median over rounds, then the mean over the steps.

A workload and round that DIR has already is not repeated: an interrupted program continues, `--workload` runs some of
them, and more `--rounds` add to what is there.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout, when the script is run by its path

from megatron_smartmoe.simulate.imbalance import SERIES, BenchSizes, make_case
from scripts.training_bench.folder import check_settings
from scripts.training_bench.rule_plans import EVEN, NONE, RulePlans, Sizes, plans_of
from scripts.training_bench.rule_ranks import measure

WORKLOADS = SERIES["compatible"]
CLUSTER = "cpu"  # of the predictions
ROUNDS = 3


def main(argv: Sequence[str] | None = None) -> None:
    """Run what is missing; with all of it, print the table."""
    args = parse(argv)
    sizes = Sizes(
        ranks=args.ep,
        experts=args.experts,
        top_k=args.top_k,
        tokens=args.tokens,
        hidden=args.hidden,
        ffn=args.ffn,
        spare_slots=args.spare_slots,
    )
    settings = asdict(sizes) | {"steps": args.steps, "warmup": args.warmup, "seed": args.seed}
    check_settings(args.out, settings)
    # Step 1: the runs that are not there yet.
    for number in range(args.rounds):
        for workload in args.workload or WORKLOADS:
            path = args.out / f"round{number}-{workload}.npz"
            if not path.exists():
                run(workload, number, args, sizes, path)
                print(f"round {number + 1} of {args.rounds}: {workload} done", file=sys.stderr, flush=True)
    # Step 2: the table.
    files = {name: [args.out / f"round{number}-{name}.npz" for number in range(args.rounds)] for name in WORKLOADS}
    missing = [path.name for paths in files.values() for path in paths if not path.exists()]
    if missing:
        print(f"{len(missing)} runs are still to be made, {missing[0]} first", file=sys.stderr)
        return
    text = as_markdown({name: [np.load(path) for path in paths] for name, paths in files.items()}, args, sizes)
    print(text)
    if args.markdown is not None:
        args.markdown.write_text(text + "\n", encoding="utf-8")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="DIR", help="folder of the runs; what it has is not repeated")
    add("--workload", nargs="+", choices=WORKLOADS, help="run these alone now (default: all)")
    add("--rounds", type=int, default=ROUNDS, metavar="N", help=f"runs of each workload (default: {ROUNDS})")
    add("--steps", type=int, default=28, metavar="N", help="steps; 24 are a full turn of W6 (default: 28)")
    text = "steps at the start that are planned for and not run (default: 4)"
    add("--warmup", type=int, default=4, metavar="N", help=text)
    add("--ep", type=int, default=4, help="ranks, all in one expert-parallel group (default: 4)")
    add("--experts", type=int, default=32, metavar="E", help="(default: 32)")
    add("--top-k", type=int, default=4, metavar="K", help="experts of a token (default: 4)")
    add("--tokens", type=int, default=256, metavar="T", help="of a rank in a step (default: 256)")
    add("--hidden", type=int, default=256, help="hidden size (default: 256)")
    add("--ffn", type=int, default=512, help="inner size of an expert (default: 512)")
    add("--spare-slots", type=int, default=2, metavar="K", help="replica slots per rank (default: 2)")
    add("--seed", type=int, default=1234, help="of the workloads (default: 1234)")
    add("--markdown", type=Path, metavar="FILE", help="write the table to this file")
    args = parser.parse_args(argv)
    for name in ("rounds", "warmup", "ep", "tokens", "hidden", "ffn", "spare_slots"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name)}: must be at least 1")
    if args.steps <= args.warmup:
        parser.error(f"--steps {args.steps}: must be more than --warmup {args.warmup}")
    return args


def run(workload: str, number: int, args: argparse.Namespace, sizes: Sizes, path: Path) -> None:
    """One workload in one round; its file appears when all of it has succeeded."""
    bench = BenchSizes(
        num_experts=sizes.experts,
        top_k=sizes.top_k,
        tokens=sizes.tokens,
        num_ranks=sizes.ranks,
        steps=args.steps,
        micro_batches=1,
        seed=args.seed,
    )
    plans: dict[str, RulePlans] = plans_of(make_case("compatible", workload, bench).trace, sizes, args.warmup, CLUSTER)
    with tempfile.TemporaryDirectory() as folder:
        seconds = measure(plans, sizes, number, Path(folder))
    unfinished = path.with_suffix(".part.npz")
    np.savez(
        unfinished,
        rules=np.array(list(plans)),
        seconds=seconds,
        predicted=np.array([each.predicted for each in plans.values()]),
        max_over_mean=np.array([each.max_over_mean for each in plans.values()]),
    )
    unfinished.replace(path)


def as_markdown(runs: dict[str, list[Mapping[str, Any]]], args: argparse.Namespace, sizes: Sizes) -> str:
    """The table: a cell is measured time over that of an even load, and in brackets what is predicted."""
    rules = [str(rule) for rule in next(iter(runs.values()))[0]["rules"]]
    at_even = rules.index(EVEN)
    busiest_WZNU = np.array([[one["seconds"].max(axis=2) for one in rounds] for rounds in runs.values()])
    seconds_WU = np.median(busiest_WZNU, axis=1).mean(axis=1)
    ratio_WU = seconds_WU / seconds_WU[:, [at_even]]
    by_round_WZU = busiest_WZNU.mean(axis=2)
    by_round_WZU = by_round_WZU / by_round_WZU[:, :, [at_even]]
    spread_WU = (by_round_WZU.max(axis=1) - by_round_WZU.min(axis=1)) / ratio_WU
    predicted_WU, balance_WU = (
        np.array([rounds[0][name] for rounds in runs.values()]) for name in ("predicted", "max_over_mean")
    )
    head = ["rule", *(name.split("_")[0] for name in runs), "mean", "max/mean"]
    even_ms = [f"{ms:.0f}" for ms in seconds_WU[:, at_even] * 1e3]
    lines = [head, ["even load, ms", *even_ms, f"{seconds_WU[:, at_even].mean() * 1e3:.0f}", "1.00"]]
    for at, rule in sorted(enumerate(rules), key=lambda one: one[1] != NONE):
        if at != at_even:
            measured, predicted = ([*each[:, at], each[:, at].mean()] for each in (ratio_WU, predicted_WU))
            cells = [f"{one:.2f} ({other:.2f})" for one, other in zip(measured, predicted, strict=True)]
            lines.append([rule, *cells, f"{balance_WU[:, at].mean():.2f}"])
    table = [f"| {' | '.join(line)} |" for line in lines]
    table.insert(1, "|---|" + "---:|" * (len(head) - 1))
    what = (
        "Thread CPU time of the busiest rank over that of an even load, and in brackets what the cost model predicts "
        f"for the cluster file {CLUSTER}. One MoE layer, forward and backward, fp32: {sizes.experts} experts of ffn "
        f"{sizes.ffn}, top-{sizes.top_k}, hidden {sizes.hidden}, {sizes.tokens} tokens a rank and step, EP "
        f"{sizes.ranks} on gloo, {sizes.spare_slots} spare slots per rank, homes that stay; "
        f"{args.steps - args.warmup} steps, {args.rounds} round{'s' * (args.rounds > 1)}, {os.cpu_count()} cores. "
    )
    if args.rounds > 1:
        what += (
            f"Rounds of a cell differ by {np.median(spread_WU):.1%} in the median, by {spread_WU.max():.1%} at most."
        )
    command = "scripts/bench_imbalance.py --out DIR --markdown docs/imbalance_measured.md"
    if args.rounds != ROUNDS:
        command += f" --rounds {args.rounds}"
    return "\n".join(
        [
            "# The imbalance benchmark, measured",
            "",
            "```text",
            f"OMP_NUM_THREADS=1 .venv/bin/python {command}",
            "```",
            "",
            *textwrap.wrap(what, 120),
            "",
            *table,
        ]
    )


if __name__ == "__main__":
    main()
