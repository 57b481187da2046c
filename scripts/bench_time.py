#!/usr/bin/env python3
"""Predicted layer time of `auto` beside that of an even load and of the fastest peer's rule, on several traces.

    python scripts/bench_time.py
    python scripts/bench_time.py --ep 8 --trace trace.npz --cluster b200-sxm
    python scripts/bench_time.py --ep 64 --cluster a100-pcie-40gb --each --homes-interval 4

Without --trace: synthetic traces of one layer that drift (5% a record), burst (one expert 8 times as popular for a
third of every 12 records) and stay as they are; 4 micro-batches a record; 64 experts on 8 ranks, 128 on 16, and 256 on
64 ranks of 8 nodes. One spare slot per rank. All times are predictions of the cost model, priced as training prices
them; the peers' rules run with the same prices. It runs on one core. With --each: every rule of the catalogue in a
table for each trace, and ours without homes that move.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout, when the script is run by its path

from megatron_smartmoe.cli.policies import own_policy, peer_policy, setup_of
from megatron_smartmoe.cli.simulate_prices import Prices, rank_tokens
from megatron_smartmoe.cost.compute import ExpertShape
from megatron_smartmoe.simulate.baselines import by_name
from megatron_smartmoe.simulate.policies import SimulatedPolicy
from megatron_smartmoe.simulate.run import even_load_s, replay
from megatron_smartmoe.spec.cluster import load_cluster_spec
from megatron_smartmoe.spec.placement import Placement
from megatron_smartmoe.spec.trace import RoutingTrace, load_trace
from tests.support.synthetic import SyntheticSpec, synthetic_trace

PEERS = ("laer", "eplb", "epic", "llep", "echo", "ultraep-min1")


@dataclass(frozen=True, kw_only=True)
class Case:
    """A trace, and the ranks of an expert-parallel group that it is replayed on."""

    name: str
    trace: RoutingTrace
    num_ranks: int


def synthetic(sizes: list[int]) -> Iterator[Case]:
    """Drift, burst and neither, for each number of ranks."""
    for num_ranks in sizes:
        experts = {8: 64, 16: 128, 64: 256}.get(num_ranks, 8 * num_ranks)
        for name, kind in (("steady", "lognormal"), ("drift", "drifting"), ("burst", "burst")):
            spec = SyntheticSpec(
                kind=kind,
                num_records=18,
                num_layers=1,
                num_sources=num_ranks,
                num_experts=experts,
                micro_batches=4,
                seed=1,
            )
            yield Case(name=name, trace=synthetic_trace(spec), num_ranks=num_ranks)


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a policy did: predicted seconds of a layer, moves of homes included, and max / mean tokens per rank."""

    seconds: float
    imbalance: float


def replays(case: Case, cluster: str, warmup: int, homes_interval: int, peers: Sequence[str]) -> dict[str, Found]:
    """Every policy of ours and the named peers' rules, and an even load."""
    machine = load_cluster_spec(Path(cluster))
    prices = Prices(
        cluster=machine,
        expert=ExpertShape(hidden=4096, ffn=1536),
        num_ranks=case.num_ranks,
        num_nodes=max(1, case.num_ranks // 8),
        micro_batches=case.trace.counts.shape[3] if case.trace.has_micro_batches else 1,
        rank_tokens=rank_tokens(case.trace, case.num_ranks),
    )
    setup = setup_of(prices, spare_slots=1, warmup=warmup)
    start = Placement.contiguous(
        num_layers=case.trace.num_layers,
        num_experts=case.trace.num_experts,
        num_ranks=case.num_ranks,
        spare_slots=1,
    )
    groups = max(1, case.trace.num_sources // case.num_ranks)
    policies: dict[str, SimulatedPolicy] = {
        "auto": own_policy("auto", start, groups, setup, prices, homes_interval=homes_interval),
        "history": own_policy("history", start, groups, setup, prices, homes_interval=homes_interval),
        "auto, no homes": own_policy("auto", start, groups, setup, prices, homes_interval=0),
        "exact": own_policy("exact", start, groups, setup, prices, homes_interval=0),
    }
    policies |= {name: peer_policy(name, start, groups, setup, interval=1) for name in peers}
    found = {"even load": Found(seconds=float(even_load_s(case.trace, setup).mean()), imbalance=1.0)}
    for name, policy in policies.items():
        result = replay(case.trace, policy, setup)
        found[name] = Found(seconds=result.total_s, imbalance=float(result.imbalance.mean()))
    return found


def summary(case: Case, found: dict[str, Found]) -> str:
    """The row of a trace: `auto` beside the fastest peer."""
    even_s, auto = found["even load"].seconds, found["auto"]
    peer = min(PEERS, key=lambda name: found[name].seconds)
    return (
        f"| {case.name} | {case.num_ranks} | {even_s * 1e3:.3f} ms | {auto.seconds * 1e3:.3f} ms, "
        f"{even_s / auto.seconds:.1%} | {auto.imbalance:.3f} | {even_s / found['exact'].seconds:.1%} "
        f"| {peer}, {even_s / found[peer].seconds:.1%} | {auto.seconds / found[peer].seconds - 1:+.1%} |"
    )


def each(case: Case, found: dict[str, Found]) -> str:
    """A table of one trace, the fastest first."""
    auto_s = found["auto"].seconds
    lines = [f"{case.name}, {case.num_ranks} ranks", "", "| rule | max/mean | layer | to `auto` |", "|---|---|---|---|"]
    for name, one in sorted(found.items(), key=lambda item: item[1].seconds):
        lines.append(f"| {name} | {one.imbalance:.3f} | {one.seconds * 1e3:.3f} ms | {one.seconds / auto_s:.3f} |")
    return "\n".join([*lines, ""])


def main() -> int:
    """Print a line per case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ep", type=int, nargs="+", default=[8, 16, 64])
    parser.add_argument("--trace", type=Path, nargs="*", default=[])
    parser.add_argument("--cluster", default="h100-sxm")
    parser.add_argument("--warmup", type=int, default=6)
    parser.add_argument("--homes-interval", type=int, default=100)
    parser.add_argument("--each", action="store_true")
    options = parser.parse_args()
    traces = [(path, load_trace(path)) for path in options.trace]
    recorded = [Case(name=path.stem, trace=trace, num_ranks=ep) for ep in options.ep for path, trace in traces]
    if not options.each:
        print(
            "| trace | ranks | even load | `auto`, of even load | max/mean | `exact` | fastest peer "
            "| `auto` against it |"
        )
        print("|---|---|---|---|---|---|---|---|")
    peers = list(by_name()) if options.each else PEERS
    for case in recorded or synthetic(options.ep):
        found = replays(case, options.cluster, options.warmup, options.homes_interval, peers)
        print(each(case, found) if options.each else summary(case, found), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
