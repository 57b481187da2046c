#!/usr/bin/env python3
"""What homes for fewer transfers in a row are worth, and what a much longer search would add.

    python scripts/bench_homes.py --trace trace.npz --cluster a100-pcie-40gb --ep 8

Each layer's last record, whose counts are taken as known: tokens of the busiest rank and the price of the transfers of
an iteration, over the mean tokens of a rank, so that 1 is an even load whose transfers are all hidden. With homes as
numbered, with those that `placement.fewer_transfers` finds as the homes loop calls it, with a search of --times as many
trials, and what no plan can beat, by the formula of `simulate.limit` (of the hottest expert alone).
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout, when the script is run by its path

from megatron_smartmoe.cli.simulate_prices import Prices, rank_tokens
from megatron_smartmoe.cost.compute import ExpertShape
from megatron_smartmoe.cost.replicas import TransferPrice
from megatron_smartmoe.placement.exact_plan import ExactPlanOptions
from megatron_smartmoe.placement.fewer_transfers import TRIALS, homes_for_fewer_transfers
from megatron_smartmoe.placement.plan_replicas import ReplicaOptions
from megatron_smartmoe.runtime.replicas.kernels import fastest_kernels
from megatron_smartmoe.spec.arrays import IntArray
from megatron_smartmoe.spec.cluster import load_cluster_spec
from megatron_smartmoe.spec.placement import Placement, hosts_of
from megatron_smartmoe.spec.trace import load_trace

KERNELS = fastest_kernels()


def cost(slots_RS: IntArray, load_E: IntArray, home_slots: int, price: TransferPrice) -> float:
    """Tokens of the busiest rank and the price of the transfers, over the mean."""
    tree = KERNELS.relay(slots_RS, home_slots, price.num_nodes)
    tokens = KERNELS.busiest(hosts_of(slots_RS, len(load_E)), load_E) + tree.price_tokens(price)
    return float(tokens) * len(slots_RS) / int(load_E.sum())


def limit(load_E: IntArray, num_ranks: int, price: TransferPrice) -> float:
    """What no plan with replicas can beat, over the mean."""
    mean = int(load_E.sum()) / num_ranks
    steps = range(1, (num_ranks - 1).bit_length() + 1)
    hottest = int(load_E.max())
    return min(max(mean, hottest / min(1 << each, num_ranks)) + price.tokens(each, 0) for each in steps) / mean


def main() -> int:
    """Print a line a layer, and the mean."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", type=Path, required=True)
    parser.add_argument("--cluster", type=Path, required=True)
    parser.add_argument("--ep", type=int, default=8, help="ranks of an expert-parallel group, on one node")
    parser.add_argument("--times", type=int, default=30, help="trials of the long search over those of the homes loop")
    options = parser.parse_args()
    trace, ranks = load_trace(options.trace), options.ep
    prices = Prices(
        cluster=load_cluster_spec(options.cluster),
        expert=ExpertShape(hidden=4096, ffn=1536),
        num_ranks=ranks,
        num_nodes=1,
        micro_batches=trace.counts.shape[3] if trace.has_micro_batches else 1,
        rank_tokens=rank_tokens(trace, ranks),
    )
    price, home_slots = prices.replica_price("history"), trace.num_experts // ranks
    replica = ReplicaOptions(price=price)
    sizes = {"num_experts": trace.num_experts, "num_ranks": ranks, "spare_slots": 1}
    bare_RS = Placement.contiguous(num_layers=1, **sizes).slots_LRS[0]
    print("| layer | homes as numbered | searched | searched for longer | limit |\n|---|---|---|---|---|")
    rows, seconds = [], [0.0, 0.0]
    for layer, counts_MRE in enumerate(trace.groups(ranks, trace.num_records - 1)[:, 0]):
        load_E = counts_MRE.sum(axis=(0, 1)).astype(np.int64)
        numbered_RS = KERNELS.exact_plan(load_E, bare_RS, home_slots, ExactPlanOptions(price=price, limit=1.0)).slots_RS
        row = [cost(numbered_RS, load_E, home_slots, price)]
        for column, times in enumerate((1, options.times)):
            begin = time.process_time()
            found_RS = homes_for_fewer_transfers(
                numbered_RS, load_E, home_slots, replica, KERNELS, trials=times * TRIALS
            )
            seconds[column] += time.process_time() - begin
            row.append(cost(numbered_RS if found_RS is None else found_RS, load_E, home_slots, price))
        rows.append([*row, limit(load_E, ranks, price)])
        print(f"| {layer} | " + " | ".join(f"{value:.3f}" for value in rows[-1]) + " |", flush=True)
    print("| mean | " + " | ".join(f"{value:.3f}" for value in np.mean(rows, axis=0)) + " |")
    print(f"\nsearched in {seconds[0] / len(rows) * 1e3:.0f} and {seconds[1] / len(rows) * 1e3:.0f} ms a layer")
    return 0


if __name__ == "__main__":
    sys.exit(main())
