"""`smartmoe whatif`: step time, memory and traffic of settings that a run never had, predicted from its own routing.

The run's recorded counts are replayed under every setting and priced with the cost model, whose terms are fitted to the
run's measured steps. Every prediction has an error bar: how far off the run's own steps are from the fit, and how
little one run tells about terms that it held constant. Several lists are combined, each value with each of the others'.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
from tqdm import tqdm

from megatron_smartmoe.cli.kernels import kernels_for
from megatron_smartmoe.cli.outputs import check_folder, check_plot
from megatron_smartmoe.cli.policies import own_policy, setup_of
from megatron_smartmoe.cli.simulate_prices import Prices, rank_tokens
from megatron_smartmoe.cli.whatif_table import Basis, Prediction, as_json, as_table, label
from megatron_smartmoe.cost.memory.budget import memory_budget
from megatron_smartmoe.cost.step.constants import StepConstants, exchanges_of_launch, expert_shape, spec_nodes
from megatron_smartmoe.cost.step.moe import dispatcher_of
from megatron_smartmoe.errors import ConfigError, PlanError
from megatron_smartmoe.placement.online_options import ReplicaMode
from megatron_smartmoe.report.fit import Fitted, busiest_s, fit_factors
from megatron_smartmoe.report.run_launch import RunLaunch, on_ranks, run_launch
from megatron_smartmoe.report.run_record import RunRecord, is_move, read_run, with_homes
from megatron_smartmoe.report.step_times import LEAST, StepTimes, step_times
from megatron_smartmoe.simulate.whatif import GROUPS, GROUPS_OF_PART, Machine, Move, Replayed, regrouped, replayed
from megatron_smartmoe.spec.arrays import FloatArray
from megatron_smartmoe.spec.cluster import ClusterSpec, load_cluster_spec
from megatron_smartmoe.spec.parallel import FLAT, ParallelSpec, Replicas, violation
from megatron_smartmoe.spec.placement import Placement
from megatron_smartmoe.spec.trace import RoutingTrace

REPLICAS = ("history", "exact", "auto")
BAR = 1.645  # standard deviations: nine of ten normally distributed errors are smaller
# Standard deviation of a group's factor around the machine's speed, before a step is seen. Estimates: matrix products
# are a stable share of a peak, launches and transfers differ by half and more.
SPREAD = {
    "tokens": 0.3,
    "weights": 0.7,
    "rows": 0.5,
    "layers": 0.7,
    "exchange": 0.5,
    "shared": 0.3,
    "replicas": 0.5,
    "dense": 0.3,
    "step": 0.5,
}
_MOST_SETTINGS = 256
_LEAST_VALUES = {"ep": 1, "spare_slots": 0, "homes_interval": 0, "micro_batch": 1, "nodes": 1}
_MOST_VALUE = 1_000_000


def add_parser(tools: Any) -> None:
    """Add the subcommand to the parser of the tools."""
    text = "predict a run's step time, memory and traffic under other settings"
    parser = tools.add_parser("whatif", help=text, description=__doc__)
    add = parser.add_argument
    add("run_dir", metavar="RUN", type=Path, help="run directory, with a routing trace (--smartmoe-record-trace)")
    add("--ep", type=_numbers, metavar="LIST", help="expert-parallel ranks, such as 8,16 (default: as the run)")
    add("--spare-slots", type=_numbers, metavar="LIST", help="replica slots per rank, such as 0,1,2")
    text = f"how replicas are planned: {', '.join(REPLICAS)}, with commas (default: as the run, else auto)"
    add("--replicas", type=_words, metavar="LIST", help=text)
    text = "re-evaluate the homes every N iterations, such as 0,50,500; 0 never moves them"
    add("--homes-interval", type=_numbers, metavar="LIST", help=text)
    add("--micro-batch-size", dest="micro_batch", type=_numbers, metavar="LIST", help="samples of a micro-batch")
    text = "nodes, with as many ranks each as the run has, and the same global batch"
    add("--nodes", type=_numbers, metavar="LIST", help=text)
    text = "other machines, with commas: cluster files or names of shipped ones"
    add("--cluster", type=_words, metavar="LIST", help=text)
    text = "machine that RUN ran on (default: its --smartmoe-cluster, else the shipped file for CPU ranks)"
    add("--run-cluster", type=Path, metavar="YAML", help=text)
    text = "routing trace of RUN (default: the one that --smartmoe-record-trace wrote)"
    add("--trace", type=Path, metavar="FILE", help=text)
    text = "CPU seconds of each rank, measured otherwise: a CSV file with the columns iteration,rank,seconds (default: "
    text += "what the run measured itself, account.jsonl, else the wall time in its log)"
    add("--step-times", type=Path, metavar="FILE", help=text)
    add("--records", type=int, default=200, metavar="N", help="replay the last N records of the trace (default: 200)")
    add("--json", type=Path, metavar="FILE", help="write the predictions as JSON")
    add("--plot", type=Path, metavar="FILE", help="plot the predicted step times (.svg, .png, .pdf)")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Run the tool."""
    # Step 1: the run, and the settings that were asked for; everything is checked before minutes of replay.
    check_folder("--json", options.json)
    check_plot(options.plot, "whatif.svg")
    record = read_run(options.run_dir, options.trace)
    launch = run_launch(record, options.run_cluster)
    trace = _trace(record, launch, options)
    times = step_times(record, options.run_dir, options.step_times, launch.spec)
    if times.by_rank and launch.spec.dispatch != FLAT:
        rule = "is not predicted from CPU seconds: what a rank passes on as a gateway has no term there"
        way_out = f"Give a run with --smartmoe-dispatch {FLAT}."
        raise ConfigError("--smartmoe-dispatch", launch.spec.dispatch, rule, way_out)
    settings, left_out = _settings(options, launch, trace)
    # Step 2: replay the run as it was, and fit the cost model's terms to its measured steps.
    own = Setting(spec=launch.spec, cluster=launch.cluster, is_other_machine=False)
    base = _replay(own, launch, trace, by_rank=times.by_rank, moves=_moves(record, launch, trace))
    fitted, residuals_MU = _fit(base, times, record)
    # Step 3: replay and price every setting.
    found = [_prediction(own, base, launch, fitted, residuals_MU)]
    for setting in settings:
        result = _replay(setting, launch, trace, by_rank=times.by_rank)
        found.append(_prediction(setting, result, launch, fitted, residuals_MU))
    basis = Basis(
        run=record.name,
        measured_s=float(np.median(times.seconds_MU.max(axis=1))),
        measurements=len(residuals_MU),
        by_rank=times.by_rank,
        fitted=fitted,
        groups=GROUPS,
        iterations=(int(base.iteration[0]), int(base.iteration[-1])),
        left_out=left_out,
        notes=[*filter(None, [times.note]), *_notes(trace, launch, settings)],
    )
    print(as_table(found, basis))
    if options.json:
        options.json.write_text(json.dumps(as_json(found, basis), indent=2) + "\n", encoding="utf-8")
    if options.plot:
        from megatron_smartmoe.cli.whatif_plot import draw  # matplotlib is slow to import

        draw(found, basis, options.plot)
    return 0


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What to predict.

    Attributes:
        spec: the launch.
        cluster: its machine, with its nodes.
        is_other_machine: whether the run ran on another.
    """

    spec: ParallelSpec
    cluster: ClusterSpec
    is_other_machine: bool


def _numbers(text: str) -> list[int]:
    """`0,1,2` -> [0, 1, 2], every number once."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and len(part) <= len(str(_MOST_VALUE)) for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r}: must be whole numbers with commas, such as 0,1,2")
    return list(dict.fromkeys(int(part) for part in parts))


def _words(text: str) -> list[str]:
    return list(dict.fromkeys(part.strip() for part in text.split(",")))


# --- checks


def _trace(record: RunRecord, launch: RunLaunch, options: argparse.Namespace) -> RoutingTrace:
    """The run's trace, cut to the records that are replayed, checked against what the run trained."""
    trace, model, spec = record.trace, launch.model, launch.spec
    if trace is None:
        rule = "has no routing trace, so it says nothing about other settings"
        way_out = "Record one with --smartmoe-record-trace FILE (it costs next to nothing), or name it with --trace."
        if record.notes:  # it was recorded, and is elsewhere now
            way_out = f"{record.notes[0][0].upper()}{record.notes[0][1:]}."
        raise ConfigError("RUN", record.name, rule, way_out)
    path = str(options.trace or record.arguments["smartmoe_record_trace"])
    least = LEAST + 1
    if options.records < least:
        raise ConfigError("--records", options.records, f"must be at least {least}", "For example: --records 200.")
    if trace.num_records < least:
        rule = f"has {trace.num_records} records: must have at least {least}"
        raise ConfigError("--trace", path, rule, "Train longer.")
    if trace.num_experts != model.moe.experts:
        rule = f"has {trace.num_experts} experts, the run {model.moe.experts}"
        raise ConfigError("--trace", path, rule, "Pass the trace of this run.")
    layers = sum(model.has_experts(layer) for layer in range(model.layers))
    if trace.num_layers != layers:
        rule = f"has {trace.num_layers} layers, and the run {layers} with experts"
        way_out = "Pass the trace of this run; prediction blocks and irregular patterns have no model."
        raise ConfigError("--trace", path, rule, way_out)
    expected = spec.global_batch * model.seq_length * model.moe.top_k
    counted = int(trace.counts[-1].sum(dtype=np.int64)) // trace.num_layers
    if abs(counted - expected) > expected // 100:
        rule = f"has {counted:,} assignments of a layer and iteration, and the run {expected:,}"
        way_out = "Pass the trace of this run; runs that drop tokens or whose batch grows cannot be replayed."
        raise ConfigError("--trace", path, rule, way_out)
    kept = slice(-options.records, None)
    return replace(trace, counts=trace.counts[kept], iteration=trace.iteration[kept])


def _settings(
    options: argparse.Namespace, launch: RunLaunch, trace: RoutingTrace
) -> tuple[list[Setting], dict[str, str]]:
    """Every combination of the lists, and those that cannot be, each with the rule that it breaks."""
    for name, least in _LEAST_VALUES.items():
        for value in getattr(options, name) or []:
            if not least <= value <= _MOST_VALUE:
                flag = "--micro-batch-size" if name == "micro_batch" else "--" + name.replace("_", "-")
                raise ConfigError(flag, value, f"must be from {least} to {_MOST_VALUE:,}", f"For example: {flag} 1.")
    for word in options.replicas or []:
        if word not in REPLICAS:
            way_out = f"Choose from {', '.join(REPLICAS)}; --spare-slots 0 is without replicas."
            raise ConfigError("--replicas", word, "is not a way of planning replicas", way_out)
    run, clusters = launch.spec, [(name, _machine(name, launch)) for name in options.cluster or []]
    lists = {
        "nodes": options.nodes or [None],
        "ep": options.ep or [run.ep],
        "spare_slots": [run.spare_slots] if options.spare_slots is None else options.spare_slots,
        "replicas": options.replicas or [run.replicas if run.replicas != "off" else "auto"],
        "homes_interval": [run.homes_interval] if options.homes_interval is None else options.homes_interval,
        "micro_batch": options.micro_batch or [run.micro_batch],
    }
    number = math.prod(map(len, lists.values())) * max(1, len(clusters))
    if number > _MOST_SETTINGS:
        rule = f"make {number:,} settings: must be at most {_MOST_SETTINGS}"
        raise ConfigError("the lists", None, rule, "Shorten them.")
    found: dict[tuple[ParallelSpec, str], Setting] = {}
    left_out: dict[str, str] = {}
    for (name, machine), values in itertools.product(clusters or [("", launch.cluster)], _products(lists)):
        spec = _spec(launch, values)
        cluster = on_ranks(machine, spec.gpus, values["nodes"])
        if spec_nodes(cluster, spec.ep * spec.etp) == 1:
            spec = replace(spec, dispatch=FLAT)
        reason = _cannot_be(spec, cluster, launch, trace)
        if cluster.gpus_per_node > machine.gpus_per_node:
            reason = f"{cluster.gpus_per_node} ranks on a node, and {machine.name} has {machine.gpus_per_node}"
        if reason:
            left_out[label(spec)] = reason
        elif name or spec != run:
            found[(spec, name)] = Setting(spec=spec, cluster=cluster, is_other_machine=bool(name))
    if not found:
        why = "; ".join(dict.fromkeys(left_out.values())) or "they are all the run's own"
        lists_given = "--ep, --spare-slots, --replicas, --homes-interval, --micro-batch-size, --nodes or --cluster"
        raise ConfigError("settings", None, f"there is none to predict: {why}", f"Pass others with {lists_given}.")
    return list(found.values()), left_out


def _machine(name: str, launch: RunLaunch) -> ClusterSpec:
    """Another machine, of the run's kind."""
    cluster = load_cluster_spec(Path(name))
    if (cluster.gpu.capability is None) != (launch.cluster.gpu.capability is None):
        run_kind, kind = ("CPU ranks", "GPUs") if launch.cluster.gpu.capability is None else ("GPUs", "CPU ranks")
        rule = f"has {kind}, and the run trained on {run_kind}: what was measured there says nothing about them"
        raise ConfigError("--cluster", name, rule, f"smartmoe plan --cluster {name} predicts without a run.")
    return cluster


def _products(lists: dict[str, list[Any]]) -> Iterator[dict[str, Any]]:
    for values in itertools.product(*lists.values()):
        yield dict(zip(lists, values, strict=True))


def _spec(launch: RunLaunch, values: dict[str, Any]) -> ParallelSpec:
    """The run's launch with these values; what has no meaning without EP or without slots is off."""
    run, spare, ep, nodes = launch.spec, values["spare_slots"], values["ep"], values["nodes"]
    return replace(
        run,
        gpus=launch.cluster.gpus_per_node * nodes if nodes else run.gpus,
        ep=ep,
        spare_slots=spare,
        replicas=cast(Replicas, values["replicas"] if spare else "off"),
        homes_interval=values["homes_interval"] if ep > 1 else 0,
        overlap_degree=run.overlap_degree if ep > 1 else 1,
        micro_batch=values["micro_batch"],
    )


def _cannot_be(spec: ParallelSpec, cluster: ClusterSpec, launch: RunLaunch, trace: RoutingTrace) -> str | None:
    """Why a setting cannot be run, or not be predicted from this trace."""
    if reason := violation(launch.model, spec):
        return reason
    most = launch.model.moe.experts - launch.model.moe.experts // spec.ep
    if spec.spare_slots > most:
        return f"{spec.spare_slots} spare slots: the other ranks have {most} experts"
    sources = spec.ep * spec.edp
    if sources % trace.num_sources and trace.num_sources % sources:
        return f"{sources} source ranks do not divide the trace's {trace.num_sources}, and are no multiple of them"
    if spec.ep % spec_nodes(cluster, spec.ep * spec.etp):
        return f"EP {spec.ep} is not a multiple of the nodes that its ranks lie on"
    return None


# --- predictions


def _moves(record: RunRecord, launch: RunLaunch, trace: RoutingTrace) -> list[Move]:
    """The moves of homes that the run made."""
    model, moves = launch.model, []
    placement = Placement.contiguous(
        num_layers=model.layers + model.mtp_layers, num_experts=model.moe.experts, num_ranks=launch.spec.ep
    )
    try:
        for decision in filter(is_move, record.decisions):
            placement = with_homes(placement, decision["changes"])
            homes = Placement(slots_LRS=placement.slots_LRS[trace.layer], num_experts=placement.num_experts)
            moves.append(Move(iteration=decision["iteration"], homes=homes))
    except (PlanError, IndexError):
        rule = "has moves of experts that do not begin from Megatron's order: its checkpoint had another"
        raise ConfigError("RUN", record.name, rule, "Give the run that the checkpoint is of, or a new one.") from None
    return moves


def _replay(
    setting: Setting,
    launch: RunLaunch,
    recorded: RoutingTrace,
    *,
    by_rank: bool,
    moves: Sequence[Move] | None = None,
) -> Replayed:
    """Replay the run's counts under a setting; homes follow `moves` where they are given."""
    model, spec, cluster = launch.model, setting.spec, setting.cluster
    trace = regrouped(recorded, spec.ep * spec.edp, spec.micro_batches)
    prices = Prices(
        cluster=cluster,
        expert=expert_shape(model, spec),
        num_ranks=spec.ep,
        num_nodes=spec_nodes(cluster, spec.ep * spec.etp),
        micro_batches=spec.micro_batches,
        rank_tokens=rank_tokens(trace, spec.ep),
        dispatcher=dispatcher_of(model, spec),
        exchanges=exchanges_of_launch(model, spec),
        num_groups=model.moe.routing_groups,
        margin=launch.replicas_margin,
    )
    setup = setup_of(
        prices,
        spare_slots=spec.spare_slots,
        warmup=min(25, trace.num_records // 5),
        kernels=kernels_for(trace.counts.size // trace.num_experts, spec.ep),
    )
    placement = Placement.contiguous(
        num_layers=trace.num_layers,
        num_experts=trace.num_experts,
        num_ranks=spec.ep,
        spare_slots=spec.spare_slots,
    )
    mode: ReplicaMode = spec.replicas if spec.replicas != "off" else "history"
    policy = own_policy(
        mode,
        placement,
        spec.edp,
        setup,
        prices,
        homes_interval=spec.homes_interval,
        homes_policy=replace(launch.homes, cooldown_iterations=spec.homes_interval),
        first_evaluation=spec.homes_interval + 2,  # as in training: after the step that follows the first interval
        moves=moves,
    )
    machine = Machine(model=model, spec=spec, cluster=cluster, constants=StepConstants.of(cluster), by_rank=by_rank)
    records = tqdm(range(trace.num_records), desc=label(spec), unit="record", leave=False, disable=None)
    return replayed(trace, policy, setup, machine, records)


def _fit(base: Replayed, times: StepTimes, record: RunRecord) -> tuple[Fitted, FloatArray]:
    """Factors of the terms, and measured over predicted, minus 1, of the steps, `[M, U]`."""
    # Step 1: the measurements of iterations that were replayed, and the terms of the same iterations.
    inside_MN = (times.first_M[:, None] <= base.iteration) & (base.iteration <= times.last_M[:, None])
    at_M = np.flatnonzero(inside_MN.any(axis=1))
    if len(at_M) < LEAST:
        rule = f"{len(at_M)} measured steps are of iterations in the trace: must be at least {LEAST}"
        raise ConfigError("RUN", record.name, rule, "Train longer, or with a smaller --log-interval.")
    terms_MUG = np.array([base.terms_NUG[inside_MN[at]].mean(axis=0) for at in at_M])
    seconds_MU = times.seconds_MU[at_M]
    # Step 2: the factors, from parts of steps where they were measured.
    spread_G = np.array([SPREAD[group] for group in GROUPS])
    if times.parts_MUP is None:
        fitted = fit_factors(terms_MUG.reshape(-1, len(GROUPS)), seconds_MU.ravel(), spread_G)
    else:
        parts = list(GROUPS_OF_PART)
        in_part_PG = np.array([[group in GROUPS_OF_PART[part] for group in GROUPS] for part in parts])
        rows_MUPG = terms_MUG[:, :, None, :] * in_part_PG
        parts_MUP = times.parts_MUP[at_M][:, :, parts]
        steps_MUP = np.broadcast_to(seconds_MU[:, :, None], parts_MUP.shape)
        fitted = fit_factors(rows_MUPG.reshape(-1, len(GROUPS)), parts_MUP.ravel(), spread_G, steps_MUP.ravel())
    residuals_MU = seconds_MU / fitted.seconds(terms_MUG) - 1.0
    return fitted.judged_by(residuals_MU), residuals_MU


def _prediction(
    setting: Setting, result: Replayed, launch: RunLaunch, fitted: Fitted, residuals_MU: FloatArray
) -> Prediction:
    """A setting's row."""
    predicted_NU = fitted.seconds(result.terms_NUG)
    # Step 1: the step, and the terms of its busiest rank.
    seconds = busiest_s(predicted_NU, residuals_MU)
    busiest_N = predicted_NU.argmax(axis=1)
    terms_G = result.terms_NUG[np.arange(len(busiest_N)), busiest_N].mean(axis=0)
    # Step 2: the bar. On another machine every factor may be another one, by as much as before anything was measured.
    known = fitted
    if setting.is_other_machine:
        spread_G = np.array([SPREAD[group] for group in GROUPS])
        doubt_GG = np.diag((spread_G * fitted.factors_G) ** 2)
        known = replace(fitted, covariance_GG=fitted.covariance_GG + doubt_GG)
    bar = BAR * known.deviation_s(terms_G) / float(fitted.seconds(terms_G))
    memory, _ = memory_budget(launch.model, setting.spec, setting.cluster.gpu, result.hot)
    return Prediction(
        spec=setting.spec,
        cluster=setting.cluster,
        step_s=seconds,
        bar=bar,
        terms_s=dict(zip(GROUPS, (terms_G * fitted.factors_G).tolist(), strict=True)),
        imbalance=float(result.imbalance_N.mean()),
        memory_bytes=memory.total,
        exchange_bytes=result.exchange_bytes,
        replica_bytes=result.replica_bytes,
        migration_bytes=result.migration_bytes,
        experts_moved=result.experts_moved,
    )


def _notes(trace: RoutingTrace, launch: RunLaunch, settings: Sequence[Setting]) -> list[str]:
    """What the predictions leave out, for this run and these settings."""
    notes = [*trace.notes, *launch.notes]
    specs = [launch.spec, *(setting.spec for setting in settings)]
    if not trace.has_micro_batches and any(spec.micro_batches > 1 for spec in specs):
        notes.append("the trace adds micro-batches up: those of an iteration are taken to route alike")
    if any(spec.ep * spec.edp > trace.num_sources for spec in specs):
        notes.append("more ranks than were recorded: each takes an equal part of a recorded rank's tokens")
    if not launch.model.vocab:
        notes.append("the vocabulary's size is in no argument: memory and time of the logits are missing")
    if any(setting.is_other_machine for setting in settings):
        notes.append("other machine: its cluster file's rates, corrected by what was fitted on the run's")
    return notes
