#!/usr/bin/env python3
"""What balancing is worth in a training step, for sceptics: all rules in turns, against even load and stock Megatron.

    OMP_NUM_THREADS=1 .venv/bin/python scripts/bench_train.py --trace F.npz --out DIR [--ep 8] [--rounds 5] [--steps 15]

Real training on gloo ranks, one thread each, through the real entry; only the routers' choices come from the trace. One
run of each variant makes a round; the order turns round from one round to the next, because a machine drifts:

    ideal       --smartmoe without balancing, the trace rewritten so that every expert gets as many tokens
    stock       Megatron's own MoE layer
    off         --smartmoe without balancing
    exact       one spare slot per rank, replicas planned from each micro-batch's counts
    history     one spare slot per rank, replicas planned from earlier iterations
    auto        one spare slot per rank, replicas from history, and from a micro-batch's counts where that pays
    ultraep     the same executor and spare slot, replicas and token split by UltraEP's rule
    fastermoe   the same executor, hot experts on all ranks by FasterMoE's rule, which takes up to sixteen spare slots
    smartmoe2023  no spare slots, homes by the rule of SmartMoE (2023), every three steps and whatever a move costs

Reported: CPU time of the busiest and of the mean rank (all threads of a rank; what the wall time would be with a core
for each), median over rounds of the median step, and in brackets the rounds' range; wall time where there are cores for
all ranks; the experts' share of the CPU time, forward and backward; max / mean tokens per rank. `of ideal` is the mean
rank's CPU time of the ideal over the busiest rank's of this variant, `over stock` the busiest rank's of stock over this
one's; each with a 95% bootstrap interval over rounds and steps, and with what the cost model predicts for the cluster
file: (rest + MoE layers of the one) / (rest + MoE layers of the other), the rest being measured, on the ideal.

A run that DIR has already is not repeated: an interrupted program goes on where it was, and more --rounds add to what
is there. On a busy machine runs of one kind differ by half: look at the intervals before the medians.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout, when the script is run by its path

from megatron_smartmoe.spec.trace import RoutingTrace, load_trace
from scripts.training_bench import rank
from scripts.training_bench.folder import check_settings
from scripts.training_bench.predict import as_routed, layer_seconds_of
from scripts.training_bench.start import run_ranks
from scripts.training_bench.statistics import Ratio, ratio
from scripts.training_bench.variants import VARIANTS, Shape

WARM_UP = 5  # steps of a run that do not count


@dataclass(frozen=True, kw_only=True)
class Runs:
    """The counted steps of one variant, a run per round.

    Attributes:
        busiest_s: CPU time of the busiest rank of each step.
        mean_s: mean over the ranks.
        wall_s: of the slowest rank.
        experts: share of the CPU time of all ranks that is in the experts.
        faults: page faults of a rank and step, median.
        balance: max / mean tokens per rank.
    """

    busiest_s: list[NDArray[np.float64]]
    mean_s: list[NDArray[np.float64]]
    wall_s: list[NDArray[np.float64]]
    experts: float
    faults: float
    balance: float


def main(argv: Sequence[str] | None = None) -> None:
    """Run what is missing, and print the table."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] == ["--rank"]:
        rank.main(argv[1], Path(argv[2]), argv[4:])
        return
    args = parse(argv)
    # Step 1: the part of the trace that is replayed, as it is and rewritten to even load.
    trace = load_trace(args.trace)
    if args.first + args.steps > trace.num_records:
        raise SystemExit(f"--first {args.first} --steps {args.steps}: the trace has {trace.num_records} records")
    shape = Shape(
        layers=args.layers,
        hidden=args.hidden,
        ffn=args.ffn,
        tokens=args.tokens,
        experts=trace.num_experts,
        top_k=int(trace.meta["top_k"]),
        micro_batches=args.micro_batches,
    )
    settings = {"trace": str(args.trace.resolve()), "ep": args.ep, "steps": args.steps, "first": args.first}
    check_settings(args.out, settings | asdict(shape))
    part = slice(args.first, args.first + args.steps)
    meta = {**trace.meta, "source": str(trace.meta.get("source", ""))}
    given = RoutingTrace(counts=trace.counts[part], iteration=trace.iteration[part], layer=trace.layer, meta=meta)
    given.save(args.out / "as-recorded.npz")
    even = RoutingTrace(counts=np.ones_like(given.counts), iteration=given.iteration, layer=given.layer, meta=meta)
    even.save(args.out / "even.npz")
    # Step 2: the runs that are not there yet, in turns.
    for number in range(args.rounds):
        for variant in args.variants if number % 2 == 0 else reversed(args.variants):
            path = args.out / f"round{number}-{variant}.npz"
            if not path.exists():
                train(variant, args, shape, path)
                print(f"round {number + 1} of {args.rounds}: {variant} done", file=sys.stderr, flush=True)
    # Step 3: the table.
    routed = as_routed(given, args.ep, shape)
    runs = {variant: read(variant, args, routed) for variant in args.variants}
    predicted_s = layer_seconds_of(routed, args.ep, shape, args.variants, WARM_UP, args.cluster)
    content = summary(runs, predicted_s, args, shape)
    (args.out / "summary.json").write_text(json.dumps(content, indent=2) + "\n")
    print(as_table(content, args, shape))


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--trace", type=Path, required=True, metavar="FILE", help="routing trace whose choices are replayed")
    add("--out", type=Path, required=True, metavar="DIR", help="folder of the runs; what it has is not repeated")
    add("--ep", type=int, default=8, metavar="N", help="ranks, all in one expert-parallel group (default: 8)")
    add("--rounds", type=int, default=5, metavar="N", help="runs of each variant (default: 5)")
    text = f"steps of a run, of which the first {WARM_UP} do not count (default: 15)"
    add("--steps", type=int, default=15, metavar="N", help=text)
    add("--first", type=int, default=100, metavar="RECORD", help="record that runs begin with (default: 100)")
    add("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="default: all of them")
    add("--layers", type=int, default=2, help="transformer layers (default: 2)")
    add("--hidden", type=int, default=256, help="hidden size (default: 256)")
    add("--ffn", type=int, default=1024, help="inner size of an expert (default: 1024)")
    add("--tokens", type=int, default=512, help="tokens of a rank and micro-batch (default: 512)")
    add("--micro-batches", type=int, default=1, help="micro-batches of a step (default: 1)")
    text = "cluster file of the predictions, or the name of a shipped one (default: cpu)"
    add("--cluster", type=Path, default=Path("cpu"), metavar="YAML", help=text)
    args = parser.parse_args(argv)
    for name in ("ep", "rounds", "layers", "hidden", "ffn", "tokens", "micro_batches"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name)}: must be at least 1")
    if args.steps <= WARM_UP:
        parser.error(f"--steps {args.steps}: must be more than the {WARM_UP} that do not count")
    return args


def train(variant: str, args: argparse.Namespace, shape: Shape, path: Path) -> None:
    """One run, in a process per rank; its times are kept when all of it has succeeded."""
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder)
        trace = args.out / ("even.npz" if variant == "ideal" else "as-recorded.npz")
        flags = [*shape.flags(args.ep, args.steps), *VARIANTS[variant], "--smartmoe-run-dir", folder]
        flags += ["--smartmoe-replay-trace", str(trace)]
        times = run_ranks(variant, args.ep, flags, run_dir, name=variant)
        balance = balance_of(run_dir)
        unfinished = path.with_suffix(".part.npz")
        np.savez(unfinished, times=times, balance=np.array(balance))
        unfinished.replace(path)


def balance_of(run_dir: Path) -> list[float]:
    """Max / mean tokens per rank in each step, mean over layers; none of stock Megatron."""
    lines = run_dir / "balance-stage0-group0.jsonl"
    if lines.exists():  # with replicas, each micro-batch by itself
        return [float(np.mean(json.loads(line)["split"])) for line in lines.open()]
    account = run_dir / "account.jsonl"
    found = [json.loads(line).get("imbalance") for line in account.open()] if account.exists() else []
    return [float(np.mean([layer[0] for layer in layers.values()])) for layers in found if layers]


def read(variant: str, args: argparse.Namespace, routed: RoutingTrace) -> Runs:
    """All rounds of a variant."""
    files = [np.load(args.out / f"round{number}-{variant}.npz") for number in range(args.rounds)]
    times = [file["times"][WARM_UP:] for file in files]  # [step, rank, field]
    wall, cpu, experts, faults = (
        [run[:, :, rank.FIELDS.index(name)] for run in times] for name in ("wall_s", "cpu_s", "experts_s", "faults")
    )
    balance = [float(file["balance"][WARM_UP:].mean()) for file in files if len(file["balance"])]
    return Runs(
        busiest_s=[run.max(axis=1) for run in cpu],
        mean_s=[run.mean(axis=1) for run in cpu],
        wall_s=[run.max(axis=1) for run in wall],
        experts=float(np.sum(experts) / np.sum(cpu)),
        faults=float(np.median(np.concatenate([run.ravel() for run in faults]))),
        balance=float(np.mean(balance)) if balance else 1.0 if variant == "ideal" else contiguous_balance(routed),
    )


def contiguous_balance(routed: RoutingTrace) -> float:
    """Max / mean tokens per rank with experts at home in order."""
    ranks = routed.num_sources
    load_NLR = routed.counts[WARM_UP:].sum(axis=2).reshape(-1, routed.num_layers, ranks, routed.num_experts // ranks)
    load_NLR = load_NLR.sum(axis=3)
    return float((load_NLR.max(axis=2) / load_NLR.mean(axis=2)).mean())


def summary(
    runs: Mapping[str, Runs], predicted_s: Mapping[str, float], args: argparse.Namespace, shape: Shape
) -> dict[str, Any]:
    """The table's numbers."""
    layers = shape.layers * shape.micro_batches
    rest_s = 0.0
    if "ideal" in runs:
        ideal = runs["ideal"]
        rest_s = float(np.median([np.median(run) for run in ideal.mean_s])) * (1 - ideal.experts)

    def predicted(over: str, under: str) -> float:
        return (rest_s + layers * predicted_s[over]) / (rest_s + layers * predicted_s[under])

    rows: dict[str, Any] = {}
    for name, run in runs.items():
        row: dict[str, Any] = {
            "busiest_ms": spread(run.busiest_s),
            "mean_ms": spread(run.mean_s),
            "wall_ms": spread(run.wall_s) if (os.cpu_count() or 1) >= args.ep else None,
            "experts_share": run.experts,
            "page_faults": run.faults,
            "max_over_mean_tokens": run.balance,
            "predicted_layer_ms": predicted_s[name] * 1e3,
        }
        if "ideal" in runs:
            row["of_ideal"] = as_json(ratio(runs["ideal"].mean_s, run.busiest_s), predicted("ideal", name))
        if "stock" in runs:
            row["over_stock"] = as_json(ratio(runs["stock"].busiest_s, run.busiest_s), predicted("stock", name))
        rows[name] = row
    return {
        "ep": args.ep,
        "rounds": args.rounds,
        "steps_counted": args.steps - WARM_UP,
        "shape": asdict(shape),
        "machine": platform.platform(),
        "cores": os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "variants": rows,
    }


def spread(runs: Sequence[NDArray[np.float64]]) -> list[float]:
    """Median over rounds of the median step, least and most of the rounds, in ms."""
    medians = [float(np.median(run)) * 1e3 for run in runs]
    return [float(np.median(medians)), min(medians), max(medians)]


def as_json(measured: Ratio, predicted: float) -> dict[str, float | None]:
    """A ratio with its interval, which one round does not have."""
    return {
        "value": measured.value,
        "low": None if np.isnan(measured.low) else measured.low,
        "high": None if np.isnan(measured.high) else measured.high,
        "predicted": predicted,
    }


def as_table(content: Mapping[str, Any], args: argparse.Namespace, shape: Shape) -> str:
    """A line per variant."""
    head = (
        f"EP{args.ep}: {shape.layers} layers, hidden {shape.hidden}, {shape.experts} experts of ffn {shape.ffn}, "
        f"top-{shape.top_k}, {shape.tokens} tokens a rank and micro-batch, {shape.micro_batches} a step, fp32; "
        f"{args.rounds} round{'s' * (args.rounds > 1)} of {args.steps - WARM_UP} steps counted; "
        f"{content['cores']} cores, load {content['load_average']:.1f}; predictions: cluster {args.cluster}"
    )
    titles = ["variant", "busiest CPU ms", "mean CPU ms", "wall ms", "experts", "faults", "max/mean"]
    titles += ["of ideal", "model", "over stock", "model"]
    rows = [titles]
    for name, row in content["variants"].items():
        wall = "-" if row["wall_ms"] is None else text_of(row["wall_ms"])
        cells = [name, text_of(row["busiest_ms"]), text_of(row["mean_ms"]), wall, f"{row['experts_share']:.0%}"]
        cells += [f"{row['page_faults']:,.0f}", f"{row['max_over_mean_tokens']:.4f}"]
        for key in ("of_ideal", "over_stock"):
            found = row.get(key)
            cells += [interval_of(found, key == "of_ideal"), f"{found['predicted']:.2f}"] if found else ["-", "-"]
        rows.append(cells)
    widths = [max(len(row[at]) for row in rows) for at in range(len(titles))]
    lines = [
        "  ".join(
            f"{cell:<{width}}" if at == 0 else f"{cell:>{width}}"
            for at, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    return "\n".join([head, "", *lines])


def text_of(found: Sequence[float]) -> str:
    """`median (least to most)`."""
    middle, least, most = found
    return f"{middle:.0f} ({least:.0f} to {most:.0f})"


def interval_of(found: Mapping[str, float | None], as_share: bool) -> str:
    """A ratio and its interval."""
    form = "{:.0%}" if as_share else "{:.2f}"
    text = form.format(found["value"])
    return text if found["low"] is None else f"{text} ({form.format(found['low'])} to {form.format(found['high'])})"


if __name__ == "__main__":
    main()
