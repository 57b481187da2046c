"""`smartmoe simulate`: how well each placement policy would have balanced a recorded routing trace.

The trace is replayed through every policy; a table and JSON say how balanced the ranks were, what moved, and how long a
layer would have taken. `--save-decisions` writes every decision of the smartmoe policy; `--replay` runs again with the
options in such a file and compares the decisions line by line. `--replay` with a run directory makes the decisions of
that training again, and compares them with its logs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

from megatron_smartmoe.cli import simulate_routing
from megatron_smartmoe.cli.kernels import kernels_for
from megatron_smartmoe.cli.outputs import check_folder, check_plot
from megatron_smartmoe.cli.policies import own_policy, peer_policy, setup_of
from megatron_smartmoe.cli.simulate_prices import DEFAULT_CLUSTER, Prices, rank_tokens
from megatron_smartmoe.cli.simulate_table import Simulated, as_json, as_table
from megatron_smartmoe.cost.compute import ExpertShape
from megatron_smartmoe.cost.moe_layer import ALL_TO_ALLS, APART_EXCHANGES, exchanges_of
from megatron_smartmoe.errors import ConfigError
from megatron_smartmoe.simulate.baselines import by_name
from megatron_smartmoe.simulate.jobs import Entrant, compare
from megatron_smartmoe.simulate.policies import SimulatedPolicy
from megatron_smartmoe.simulate.run import PolicyResult, SimulationSetup
from megatron_smartmoe.spec.cluster import ClusterSpec, load_cluster_spec
from megatron_smartmoe.spec.model import ModelSpec, load_model_spec
from megatron_smartmoe.spec.placement import Placement
from megatron_smartmoe.spec.readers import values
from megatron_smartmoe.spec.readers.files import Named
from megatron_smartmoe.spec.readers.json_text import read_json_lines
from megatron_smartmoe.spec.trace import RoutingTrace, load_trace

_REPLAY_MODULE = "megatron_smartmoe.runtime.decisions"  # started, not imported: it imports torch

# Options that decide the result; a decision file repeats them.
_SETTINGS = ("ep", "spare_slots", "nodes", "homes_interval", "replicas", "warmup", "hidden", "ffn", "cluster")
_MARGIN = "replicas_margin"  # likewise, but files of before it existed lack it: they have the first version's prices
_GATED = "gated"  # of the model's experts; not an option of its own
_EXCHANGES = "exchanges"  # likewise: files of before it existed were made with rows and weights apart
_REPLANS = "replans"  # whether what `auto` planned anew is among the decisions; not so in files of earlier versions
_SUSPENDS = "suspends"  # whether `auto` may suspend replicas from history; not so in files of earlier versions
_MOST_MARGIN = 1000.0
_OURS = "smartmoe"

_LEAST = {
    "ep": 1,
    "nodes": 1,
    "trace_experts": 1,
    "trace_stages": 1,
    "spare_slots": 0,
    "homes_interval": 0,
    "peers_interval": 1,
    "warmup": 0,
    "hidden": 1,
    "ffn": 1,
    "top_k": 1,
    "jobs": 1,
}

_MOST = {
    "ep": 65_536,
    "nodes": 65_536,
    "trace_experts": 65_536,
    "spare_slots": 1000,
    "jobs": 1024,
}  # a typing error beyond these
_MOST_OF_ANY = 10**9


def add_parser(tools: Any) -> None:
    """Add the subcommand to the parser of the tools."""
    parser = tools.add_parser("simulate", help="replay a routing trace through placement policies", description=__doc__)
    add = parser.add_argument
    text = (
        "routing trace or expert load: .npz, the directory of Megatron's --moe-routing-trace-path, a record of SGLang "
    )
    add("--trace", type=Path, help=text + "or vLLM, a matrix of EPLB (.npy, .json, .pt, .csv)")
    text = "Megatron trace: ranks to read, such as 0-7,16, those whose tokens are their own (default: all)"
    add("--trace-ranks", type=_ranks, metavar="LIST", help=text)
    text = "Megatron trace: pipeline stages that the ranks belong to (default: told apart by their layers)"
    add("--trace-stages", type=int, metavar="N", help=text)
    text = "Megatron trace: number of experts (default: highest seen plus one, rounded up to a multiple of 8)"
    add("--trace-experts", type=int, metavar="E", help=text)
    add("--save-trace", type=Path, metavar="FILE", help="write the trace as .npz, to plan or to train with it")
    add("--ep", type=int, help="ranks of an expert-parallel group; source ranks form groups of this many")
    add("--spare-slots", type=int, default=0, metavar="K", help="replica slots per rank (default: 0)")
    text = "nodes of a group; with several, replicas stay on their home's node (default: from --cluster, else 1)"
    add("--nodes", type=int, metavar="N", help=text)
    text = "re-evaluate the homes every N training iterations; 0 never moves them (default: 100)"
    add("--homes-interval", type=int, default=100, metavar="N", help=text)
    text = "what smartmoe plans replicas from: history: earlier records; exact: each micro-batch's own counts; auto: "
    text += (
        "history, and anew from the counts where that leaves a rank more than 1%% above the mean and new replicas pay "
    )
    text += "(default: auto, as in training)"
    add("--replicas", choices=("history", "exact", "auto"), default="auto", help=text)
    text = (
        "a replica of smartmoe must save this many times what it costs, as --smartmoe-replicas-margin; 0 makes every "
    )
    text += "replica that improves the balance (default: 1)"
    add("--replicas-margin", type=float, default=1.0, metavar="M", help=text)
    add("--policy", default="smartmoe", help="smartmoe, a peer's name, several with commas, or all (default: smartmoe)")
    text = "training iterations between two plans of a peer that plans from history (default: 1: every record)"
    add("--peers-interval", type=int, default=1, metavar="N", help=text)
    text = "first records that are replayed but not counted (default: 25, or a fifth of a shorter trace)"
    add("--warmup", type=int, metavar="RECORDS", help=text)
    text = "machine for predicted times and prices, a file or the name of a shipped one (default: H100, 8 per node)"
    add("--cluster", type=Path, metavar="YAML", help=text)
    text = "model whose hidden and expert sizes are priced, a file or the name of a shipped one"
    add("--model", type=Path, metavar="YAML", help=text)
    add("--hidden", type=int, help="model hidden size (default: of --model, else 4096)")
    add("--ffn", type=int, help="intermediate size of one expert (default: of --model, else 1536)")
    simulate_routing.add_arguments(parser)
    add("--jobs", type=int, metavar="N", help="processes side by side (default: one per CPU, or 1 for a short replay)")
    add("--json", type=Path, metavar="FILE", help="write the table's numbers as JSON")
    add(
        "--plot", type=Path, metavar="FILE", help="plot the distribution of imbalance of each policy (.svg, .png, .pdf)"
    )
    add("--save-decisions", type=Path, metavar="FILE", help="write the decisions of smartmoe as JSONL")
    text = "make the decisions of a run again, whose directory this is, from its trace and the prices of then; or "
    text += "rerun with the options in a file of --save-decisions. Exit status 1 where a decision differs"
    add("--replay", type=Path, metavar="RUN|FILE", help=text)
    text = "with --replay RUN: how to print what was reproduced (default: text)"
    add("--format", choices=("text", "json"), default="text", help=text)
    parser.set_defaults(run=run, gated=True, replans=True, suspends=True, exchanges=None)


def run(options: argparse.Namespace) -> int:
    """Run the tool; 1 when a replay differs."""
    if options.replay is not None and options.replay.is_dir():
        return _replay_run(options)
    if options.trace is None:
        raise ConfigError("--trace", None, "is required: the routing to replay", "For example: --trace trace.npz.")
    if options.format != "text":
        raise ConfigError("--format", options.format, "is for --replay RUN", "Pass --json FILE for numbers.")
    saved = _read_decisions(options) if options.replay else None
    # Step 1: check everything that takes no time, then read the trace.
    if options.ep is None:
        raise ConfigError("--ep", None, "is required: the ranks of an expert-parallel group", "For example: --ep 8.")
    _check_outputs(options)
    trace = load_trace(
        options.trace, num_experts=options.trace_experts, ranks=options.trace_ranks, stages=options.trace_stages
    )
    cluster = load_cluster_spec(Path(options.cluster)) if options.cluster else DEFAULT_CLUSTER
    model = load_model_spec(options.model) if options.model else None
    priced = _expert_sizes(options, model)
    prices = _prices(options, trace, cluster, model, first_version=saved is not None and _MARGIN not in saved[0])
    setup = _setup(options, trace, prices)
    if options.save_trace:
        trace.save(options.save_trace)
    # Step 2: replay it through every policy.
    compared = compare(trace, _entrants(options, trace, setup, prices), setup, jobs=options.jobs)
    simulated = Simulated(
        results=compared.results,
        bounds=compared.bounds,
        even_s=compared.even_s,
        limit_s=compared.limit_s,
        setup=setup,
        trace=trace,
        prices=prices,
        priced=priced,
        replicas=options.replicas,
    )
    # Step 3: table, files, and the comparison with a saved replay.
    print(as_table(simulated))
    if options.json:
        options.json.write_text(json.dumps(as_json(simulated), indent=2) + "\n")
    if options.plot:
        from megatron_smartmoe.cli.simulate_plot import draw  # matplotlib is slow to import

        draw(simulated, options.plot)
    if saved is None and options.save_decisions is None:
        return 0
    lines = _decision_lines(options, trace, prices, compared.results)
    if options.save_decisions:
        options.save_decisions.write_text("\n".join(lines) + "\n")
    return _compare(saved, lines) if saved is not None else 0


def _replay_run(options: argparse.Namespace) -> int:
    """Make a run's decisions again, in a process with torch: training's own planners are compiled."""
    trace = ["--trace", str(options.trace)] if options.trace is not None else []
    argv = [str(options.replay), "--format", options.format, *trace]
    return subprocess.run([sys.executable, "-m", _REPLAY_MODULE, *argv], check=False).returncode


def _ranks(text: str) -> list[int]:
    """`0-3,8` -> [0, 1, 2, 3, 8]."""
    ranks: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        if not first.isdecimal() or (last and not last.isdecimal()) or (part.endswith("-")):
            raise argparse.ArgumentTypeError(f"{text!r}: must be ranks and ranges of them, such as 0-7,16")
        ranks += range(int(first), int(last or first) + 1)
    return ranks


def _check_outputs(options: argparse.Namespace) -> None:
    """Check that every output can be written, before minutes of replay."""
    check_folder("--json", options.json)
    check_plot(options.plot, "imbalance.svg")
    check_folder("--save-decisions", options.save_decisions)
    check_folder("--save-trace", options.save_trace)
    if options.save_trace is not None and options.save_trace.suffix != ".npz":
        way_out = f"Pass {options.save_trace}.npz."
        raise ConfigError("--save-trace", str(options.save_trace), "must end in .npz", way_out)


def _expert_sizes(options: argparse.Namespace, model: ModelSpec | None) -> str:
    """Fill in --hidden and --ffn, and say where they are from."""
    if model is not None:
        options.gated = model.gated
    sizes = {"hidden": model.hidden, "ffn": model.moe.ffn} if model else {"hidden": 4096, "ffn": 1536}
    given = [name for name in sizes if getattr(options, name) is not None]
    for name, value in sizes.items():
        if name not in given:
            setattr(options, name, value)
    if len(given) == len(sizes):
        return "of --hidden and --ffn"
    of = model.name if model else "assumed; --model names another"
    return f"{of}, but --{given[0]}" if given else of


def _prices(
    options: argparse.Namespace,
    trace: RoutingTrace,
    cluster: ClusterSpec,
    model: ModelSpec | None,
    *,
    first_version: bool,
) -> Prices:
    """The price list, after the options that decide it are checked."""
    _check_numbers(options)
    num_nodes = options.nodes or (cluster.nodes_of_group(options.ep) if options.cluster else 1)
    if options.ep % num_nodes:
        raise ConfigError(
            "--nodes", num_nodes, f"must divide --ep {options.ep}", "Every node has as many ranks: --nodes 1."
        )
    dispatcher = simulate_routing.dispatcher_of(options, trace, model, num_nodes)
    slots = trace.num_experts // options.ep + options.spare_slots
    return Prices(
        cluster=cluster,
        dispatcher=dispatcher,
        exchanges=options.exchanges or exchanges_of(dispatcher.name, ranks=options.ep, slots=slots),
        num_groups=simulate_routing.groups_of(options, trace, model),
        expert=ExpertShape(hidden=options.hidden, ffn=options.ffn, gated=options.gated),
        num_ranks=options.ep,
        num_nodes=num_nodes,
        micro_batches=trace.counts.shape[3] if trace.has_micro_batches else 1,
        rank_tokens=rank_tokens(trace, options.ep),
        margin=0.0 if first_version else options.replicas_margin,
        first_version=first_version,
    )


def _check_numbers(options: argparse.Namespace) -> None:
    """Numbers that are wrong whatever the trace is."""
    for flag, least in _LEAST.items():
        if getattr(options, flag) is not None and getattr(options, flag) < least:
            name = "--" + flag.replace("_", "-")
            raise ConfigError(
                name, getattr(options, flag), f"must be at least {least}", f"For example: {name} {max(least, 1)}."
            )
        most = _MOST.get(flag, _MOST_OF_ANY)
        if getattr(options, flag) is not None and getattr(options, flag) > most:
            name = "--" + flag.replace("_", "-")
            raise ConfigError(name, getattr(options, flag), f"must be at most {most:,}", f"For example: {name} 8.")
    if not 0 <= options.replicas_margin <= _MOST_MARGIN:
        rule = f"must be from 0 to {_MOST_MARGIN:,.0f}"
        raise ConfigError("--replicas-margin", options.replicas_margin, rule, "For example: --replicas-margin 1.")


def _setup(options: argparse.Namespace, trace: RoutingTrace, prices: Prices) -> SimulationSetup:
    if options.warmup is None:
        options.warmup = min(25, trace.num_records // 5)
    if options.warmup >= trace.num_records:
        rule = f"leaves none of the trace's {trace.num_records} records"
        raise ConfigError("--warmup", options.warmup, rule, f"For example: --warmup {trace.num_records // 5}.")
    if not trace.counts[options.warmup :].any():
        rule = "leaves records without any assignment"
        raise ConfigError("--warmup", options.warmup, rule, "For example: --warmup 0.")
    if trace.num_experts % options.ep:
        rule = f"must divide the trace's {trace.num_experts} experts"
        raise ConfigError(
            "--ep", options.ep, rule, f"Every rank has as many experts: --ep {math.gcd(trace.num_experts, options.ep)}."
        )
    most = trace.num_experts - trace.num_experts // options.ep
    if options.spare_slots > most:
        rule = f"must be at most {most}, the experts of the other ranks"
        raise ConfigError("--spare-slots", options.spare_slots, rule, "1 or 2 is usually enough.")
    plans = trace.counts.size // (trace.num_experts * min(trace.num_sources, options.ep))
    kernels = kernels_for(plans, options.ep)
    return setup_of(prices, spare_slots=options.spare_slots, warmup=options.warmup, kernels=kernels)


def _entrants(
    options: argparse.Namespace, trace: RoutingTrace, setup: SimulationSetup, prices: Prices
) -> list[Entrant]:
    """The policies that --policy names."""
    rules = by_name()
    names = [_OURS, *rules] if options.policy == "all" else options.policy.split(",")
    for name in names:
        if name != _OURS and name not in rules:
            known = ", ".join([_OURS, *rules, "all"])
            raise ConfigError("--policy", name, "is not a known policy", f"Known: {known}.")
    num_groups = max(1, trace.num_sources // setup.num_ranks)

    def policy(name: str, num_layers: int) -> SimulatedPolicy:
        placement = Placement.contiguous(
            num_layers=num_layers,
            num_experts=trace.num_experts,
            num_ranks=setup.num_ranks,
            spare_slots=setup.spare_slots,
        )
        if name == _OURS:
            return own_policy(
                options.replicas,
                placement,
                num_groups,
                setup,
                prices,
                homes_interval=options.homes_interval,
                may_suspend=options.suspends,
            )
        return peer_policy(name, placement, num_groups, setup, interval=options.peers_interval)

    return [Entrant(make=partial(policy, name), layers_apart=name != _OURS) for name in names]


def _decision_lines(
    options: argparse.Namespace, trace: RoutingTrace, prices: Prices, results: list[PolicyResult]
) -> list[str]:
    """A line with the options, then one per decision; none of them depends on the time of day."""
    settings = {name: getattr(options, name) for name in _SETTINGS}
    settings["cluster"] = str(options.cluster) if options.cluster else None
    if not prices.first_version:
        settings |= {_MARGIN: options.replicas_margin, _GATED: options.gated, _EXCHANGES: prices.exchanges}
    settings |= simulate_routing.settings(prices.dispatcher, prices.num_groups)
    if options.replans and options.replicas == "auto":
        settings[_REPLANS] = True
    if options.suspends and options.replicas == "auto":
        settings[_SUSPENDS] = True
    header = {"kind": "simulation", "trace": _digest(trace), **settings}
    decisions = [
        decision
        for result in results
        if result.name == _OURS
        for decision in result.decisions
        if decision.kind != "replans" or options.replans
    ]
    return [json.dumps(header, sort_keys=True), *(decision.to_line() for decision in decisions)]


def _digest(trace: RoutingTrace) -> str:
    digest = hashlib.sha256(f"{trace.counts.shape}".encode())
    for counts in trace.counts:  # record by record: a copy of a large trace does not fit beside it
        digest.update(counts.astype("<u4").tobytes())
    return digest.hexdigest()[:16]


def _read_decisions(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The saved lines; `options` take the values that they were made with.

    Raises:
        ConfigError: the file cannot be read, a line is not a decision, or an option in it is not of its type.
    """
    named = Named(path=options.replay, field="--replay", way_out="Make one with --save-decisions.")
    lines = []
    for number, value, text in read_json_lines(named):
        if not isinstance(value, dict):
            line = text[:100].decode(errors="backslashreplace").strip()
            raise ConfigError(named.at(number), line, "is not a decision: it is no JSON object", named.way_out)
        lines.append(value)
    if not lines or any(name not in lines[0] for name in _SETTINGS):
        raise named.refused("is not a decision file: its first line lacks the options of the simulation")
    for name in _SETTINGS:
        setattr(options, name, _setting(lines[0][name], name, f"{named.at(1)}: {name}"))
    if _MARGIN in lines[0]:
        margin = lines[0][_MARGIN]
        if isinstance(margin, bool) or not isinstance(margin, int | float) or not 0 <= margin <= _MOST_MARGIN:
            field = f"{named.at(1)}: {_MARGIN}"
            raise ConfigError(field, margin, f"must be from 0 to {_MOST_MARGIN:,.0f}", "Make the file again.")
        options.replicas_margin, options.gated = float(margin), lines[0].get(_GATED, True) is not False
    options.replans, options.suspends = (lines[0].get(name, False) is True for name in (_REPLANS, _SUSPENDS))
    found = lines[0].get(_EXCHANGES, APART_EXCHANGES)
    options.exchanges = values.whole(found, f"{named.at(1)}: {_EXCHANGES}", least=ALL_TO_ALLS, most=APART_EXCHANGES)
    simulate_routing.take(lines[0], options, f"{named.at(1)}: ")
    options.policy, options.model = "smartmoe", None
    return lines


def _setting(value: object, name: str, field: str) -> Any:
    """An option in a decision file, of the type that the command line gives it."""
    if name == "replicas":
        if value not in ("history", "exact", "auto"):
            raise ConfigError(field, value, "must be history, exact or auto", "Make the file again.")
        return value
    if name == "cluster":
        return None if value is None else Path(values.text(value, field, example="h100-sxm"))
    if value is None and name in ("nodes", "warmup"):
        return None
    return values.whole(value, field, least=_LEAST[name], most=_MOST.get(name, _MOST_OF_ANY))


def _compare(saved: list[dict[str, Any]], lines: list[str]) -> int:
    """Print whether the replay made the same decisions, or the first line that differs; returns the exit status.

    Files of earlier versions are read too: they have the reason in other words, and less about a decision.
    """
    made = [json.loads(line) for line in lines]
    for number, (old, new) in enumerate(zip(saved, made, strict=False), 1):
        if any(value != new.get(key) for key, value in old.items() if key != "why"):
            what = "the trace or the options" if number == 1 else f"decision {number - 1}"
            texts = [json.dumps(one, sort_keys=True)[:200] for one in (old, new)]
            print(f"replay: line {number} differs ({what})\n  saved:  {texts[0]}\n  replay: {texts[1]}")
            return 1
    if len(saved) != len(lines):
        print(f"replay: {len(saved) - 1} decisions saved, {len(lines) - 1} made")
        return 1
    print(f"replay: all {len(lines) - 1} decisions reproduced")
    return 0
