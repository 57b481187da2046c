"""The simulator's numbers: a table for people, an object for programs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from megatron_smartmoe.cli.simulate_prices import Prices
from megatron_smartmoe.cost.dispatchers import ALL_TO_ALL
from megatron_smartmoe.placement.decisions import Decision
from megatron_smartmoe.placement.online_options import ReplicaMode
from megatron_smartmoe.placement.routing_groups import explain
from megatron_smartmoe.simulate.run import PolicyResult, SimulationSetup, left_out
from megatron_smartmoe.spec.arrays import FloatArray
from megatron_smartmoe.spec.trace import RoutingTrace

_QUANTILES = {"p50": 0.5, "p95": 0.95, "p99": 0.99}
_GAP = "  "


@dataclass(frozen=True, kw_only=True)
class Simulated:
    """All policies over one trace.

    Attributes:
        results: one per policy.
        bounds: the imbalance that no placement can beat, by record, layer, group and micro-batch.
        even_s: predicted seconds of each of them under an even load.
        limit_s: predicted seconds of each of them that no plan can beat; see `simulate.limit`.
        setup: ranks and slots.
        trace: what was replayed.
        prices: cluster and expert.
        priced: where the expert's sizes are from.
        replicas: how smartmoe planned its replicas.
    """

    results: Sequence[PolicyResult]
    bounds: FloatArray
    even_s: FloatArray
    limit_s: FloatArray
    setup: SimulationSetup
    trace: RoutingTrace
    prices: Prices
    priced: str
    replicas: ReplicaMode

    @property
    def by_time(self) -> list[PolicyResult]:
        """Fastest first."""
        return sorted(self.results, key=lambda result: result.total_s)


def as_json(simulated: Simulated) -> dict[str, Any]:
    """The table's numbers by policy."""
    setup, trace, prices = simulated.setup, simulated.trace, simulated.prices
    even_s, limit_s = float(simulated.even_s.mean()), float(simulated.limit_s.mean())
    return {
        "ep": setup.num_ranks,
        "spare_slots": setup.spare_slots,
        "nodes": setup.num_nodes,
        "records": trace.num_records - setup.warmup,
        "warmup": setup.warmup,
        "layers": trace.num_layers,
        "left_out": asdict(left_out(trace, setup)),
        "notes": list(trace.notes),
        "prices": {
            "cluster": prices.cluster.name,
            "hidden": prices.expert.hidden,
            "ffn": prices.expert.ffn,
            "micro_batches": prices.micro_batches,
            "dispatcher": prices.dispatcher.name,
            "replicas": simulated.replicas,
            "replicas_margin": prices.margin,
            "replica_tokens": {mode: prices.replica_price(mode).each_tokens for mode in ("history", "exact")},
        },
        "lower_bound": {"mean": float(simulated.bounds.mean()), "worst": float(simulated.bounds.max())},
        "even_load_ms": even_s * 1e3,
        "limit_ms": limit_s * 1e3,
        "fastest": simulated.by_time[0].name,
        "policies": {result.name: _numbers(result, setup, even_s, limit_s) for result in simulated.results},
    }


def _numbers(result: PolicyResult, setup: SimulationSetup, even_s: float, limit_s: float) -> dict[str, Any]:
    stats, imbalance = result.stats, result.imbalance
    quantiles = {name: float(np.quantile(imbalance, q)) for name, q in _QUANTILES.items()}
    numbers: dict[str, Any] = {
        "imbalance": {"mean": float(imbalance.mean()), **quantiles, "worst": float(imbalance.max())},
        "homes": {
            "experts_moved": stats.experts_moved,
            "bytes_moved": stats.experts_moved * setup.state_bytes,
        },
        "replicas": {"copies_made": stats.replicas_made},
        "slots_changed": stats.slots_changed,
        "plan_ms_per_layer": stats.plan_s * 1e3 / max(stats.plans, 1),
        "predicted_layer_ms": float(result.layer_s.mean() * 1e3),
        "migration_ms": float(result.moving_s.mean() * 1e3),
        "predicted_total_ms": result.total_s * 1e3,
        "share_of_even_load": even_s / result.total_s if result.total_s else 1.0,
        "share_of_limit": limit_s / result.total_s if result.total_s else 1.0,
    }
    if stats.forecast_errors:
        numbers["forecast_error"] = float(np.mean(stats.forecast_errors))
        numbers["replans"] = stats.replans / max(len(imbalance), 1)
        numbers["suspended"] = stats.suspended / max(len(imbalance), 1)
        numbers["reviews"] = [_review(decision) for decision in result.decisions if decision.kind == "review"]
    return numbers


def _review(decision: Decision) -> dict[str, Any]:
    """Predicted and realised gain of a move of homes, in warm-up records too."""
    return {
        "iteration": decision.iteration,
        "predicted_gain_ms": (decision.predicted_gain_s or 0.0) * 1e3,
        "realised_gain_ms": (decision.realised_gain_s or 0.0) * 1e3,
        "kept": not decision.changes,
    }


def as_table(simulated: Simulated) -> str:
    """The table as text. Imbalance is max / mean tokens per rank; 1 is perfect."""
    content = as_json(simulated)
    setup, trace = simulated.setup, simulated.trace
    head = (
        f"{trace.num_experts} experts on {_number(setup.num_ranks, 'rank')}, "
        f"{_number(setup.spare_slots, 'spare slot')} per rank, {_number(setup.num_nodes, 'node')}; "
        f"{_number(content['records'], 'record')} of {_number(trace.num_layers, 'layer')} "
        f"after {setup.warmup} of warm-up"
    )
    lines = [head, *_prices(simulated), *_remarks(trace, content["left_out"]), ""]
    return "\n".join([*lines, *_table(content), "", *_verdicts(simulated, content)])


def _number(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def _prices(simulated: Simulated) -> list[str]:
    """What the predicted times and the replicas' prices are for."""
    prices = simulated.prices
    per_record = (
        f"{_number(prices.micro_batches, 'micro-batch').removesuffix('s') + 'es'} a record"
        if prices.micro_batches > 1
        else "a record is priced as one micro-batch"
    )
    lines = [
        f"times: cluster {prices.cluster.name}; experts {prices.expert.hidden} x {prices.expert.ffn} "
        f"({simulated.priced}); {per_record}"
    ]
    if prices.dispatcher != ALL_TO_ALL:
        lines.append(f"dispatcher {prices.dispatcher.name}, {_number(prices.dispatcher.top_k, 'expert')} a token")
    if simulated.setup.spare_slots and any(result.name == "smartmoe" for result in simulated.results):
        mode = simulated.replicas
        tokens = prices.replica_price("exact" if mode == "exact" else "history").each_tokens
        per = "micro-batch" if mode == "exact" else "record"
        anew = f" ({prices.replica_price('exact').each_tokens:,.0f} a micro-batch)" if mode == "auto" else ""
        lines.append(
            f"smartmoe: replicas {mode}; one pays off above {tokens:,.0f} tokens a {per}{anew} taken from the busiest "
            f"rank (margin {prices.margin:g})"
        )
    if prices.num_groups > 1 and (nodes := prices.balanced_nodes) > 1:
        moves = explain(prices.num_ranks, nodes, prices.num_groups)
        lines.append(f"smartmoe: group-limited routing ({prices.num_groups} groups, {nodes} nodes): {moves}")
    return lines


def _remarks(trace: RoutingTrace, left_out: dict[str, Any]) -> list[str]:
    """What an import did to the trace, and what has no assignments."""
    lines = [f"note: {note}" for note in trace.notes]
    if left_out["entries"]:
        named = [
            f"{name} {', '.join(map(str, left_out[key][:8]))}{', ...' if len(left_out[key]) > 8 else ''}"
            for key, name in (("layers", "layers"), ("iterations", "iterations"))
            if left_out[key]
        ]
        where = f" (among them {'; '.join(named)})" if named else ""
        share = f"{left_out['entries']:,} of {left_out['of']:,} entries by record, layer, group and micro-batch"
        lines.append(f"note: {share} have no assignments{where}: left out of all means")
    return lines


def _table(content: Mapping[str, Any]) -> list[str]:
    """The rows, every column as wide as its widest cell, under the names of the groups of columns."""
    groups = {
        "": ["policy"],
        "max / mean tokens per rank": ["mean", *_QUANTILES, "worst"],
        "homes": ["moved", "GB"],
        "replicas": ["made", "slots changed"],
        "planning": ["ms a layer"],
        "ms a layer and micro-batch": ["layer", "moves", "both", "of even load", "of limit"],
    }
    rows = [[[name], *_row(numbers)] for name, numbers in content["policies"].items()]
    even, limit, bound = content["even_load_ms"], content["limit_ms"], content["lower_bound"]
    rows.append([["lower bound"], [f"{bound['mean']:.4f}", "", "", "", f"{bound['worst']:.3f}"], *_blank(groups, 2)])
    last = [f"{even:.3f}", "", f"{even:.3f}", "100.0%", f"{limit / even:.1%}" if even else "100.0%"]
    rows.append([["even load"], ["1.0000", "", "", "", "1.000"], *_blank(groups, 2)[:-1], last])
    # Step 1: the width of every column, and of every group, which its name may widen.
    names = list(groups.values())
    widths = [
        [max(len(cells[at]) for cells in (title, *(row[group] for row in rows))) for at in range(len(title))]
        for group, title in enumerate(names)
    ]
    for name, width in zip(groups, widths, strict=True):
        width[0] += max(0, len(name) - sum(width) - len(_GAP) * (len(width) - 1))
    # Step 2: groups side by side, the first column to the left and all others to the right.
    totals = [sum(width) + len(_GAP) * (len(width) - 1) for width in widths]
    over = " | ".join(f"{name:<{total}}" for name, total in zip(groups, totals, strict=True))
    return [over.rstrip(), *(_line(cells, widths) for cells in [names, *rows])]


def _row(numbers: Mapping[str, Any]) -> list[list[str]]:
    imbalance, homes = numbers["imbalance"], numbers["homes"]
    return [
        [f"{imbalance['mean']:.4f}", *(f"{imbalance[key]:.3f}" for key in (*_QUANTILES, "worst"))],
        [f"{homes['experts_moved']:,}", f"{homes['bytes_moved'] / 1e9:,.1f}"],
        [f"{numbers['replicas']['copies_made']:,}", f"{numbers['slots_changed']:,}"],
        [f"{numbers['plan_ms_per_layer']:.2f}"],
        [
            f"{numbers['predicted_layer_ms']:.3f}",
            f"{numbers['migration_ms']:.3f}",
            f"{numbers['predicted_total_ms']:.3f}",
            f"{numbers['share_of_even_load']:.1%}",
            f"{numbers['share_of_limit']:.1%}",
        ],
    ]


def _blank(groups: Mapping[str, Sequence[str]], first: int) -> list[list[str]]:
    return [[""] * len(titles) for titles in list(groups.values())[first:]]


def _line(row: Sequence[Sequence[str]], widths: Sequence[Sequence[int]]) -> str:
    cells = [
        _GAP.join(
            f"{cell:<{width}}" if group == 0 else f"{cell:>{width}}"
            for cell, width in zip(row[group], widths[group], strict=True)
        )
        for group in range(len(row))
    ]
    return " | ".join(cells).rstrip()


def _verdicts(simulated: Simulated, content: Mapping[str, Any]) -> list[str]:
    """Which policy is fastest, and what ours met."""
    first, *others = simulated.by_time
    share = content["policies"][first.name]["share_of_even_load"]
    line = (
        f"fastest: {first.name}, predicted {first.total_s * 1e3:.3f} ms a layer and micro-batch: "
        f"{share:.1%} of an even load's speed ({content['even_load_ms']:.3f} ms)"
    )
    if others:
        line += f"; next: {others[0].name}, {others[0].total_s / first.total_s - 1:+.1%}"
    limit = content["limit_ms"]
    share = content["even_load_ms"] / limit if limit else 1.0
    bound = (
        f"limit: {limit:.3f} ms, {share:.1%} of an even load's speed: no plan computes and sends replicas in less; "
        "tokens travel as under an even load"
    )
    lines = [line, bound]
    for name, numbers in content["policies"].items():
        if "forecast_error" in numbers:
            share = numbers["forecast_error"]
            lines.append(f"{name}: {share:.1%} of the tokens went to other experts than forecast")
            replanned = f"replicas replanned from the exact counts in {numbers['replans']:.1%} of the micro-batches"
            suspended = f"; those from history suspended in {numbers['suspended']:.1%}" if numbers["suspended"] else ""
            lines.append(f"{name}: {replanned}{suspended}")
        for review in numbers.get("reviews", ()):
            verdict = "kept" if review["kept"] else "reverted"
            lines.append(
                f"{name}: homes moved, reviewed at iteration {review['iteration']}: "
                f"predicted {review['predicted_gain_ms']:.3f} ms/iter, "
                f"found {review['realised_gain_ms']:.3f} ms/iter on the loads since: {verdict}"
            )
    return lines
