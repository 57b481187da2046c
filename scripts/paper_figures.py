#!/usr/bin/env python3
"""The settings of the SmartMoE paper's Figures 8, 10, 12 and 13 with this project's planner and placement.

    python scripts/paper_figures.py --runs runs.csv
    python scripts/paper_figures.py --trace trace.npz --plot docs/paper.svg

--runs fits the planner's model to measured runs (the CSV file that scripts/validation/validate_planner.py reads) and
prints, for every setting that FastMoE was measured in, the strategy that it chooses. --trace replays a routing trace at
one layer after the other, prints how much faster online placement makes them, and draws the time over iterations.
Everything but the measured steps of --runs is predicted by the cost model. It runs on one core.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout, when the script is run by its path

from megatron_smartmoe.cost.compute import ExpertShape
from megatron_smartmoe.errors import EXIT_CONFIG_ERROR, ConfigError, SmartMoEError
from megatron_smartmoe.spec.cluster import load_cluster_spec
from megatron_smartmoe.spec.trace import load_trace
from scripts.paper.online import INTERVALS, OURS, PAPER, Online, online
from scripts.paper.strategies import PUBLISHED, choices
from scripts.validation.fit import fit
from scripts.validation.validate_planner import clusters_of, read_runs

WARM = 250  # iterations after which the second column counts: the gate collapses before
FAVOURED = 6  # the layer of Figure 13


def main(argv: Sequence[str] | None = None) -> int:
    """Print the tables that were asked for; returns the exit status."""
    options = parse(argv)
    try:
        if not options.runs and not options.trace:
            raise ConfigError("--runs", None, "or --trace must be given", "For example: --trace trace.npz.")
        if options.runs:
            show_strategies(options.runs, options.cluster_of)
        if options.trace:
            show_online(options)
    except SmartMoEError as error:
        print(f"paper_figures: {error}", file=sys.stderr)
        return EXIT_CONFIG_ERROR
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--runs", type=Path, metavar="CSV", help="measured training runs, for Figures 8 and 10")
    text = "cluster file for the runs of cluster NAME; may be repeated"
    add("--cluster-of", action="append", default=[], metavar="NAME=YAML", help=text)
    add("--trace", type=Path, metavar="NPZ", help="routing trace, for Figures 12 and 13 and the plot")
    add("--plot", type=Path, metavar="FILE", help="where the plot of step time over iterations is written (SVG)")
    text = "iterations of the trace that are replayed, from its first (default: %(default)s)"
    add("--iterations", type=int, default=1000, metavar="N", help=text)
    add("--ep", type=int, default=8, help="ranks of an expert-parallel group (default: %(default)s)")
    add("--cluster", default="v100-pcie", help="cluster that the trace is priced on (default: %(default)s)")
    add("--hidden", type=int, default=1024, help="hidden size of the priced layers (default: %(default)s)")
    add("--ffn", type=int, default=2048, help="inner size of one expert, without a gate (default: %(default)s)")
    return parser.parse_args(argv)


def show_strategies(path: Path, cluster_of: Sequence[str]) -> None:
    """Figures 8 and 10: a line a setting."""
    runs, left_out = read_runs(path)
    runs = [run for run in runs if not run.vision]
    model = fit(runs, clusters_of(cluster_of))
    print(f"{len(runs)} GPT runs fitted, {len(left_out)} rows left out\n")
    print("| capacity | FastMoE | fastest measured | published | chosen by the planner | predicted | even load |")
    print("|---|---|---|---|---|---|---|")
    for one in choices(runs, model):
        published = f"{PUBLISHED[one.capacity]:.2f}x" if one.capacity in PUBLISHED else ""
        print(
            f"| {one.capacity:g} | {one.baseline_s:.2f} s "
            f"| {one.measured}: {one.measured_s:.2f} s, {one.baseline_s / one.measured_s:.2f}x | {published} "
            f"| {one.chosen}, of {one.candidates} | {one.predicted_s:.2f} s, {one.baseline_s / one.predicted_s:.2f}x "
            f"| {one.even_s:.2f} s, {one.baseline_s / one.even_s:.2f}x |"
        )


def show_online(options: argparse.Namespace) -> None:
    """Figures 12 and 13: a line for each policy and interval; and the plot."""
    trace = load_trace(options.trace)
    if not 1 < options.ep <= trace.num_sources or trace.num_sources % options.ep or trace.num_experts % options.ep:
        rule = f"must divide the trace's {trace.num_sources} source ranks and {trace.num_experts} experts"
        raise ConfigError("--ep", options.ep, rule, "For example: 8.")
    counted = trace.iteration < trace.iteration[0] + options.iterations
    if not counted[1:2].any():
        raise ConfigError("--iterations", options.iterations, "leaves fewer than two records", "For example: 1000.")
    trace = replace(trace, counts=trace.counts[counted], iteration=trace.iteration[counted])
    expert = ExpertShape(hidden=options.hidden, ffn=options.ffn, gated=False)
    found = online(trace, options.ep, load_cluster_spec(Path(options.cluster)), expert)
    print(f"\n| | all layers | from iteration {WARM} on | layer {FAVOURED} |\n|---|---|---|---|")
    for name in (PAPER, OURS):
        for interval in INTERVALS:
            print(_line(found, (name, interval)))
    if options.plot:
        from scripts.paper.plot import draw  # matplotlib is slow to import

        draw(found, options.plot)


def _line(found: Online, key: tuple[str, int]) -> str:
    layer = f"{found.speedup(key, FAVOURED):.2f}x" if FAVOURED in found.layer else ""
    last = int(found.iteration[-1])
    warm = f"{found.speedup(key, after=WARM):.2f}x" if last >= WARM else ""
    return f"| {key[0]}, every {key[1]} | {found.speedup(key):.2f}x | {warm} | {layer} |"


if __name__ == "__main__":
    sys.exit(main())
