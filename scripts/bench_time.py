#!/usr/bin/env python3
"""Predicted layer time of `auto` beside that of an even load, of the limit, and of the fastest peer's rule.

    python scripts/bench_time.py
    python scripts/bench_time.py --ep 8 --trace trace.npz --cluster b200-sxm
    python scripts/bench_time.py --ep 64 --cluster a100-pcie-40gb --each --homes-interval 4
    python scripts/bench_time.py --workloads --trace trace.npz --cluster h100-sxm a100-pcie-40gb rtx-4090

Synthetic traces of one layer that drift (5% a record), burst (one expert 8 times as popular for a third of every 12
records) and stay as they are; 4 micro-batches a record; 64 experts on 8 ranks, 128 on 16, and 256 on 64 ranks of 8
nodes. With --workloads also W0 to W7 of `smartmoe bench-imbalance` on as many ranks. --trace takes recorded ones,
instead of the synthetic ones unless --workloads is there too; those whose experts the ranks do not divide are left out.
One spare slot per rank, two for W0 to W7, some of which one cannot even out. All times are predictions of the cost
model, priced as training prices them; the peers' rules run with the same prices. It runs on one core. With --each:
every rule of the catalogue in a table for each trace, and ours without homes that move.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout, when the script is run by its path

from megatron_smartmoe.cli.policies import own_policy, peer_policy, setup_of
from megatron_smartmoe.cli.simulate_prices import Prices, rank_tokens
from megatron_smartmoe.cost.compute import ExpertShape
from megatron_smartmoe.runtime.replicas.kernels import fastest_kernels
from megatron_smartmoe.simulate.baselines import by_name
from megatron_smartmoe.simulate.imbalance import SERIES, BenchSizes, make_case
from megatron_smartmoe.simulate.limit import limits_s
from megatron_smartmoe.simulate.policies import SimulatedPolicy
from megatron_smartmoe.simulate.run import even_load_s, replay
from megatron_smartmoe.spec.cluster import SCOPES, load_cluster_spec
from megatron_smartmoe.spec.placement import Placement
from megatron_smartmoe.spec.trace import RoutingTrace, load_trace
from tests.support.synthetic import SyntheticSpec, synthetic_trace

EXPERTS = {8: 64, 16: 128, 64: 256}  # by ranks; else 8 a rank
RANKS_PER_NODE = 8


@dataclass(frozen=True, kw_only=True)
class Case:
    """A trace, the ranks of an expert-parallel group that it is replayed on, and spare slots of a rank."""

    name: str
    trace: RoutingTrace
    num_ranks: int
    spare_slots: int = 1


def synthetic(sizes: list[int], seed: int) -> Iterator[Case]:
    """Drift, burst and neither, for each number of ranks."""
    for num_ranks in sizes:
        experts = EXPERTS.get(num_ranks, 8 * num_ranks)
        for name, kind in (("steady", "lognormal"), ("drift", "drifting"), ("burst", "burst")):
            spec = SyntheticSpec(
                kind=kind,
                num_records=18,
                num_layers=1,
                num_sources=num_ranks,
                num_experts=experts,
                micro_batches=4,
                seed=seed,
            )
            yield Case(name=name, trace=synthetic_trace(spec), num_ranks=num_ranks)


def workloads(sizes: list[int]) -> Iterator[Case]:
    """W0 to W7, for each number of ranks."""
    for num_ranks in sizes:
        shape = BenchSizes(
            num_experts=EXPERTS.get(num_ranks, 8 * num_ranks),
            top_k=8,
            tokens=4096,
            num_ranks=num_ranks,
            steps=24,
            micro_batches=1,
            seed=1234,
        )
        for name in SERIES["compatible"]:
            trace = make_case("compatible", name, shape).trace
            yield Case(name=name.partition("_")[0], trace=trace, num_ranks=num_ranks, spare_slots=2)


def recorded(paths: list[Path], sizes: list[int], most_records: int) -> Iterator[Case]:
    """The last records of recorded traces, for each number of ranks that divides their experts."""
    for path in paths:
        trace = load_trace(path)
        kept = slice(-most_records, None)
        trace = replace(trace, counts=trace.counts[kept], iteration=trace.iteration[kept])
        for num_ranks in sizes:
            if trace.num_experts % num_ranks == 0:
                yield Case(name=path.stem, trace=trace, num_ranks=num_ranks)


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a policy did: predicted seconds of a layer, moves of homes included, and max / mean tokens per rank."""

    seconds: float
    imbalance: float


def replays(case: Case, cluster: str, options: argparse.Namespace) -> dict[str, Found]:
    """Every policy of ours and the peers' rules, an even load, and the limit."""
    machine, homes_interval = load_cluster_spec(Path(cluster)), options.homes_interval
    machine = replace(machine, replica_scope=options.replicas_scope or machine.replica_scope)
    prices = Prices(
        cluster=machine,
        expert=ExpertShape(hidden=4096, ffn=1536),
        num_ranks=case.num_ranks,
        num_nodes=max(1, case.num_ranks // RANKS_PER_NODE),
        micro_batches=case.trace.counts.shape[3] if case.trace.has_micro_batches else 1,
        rank_tokens=rank_tokens(case.trace, case.num_ranks),
    )
    spare_slots = options.spare_slots or case.spare_slots
    setup = setup_of(prices, spare_slots=spare_slots, warmup=options.warmup, kernels=fastest_kernels())
    start = Placement.contiguous(
        num_layers=case.trace.num_layers,
        num_experts=case.trace.num_experts,
        num_ranks=case.num_ranks,
        spare_slots=spare_slots,
    )
    groups = max(1, case.trace.num_sources // case.num_ranks)
    policies: dict[str, SimulatedPolicy] = {
        "auto": own_policy("auto", start, groups, setup, prices, homes_interval=homes_interval),
        "history": own_policy("history", start, groups, setup, prices, homes_interval=homes_interval),
        "auto, no homes": own_policy("auto", start, groups, setup, prices, homes_interval=0),
        "exact": own_policy("exact", start, groups, setup, prices, homes_interval=0),
    }
    peers = [name for name in by_name() if options.each or not options.peers or name in options.peers]
    policies |= {name: peer_policy(name, start, groups, setup, interval=1) for name in peers}
    found = {
        "even load": Found(seconds=float(even_load_s(case.trace, setup).mean()), imbalance=1.0),
        "limit": Found(seconds=float(limits_s(case.trace, setup).mean()), imbalance=1.0),
    }
    for name, policy in policies.items():
        result = replay(case.trace, policy, setup)
        found[name] = Found(seconds=result.total_s, imbalance=float(result.imbalance.mean()))
    return found


def summary(case: Case, cluster: str, found: dict[str, Found]) -> str:
    """The row of a trace: `auto` beside the limit and the fastest peer."""
    even_s, auto = found["even load"].seconds, found["auto"]
    peer = min((name for name in by_name() if name in found), key=lambda name: found[name].seconds)
    return (
        f"| {cluster} | {case.name} | {case.num_ranks} | {even_s * 1e3:.3f} ms "
        f"| {even_s / found['limit'].seconds:.1%} | {even_s / auto.seconds:.1%} | {auto.imbalance:.3f} "
        f"| {even_s / found['exact'].seconds:.1%} | {peer}, {even_s / found[peer].seconds:.1%} "
        f"| {auto.seconds / found[peer].seconds - 1:+.1%} |"
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
    parser.add_argument("--workloads", action="store_true")
    parser.add_argument("--seed", type=int, default=1, help="of the synthetic traces (default: 1)")
    parser.add_argument("--case", nargs="*", default=[], help="traces by name (default: all)")
    parser.add_argument("--peers", nargs="*", default=[], help="rules to compare with (default: all)")
    parser.add_argument("--cluster", nargs="+", default=["h100-sxm"])
    parser.add_argument("--records", type=int, default=40, help="the last ones of a recorded trace (default: 40)")
    parser.add_argument("--warmup", type=int, default=6)
    parser.add_argument("--spare-slots", type=int, help="default: 1, and 2 for W0 to W7")
    parser.add_argument("--homes-interval", type=int, default=100)
    parser.add_argument("--replicas-scope", choices=SCOPES, help="default: that of the cluster file")
    parser.add_argument("--each", action="store_true")
    options = parser.parse_args()
    cases = list(recorded(options.trace, options.ep, options.records))
    cases += list(synthetic(options.ep, options.seed)) if options.workloads or not cases else []
    cases += list(workloads(options.ep)) if options.workloads else []
    cases = [case for case in cases if not options.case or case.name in options.case]
    if not options.each:
        print(
            "| cluster | trace | ranks | even load | limit, of even load | `auto` | max/mean | `exact` | fastest peer "
            "| `auto` against it |"
        )
        print("|---|---|---|---|---|---|---|---|---|---|")
    for cluster in options.cluster:
        for case in cases:
            found = replays(case, cluster, options)
            print(each(case, found) if options.each else summary(case, cluster, found), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
