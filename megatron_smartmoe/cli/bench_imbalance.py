"""`smartmoe bench-imbalance`: how well every rule balances workloads whose imbalance is made, and what that is worth.

Two series: `compatible`, W0 to W7 of NVIDIA/Megatron-LM pull request 7488, and `corrected`, which takes heat apart from
placement and lets sources differ, hot spots move and bursts happen. No rule sees the step that it is judged on, unless
it plans from a micro-batch's own counts, as training can. Times are predicted for the clusters that are named.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from functools import partial
from multiprocessing import Value
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from typing import Any

from megatron_smartmoe.cli.bench_imbalance_table import as_markdown, as_text
from megatron_smartmoe.cli.kernels import kernels_for
from megatron_smartmoe.cli.outputs import check_folder
from megatron_smartmoe.cli.policies import own_policy, peer_policy, setup_of
from megatron_smartmoe.cli.simulate_prices import Prices, rank_tokens
from megatron_smartmoe.cost.compute import ExpertShape
from megatron_smartmoe.errors import ConfigError
from megatron_smartmoe.placement.kernels import Kernels
from megatron_smartmoe.placement.online_options import ReplicaMode
from megatron_smartmoe.simulate.baselines import MOVING_HOMES, by_name
from megatron_smartmoe.simulate.imbalance import SERIES, BenchSizes, Case, Series, make_case, row
from megatron_smartmoe.simulate.jobs import add_one, default_jobs, run_tasks
from megatron_smartmoe.simulate.policies import SimulatedPolicy
from megatron_smartmoe.simulate.run import SimulationSetup, even_load_s, replay
from megatron_smartmoe.spec.cluster import ClusterSpec, load_cluster_spec
from megatron_smartmoe.spec.placement import Placement

OURS: dict[str, ReplicaMode] = {
    "smartmoe-history": "history",
    "smartmoe-exact": "exact",
    "smartmoe-auto": "auto",
}
HOMES = "smartmoe-homes"  # no spare slots
EVEN = "even load"
_LEAST = {"experts": 2, "top_k": 1, "tokens": 1, "ep": 2, "spare_slots": 1, "steps": 2, "micro_batches": 1}
_LEAST |= {"seed": 0, "hidden": 1, "ffn": 1, "homes_interval": 0, "warmup": 1, "jobs": 1}
_MOST = {"experts": 4096, "top_k": 256, "tokens": 1 << 20, "ep": 4096, "spare_slots": 64, "steps": 100_000}
_MOST |= {"micro_batches": 1024, "seed": 2**31 - 1, "jobs": 1024}


def add_parser(tools: Any) -> None:
    """Add the subcommand to the parser of the tools."""
    text = "compare placement rules on made workloads of token imbalance"
    parser = tools.add_parser("bench-imbalance", help=text, description=__doc__)
    add = parser.add_argument
    names = [name for series in SERIES.values() for name in series]
    add("--series", choices=(*SERIES, "both"), default="both", help="which workloads (default: both)")
    add("--workload", metavar="NAME", help=f"one of them, or several with commas: {', '.join(names)}")
    add("--policy", metavar="NAME", help=f"rules, with commas (default: all): {', '.join(_policies())}")
    text = "machines for the predicted times, with commas: files or names of shipped ones (default: h100-sxm)"
    add("--cluster", default="h100-sxm", metavar="YAML", help=text)
    add("--ep", type=int, default=8, help="ranks of the expert-parallel group (default: 8)")
    add("--experts", type=int, default=64, metavar="E", help="(default: 64)")
    add("--top-k", type=int, default=8, metavar="K", help="experts of a token (default: 8)")
    add("--tokens", type=int, default=4096, metavar="T", help="of a source rank in a micro-batch (default: 4096)")
    add("--steps", type=int, default=36, metavar="N", help="iterations; 24 are a full turn of W6 (default: 36)")
    text = "iterations at the start that are replayed but not counted (default: 4)"
    add("--warmup", type=int, default=4, metavar="N", help=text)
    text = "of an iteration, in the corrected series; a compatible step is one micro-batch (default: 4)"
    add("--micro-batches", type=int, default=4, metavar="M", help=text)
    add("--spare-slots", type=int, default=2, metavar="K", help="replica slots per rank (default: 2)")
    text = "move homes every N iterations: smartmoe, smartmoe2023, lpt, eplb; 0: smartmoe never (default: 8)"
    add("--homes-interval", type=int, default=8, metavar="N", help=text)
    add("--hidden", type=int, default=4096, help="model hidden size (default: 4096)")
    add("--ffn", type=int, default=1536, help="intermediate size of one expert (default: 1536)")
    add("--seed", type=int, default=1234, help="of all draws (default: 1234)")
    add("--jobs", type=int, metavar="N", help="processes side by side (default: one per CPU, or 1 for a short replay)")
    add("--jsonl", type=Path, metavar="FILE", help="write one row per workload, cluster and rule")
    add("--markdown", type=Path, metavar="FILE", help="write the tables as Markdown")
    text = "write every workload as a routing trace (.npz), to simulate, plan or train with it"
    add("--save-traces", type=Path, metavar="DIR", help=text)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Run the tool."""
    # Step 1: check everything before the first draw.
    clusters = _checked(options)
    chosen = _workloads(options)
    names = _policies() if options.policy is None else options.policy.split(",")
    for name in names:
        if name not in _policies():
            raise ConfigError("--policy", name, "is not a known policy", f"Known: {', '.join(_policies())}.")
    sizes = BenchSizes(
        num_experts=options.experts,
        top_k=options.top_k,
        tokens=options.tokens,
        num_ranks=options.ep,
        steps=options.steps,
        micro_batches=options.micro_batches,
        seed=options.seed,
    )
    # Step 2: every workload through every rule on every cluster.
    ours = sum(name in (HOMES, *OURS) for name in names)
    kernels = kernels_for(len(chosen) * len(clusters) * ours * options.steps * options.micro_batches, options.ep)
    counter = Value("q", 0)
    tasks = [
        partial(_rows, options, sizes, kernels, clusters, names, series, workload, counter)
        for series, workload in chosen
    ]
    total = len(chosen) * len(clusters) * len(names)
    jobs = options.jobs or default_jobs(total * options.steps * options.micro_batches)
    found = run_tasks(tasks, jobs=jobs, flag="--jobs", total=total, unit="replay", done=counter)
    rows = [one for of_workload in found for one in of_workload]
    # Step 3: tables and files.
    print(as_text(rows))
    if options.jsonl:
        options.jsonl.write_text("".join(json.dumps(one, sort_keys=True) + "\n" for one in rows), encoding="utf-8")
    if options.markdown:
        options.markdown.write_text(as_markdown(rows), encoding="utf-8")
    return 0


def _rows(
    options: argparse.Namespace,
    sizes: BenchSizes,
    kernels: Kernels,
    clusters: dict[str, ClusterSpec],
    names: Sequence[str],
    series: Series,
    workload: str,
    counter: Synchronized[int],
) -> list[dict[str, Any]]:
    """One workload through every rule on every cluster."""
    rows: list[dict[str, Any]] = []
    case = make_case(series, workload, sizes)
    if options.save_traces:
        case.trace.save(options.save_traces / f"{workload}.npz")
    for named, cluster in clusters.items():
        prices = _prices(options, cluster, case)
        even = setup_of(prices, spare_slots=0, warmup=options.warmup)
        even_ms = float(even_load_s(case.trace, even).mean()) * 1e3
        for name in names:
            spare_slots = 0 if name == HOMES else options.spare_slots
            setup = setup_of(prices, spare_slots=spare_slots, warmup=options.warmup, kernels=kernels)
            result = replay(case.trace, _policy(name, options, setup, prices), setup)
            result_row = row(case, sizes, setup, named, result)
            rows.append({**result_row, "backend": name, "even_load_ms": even_ms})
            add_one(counter)
    return rows


def _policies() -> list[str]:
    return [HOMES, *OURS, *by_name()]


def _checked(options: argparse.Namespace) -> dict[str, ClusterSpec]:
    """The clusters, after every number and place is checked."""
    for name, least in _LEAST.items():
        value, flag = getattr(options, name), "--" + name.replace("_", "-")
        if value is not None and not least <= value <= _MOST.get(name, 10**6):
            rule = f"must be from {least} to {_MOST.get(name, 10**6):,}"
            raise ConfigError(flag, value, rule, f"For example: {flag} {max(least, 1)}.")
    if options.warmup >= options.steps:
        rule = f"leaves none of the {options.steps} steps"
        raise ConfigError("--warmup", options.warmup, rule, f"For example: --warmup {options.steps // 5 or 1}.")
    most = options.experts - options.experts // options.ep
    if options.spare_slots > most:
        rule = f"must be at most {most}, the experts of the other ranks"
        raise ConfigError("--spare-slots", options.spare_slots, rule, "1 or 2 is usually enough.")
    for flag, path in (("--jsonl", options.jsonl), ("--markdown", options.markdown)):
        check_folder(flag, path)
    if options.save_traces is not None and not os.path.isdir(options.save_traces):
        place = options.save_traces
        raise ConfigError("--save-traces", str(place), "is not a directory", f"Run mkdir -p {place}.")
    clusters = {name: load_cluster_spec(Path(name)) for name in options.cluster.split(",")}
    for cluster in clusters.values():
        if options.ep % cluster.nodes_of_group(options.ep):
            rule = f"must be spread evenly over the {cluster.nodes_of_group(options.ep)} nodes of {cluster.name}"
            way_out = f"For example: --ep {cluster.gpus_per_node}."
            raise ConfigError("--ep", options.ep, rule, way_out)
    return clusters


def _workloads(options: argparse.Namespace) -> list[tuple[Series, str]]:
    known = [(series, name) for series, names in SERIES.items() for name in names]
    if options.workload is None:
        return [(series, name) for series, name in known if options.series in (series, "both")]
    wanted: Sequence[str] = options.workload.split(",")
    for name in wanted:
        if name not in dict(map(reversed, known)):  # type: ignore[arg-type]
            text = ", ".join(name for _, name in known)
            raise ConfigError("--workload", name, "is not a known workload", f"Known: {text}.")
    return [(series, name) for series, name in known if name in wanted]


def _prices(options: argparse.Namespace, cluster: ClusterSpec, case: Case) -> Prices:
    return Prices(
        cluster=cluster,
        expert=ExpertShape(hidden=options.hidden, ffn=options.ffn),
        num_ranks=options.ep,
        num_nodes=cluster.nodes_of_group(options.ep),
        micro_batches=case.trace.counts.shape[3],
        rank_tokens=rank_tokens(case.trace, options.ep),
    )


def _policy(name: str, options: argparse.Namespace, setup: SimulationSetup, prices: Prices) -> SimulatedPolicy:
    placement = Placement.contiguous(
        num_layers=1, num_experts=options.experts, num_ranks=options.ep, spare_slots=setup.spare_slots
    )
    if name == HOMES or name in OURS:
        mode = OURS.get(name, "history")
        return own_policy(mode, placement, 1, setup, prices, homes_interval=options.homes_interval)
    # what moves experts with their optimizer's state does so as seldom as ours, and every step nowhere
    seldom = name in MOVING_HOMES and options.homes_interval
    return peer_policy(name, placement, 1, setup, interval=options.homes_interval if seldom else 1)
