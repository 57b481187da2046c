#!/usr/bin/env python3
"""Step time with dispatch and combine in D chunks compared with unchunked ones, in pairs of runs.

    OMP_NUM_THREADS=1 .venv/bin/python scripts/bench_overlap.py [--degree D] [--ranks R] [--pairs N] [-- any flag...]

Trains a model that spends most of its time in its experts, on mock data, with and without
`--smartmoe-overlap-degree D`, one after the other and in alternating order, so that other load on the machine affects
both alike. Reported is the median over pairs of the ratio of the median steps. On a CPU an exchange needs a core too:
with fewer cores than twice the ranks little of it can be hidden.
"""

from __future__ import annotations

import argparse
import statistics

from bench_layer import step_seconds

EXPERTS = (
    "--hidden-size 256 --seq-length 256 --max-position-embeddings 256 --moe-ffn-hidden-size 1024 --num-experts 8 "
    "--num-layers 2 --smartmoe --smartmoe-homes off"
).split()


def main() -> None:
    """Run the pairs and print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--degree", default="2", help="D, chunks of each all-to-all; at most the number of ranks")
    parser.add_argument("--ranks", type=int, default=2, help="expert-parallel ranks, started on this machine")
    parser.add_argument("--pairs", type=int, default=5, help="pairs of runs")
    parser.add_argument("--iterations", type=int, default=30, help="training steps of each run")
    parser.add_argument("flags", nargs="*", help="any Megatron flag, after --")
    options = parser.parse_args()
    ratios = []
    for pair in range(options.pairs):
        order = ["1", options.degree] if pair % 2 == 0 else [options.degree, "1"]
        seconds = {}
        for degree in order:
            flags = [*EXPERTS, "--expert-model-parallel-size", str(options.ranks), *options.flags]
            flags += ["--smartmoe-overlap-degree", degree]
            seconds[degree] = step_seconds(flags, options.iterations, options.ranks)
        ratios.append(seconds[options.degree] / seconds["1"])
        times = "  ".join(f"degree {degree} {seconds[degree] * 1e3:8.2f} ms" for degree in ("1", options.degree))
        print(f"pair {pair + 1}: {times}  ratio {ratios[-1]:.3f}", flush=True)
    spread = f"{min(ratios):.3f} to {max(ratios):.3f}"
    print(f"degree {options.degree} / 1, median of {len(ratios)} pairs: {statistics.median(ratios):.3f} ({spread})")


if __name__ == "__main__":
    main()
