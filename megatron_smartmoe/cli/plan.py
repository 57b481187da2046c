"""`smartmoe plan`: which launch of a model on a cluster trains fastest under an uneven load of its experts.

It reads the model and the cluster, takes the load from a trace, a skew, or what the model's router suggests, searches
the space of launches, and prints the best few with their breakdown, why others are slower, and the flags to paste.
`--explain` describes one launch instead: the best one, or the one of your own Megatron flags.
"""

from __future__ import annotations

import argparse
import json
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_smartmoe.cli.plan_table import as_table, beside_plain, breakdown, rejections
from megatron_smartmoe.errors import ConfigError
from megatron_smartmoe.planner.alternatives import alternatives
from megatron_smartmoe.planner.explain import explain, why
from megatron_smartmoe.planner.flags import megatron_flags, parallel_from_flags
from megatron_smartmoe.planner.load import SKEWS, LoadModel, scenarios_of
from megatron_smartmoe.planner.plain import plain_space, search_beside_plain
from megatron_smartmoe.planner.plan_json import as_json
from megatron_smartmoe.planner.pool import make_pool
from megatron_smartmoe.planner.pricing import Pricing
from megatron_smartmoe.planner.space import SpaceOptions
from megatron_smartmoe.spec.cluster import ClusterSpec, load_cluster_spec
from megatron_smartmoe.spec.model import ModelSpec, load_model_spec
from megatron_smartmoe.spec.parallel import violation


def add_parser(tools: Any) -> None:
    """Describe the command line."""
    parser = tools.add_parser("plan", help="find the parallel strategy of a model on a cluster", description=__doc__)
    add = parser.add_argument
    text = "model file, or the name of a shipped one (configs/models/), such as mixtral-8x7b"
    add("--model", type=Path, required=True, metavar="YAML", help=text)
    text = "cluster file, or the name of a shipped one (configs/clusters/), such as h100-sxm"
    add("--cluster", type=Path, required=True, metavar="YAML", help=text)
    add("--gpus", type=int, metavar="N", help="GPUs of the job (default: all of the cluster file)")
    add("--global-batch-size", type=int, metavar="N", help="samples of one step (default: the model file's)")
    add("--seq-length", type=int, metavar="N", help="tokens of one sample (default: the model file's)")
    load = parser.add_mutually_exclusive_group()
    load.add_argument("--trace", type=Path, help="routing trace or expert load of this model (formats: docs/traces.md)")
    text = f"hottest expert's load over the mean, or {', '.join(SKEWS)} (default: from how the router is balanced)"
    load.add_argument("--skew", metavar="S", help=text)
    add("--rank-by", choices=("expected", "worst"), default="expected", help="step time to rank by (default: expected)")
    add("--top", type=int, default=5, metavar="N", help="plans to print (default: 5)")
    text = "expert placement is re-evaluated every N iterations; 0 plans without moving experts (default: 100)"
    add("--homes-interval", type=int, default=100, metavar="N", help=text)
    add("--no-spare-slots", action="store_true", help="plan without replicas")
    add("--no-overlap", action="store_true", help="plan without overlapping the all-to-all")
    text = "describe one launch: the best, or the one of your Megatron flags, in quotes"
    add("--explain", nargs="?", const="", metavar="FLAGS", help=text)
    add("--json", type=Path, metavar="FILE", help="write the whole result to this file")
    add(
        "--pool",
        type=Path,
        metavar="FILE",
        help="write the settings that the best launch can switch between while it runs, for --smartmoe-pool",
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Run the tool."""
    model, cluster, gpus = _request(options)
    scenarios = scenarios_of(model, options.trace, options.skew)
    loads = LoadModel(scenarios, cluster, model.moe.routing_groups)
    pricing, default = Pricing(model, cluster, loads), SpaceOptions()
    space = SpaceOptions(
        spare_slots=(0,) if options.no_spare_slots else default.spare_slots,
        overlap_degrees=(1,) if options.no_overlap else default.overlap_degrees,
        homes_interval=options.homes_interval,
    )
    if options.explain:
        return _explain_flags(options, pricing, space, gpus)
    limit = max(10, options.top)
    result, plain = search_beside_plain(pricing, gpus, space, limit=limit, rank=options.rank_by)
    del result.best[options.top :]
    best, flags = result.best[0], [megatron_flags(model, launch.spec) for launch in result.best]
    pool = make_pool(best, pricing, space if best.spec.smartmoe else plain_space(space))
    print(_headline(model, cluster, gpus, pricing))
    if options.explain is not None:
        print(explain(best, pricing, result.best[1] if len(result.best) > 1 else None))
    else:
        print(as_table(result, pricing, plain))
        print(f"\n{beside_plain(best, plain, options.rank_by)}")
        print(f"\n1: {best.spec.label()}\n{breakdown(best, pricing)}")
    print("\nWhy not another:")
    print("\n".join("  " + line for line in why(best, alternatives(best, pricing), pricing)))
    paste = " \\\n".join("  " + line for line in flags[0].lines())
    print(f"\n{rejections(result)}\n\nFlags of 1:\n{paste}")
    print(f"\nsearched in {result.seconds:.1f} s; {_ground(cluster)}")
    if options.json:
        question = {"model": str(options.model), "cluster": str(options.cluster), "gpus": gpus}
        content = as_json(result, pricing, flags, pool, question, plain)
        options.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    if options.pool:
        pool.save(options.pool)
    return 0


def _request(options: argparse.Namespace) -> tuple[ModelSpec, ClusterSpec, int]:
    """Model, cluster and number of GPUs, as the command line changes them."""
    model, cluster = load_model_spec(options.model), load_cluster_spec(options.cluster)
    for flag, name in (("--global-batch-size", "global_batch"), ("--seq-length", "seq_length")):
        value = getattr(options, flag.removeprefix("--").replace("-", "_"))
        if value is not None:
            if value < 1:
                raise ConfigError(flag, value, "must be at least 1", "Remove it for the model file's.")
            model = replace(model, **{name: value})
    gpus = cluster.nodes * cluster.gpus_per_node if options.gpus is None else options.gpus
    if gpus < 1:
        raise ConfigError("--gpus", gpus, "must be at least 1", "Remove it for all of the cluster file.")
    if gpus > cluster.gpus_per_node and gpus % cluster.gpus_per_node:
        rule = f"must fill whole nodes of {cluster.gpus_per_node}"
        raise ConfigError("--gpus", gpus, rule, f"Use {gpus // cluster.gpus_per_node * cluster.gpus_per_node}.")
    if options.top < 1:
        raise ConfigError("--top", options.top, "must be at least 1", "Remove it for 5.")
    if options.homes_interval < 0:
        raise ConfigError(
            "--homes-interval", options.homes_interval, "must be at least 0", "Pass 0 to never move experts."
        )
    nodes = -(-gpus // cluster.gpus_per_node)
    return model, replace(cluster, nodes=nodes), gpus


def _ground(cluster: ClusterSpec) -> str:
    """Where the predicted times come from."""
    if "gemm" in cluster.efficiency:
        return f"times are predicted from the measurements in the cluster file {cluster.name}"
    return "times are predicted from datasheets and estimates; smartmoe calibrate measures a machine"


def _headline(model: ModelSpec, cluster: ClusterSpec, gpus: int, pricing: Pricing) -> str:
    loads = "; ".join(f"{scenario.name} ({scenario.weight:.0%})" for scenario in pricing.loads.scenarios)
    batch = f"{model.global_batch} x {model.seq_length} tokens per step"
    notes = "".join(f"note: {note}\n" for note in pricing.loads.scenarios[0].notes)
    return f"{model.name} on {gpus} x {cluster.gpu.name}, {batch}\nload: {loads}\n{notes}"


def _explain_flags(options: argparse.Namespace, pricing: Pricing, space: SpaceOptions, gpus: int) -> int:
    """Describe the launch of the user's own flags, compared with the best one."""
    spec = parallel_from_flags(shlex.split(options.explain), pricing.model, gpus)
    reason = violation(pricing.model, spec)
    if reason:
        raise ConfigError(
            "--explain", spec.label(), f"Megatron refuses it: {reason}", "Change the sizes that this names."
        )
    pricing = Pricing(
        replace(pricing.model, global_batch=spec.global_batch), pricing.cluster, pricing.loads, pricing.constants
    )
    launch = pricing.price(spec)
    best = search_beside_plain(pricing, gpus, space, rank=options.rank_by)[0].best[0]
    print(_headline(pricing.model, pricing.cluster, gpus, pricing))
    print(explain(launch, pricing, best))
    return 0
