"""The simulator's numbers: a table for people, an object for programs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from megatron_smartmoe.placement.decisions import Decision
from megatron_smartmoe.simulate.run import PolicyResult, SimulationSetup, left_out
from megatron_smartmoe.spec.arrays import FloatArray
from megatron_smartmoe.spec.trace import RoutingTrace

_QUANTILES = {"p50": 0.5, "p95": 0.95, "p99": 0.99}


def as_json(
    results: Sequence[PolicyResult], bounds: FloatArray, setup: SimulationSetup, trace: RoutingTrace
) -> dict[str, Any]:
    """The table's numbers by policy."""
    return {
        "ep": setup.num_ranks,
        "spare_slots": setup.spare_slots,
        "nodes": setup.num_nodes,
        "records": trace.num_records - setup.warmup,
        "warmup": setup.warmup,
        "layers": trace.num_layers,
        "left_out": asdict(left_out(trace, setup)),
        "notes": list(trace.notes),
        "lower_bound": {"mean": float(bounds.mean()), "worst": float(bounds.max())},
        "policies": {result.name: _numbers(result, setup) for result in results},
    }


def _numbers(result: PolicyResult, setup: SimulationSetup) -> dict[str, Any]:
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
    }
    if stats.forecast_errors:
        numbers["forecast_error"] = float(np.mean(stats.forecast_errors))
        numbers["replans"] = stats.replans / max(len(imbalance), 1)
        numbers["reviews"] = [_review(decision) for decision in result.decisions if decision.kind == "review"]
    return numbers


def _review(decision: Decision) -> dict[str, Any]:
    """Predicted and measured gain of a move of homes, in warm-up records too."""
    return {
        "iteration": decision.iteration,
        "predicted_gain_ms": (decision.predicted_gain_s or 0.0) * 1e3,
        "realised_gain_ms": (decision.realised_gain_s or 0.0) * 1e3,
        "kept": not decision.changes,
    }


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


def as_table(results: Sequence[PolicyResult], bounds: FloatArray, setup: SimulationSetup, trace: RoutingTrace) -> str:
    """The table as text. Imbalance is max / mean tokens per rank; 1 is perfect."""
    content = as_json(results, bounds, setup, trace)
    head = (
        f"{trace.num_experts} experts on {setup.num_ranks} ranks, {setup.spare_slots} spare slots, "
        f"{setup.num_nodes} nodes; {content['records']} records of {trace.num_layers} layers "
        f"after {setup.warmup} of warm-up"
    )
    columns = (
        "max/mean tokens: mean    p50    p95    p99  worst"
        " | homes moved       GB | replicas  slots chg | plan ms | layer ms"
    )
    lines = [head, *_remarks(trace, content["left_out"]), "", f"{'policy':<18}{columns}"]
    for name, numbers in content["policies"].items():
        imbalance, homes = numbers["imbalance"], numbers["homes"]
        lines.append(
            f"{name:<18}{imbalance['mean']:>21.4f}"
            + "".join(f"{imbalance[key]:>7.3f}" for key in (*_QUANTILES, "worst"))
            + f" | {homes['experts_moved']:>11}{homes['bytes_moved'] / 1e9:>9.1f}"
            + f" | {numbers['replicas']['copies_made']:>8}{numbers['slots_changed']:>11}"
            + f" | {numbers['plan_ms_per_layer']:>7.2f} | {numbers['predicted_layer_ms']:>8.3f}"
        )
    bound = content["lower_bound"]
    lines.append(f"{'lower bound':<18}{bound['mean']:>21.4f}{'':21}{bound['worst']:>7.3f}")
    for name, numbers in content["policies"].items():
        if "forecast_error" in numbers:
            share = numbers["forecast_error"]
            lines.append(f"{name}: {share:.1%} of the tokens went to other experts than forecast")
            lines.append(
                f"{name}: replicas replanned from the exact counts in {numbers['replans']:.1%} of the micro-batches"
            )
        for review in numbers.get("reviews", ()):
            verdict = "kept" if review["kept"] else "reverted"
            lines.append(
                f"{name}: homes moved, reviewed at iteration {review['iteration']}: "
                f"predicted {review['predicted_gain_ms']:.3f} ms/iter, "
                f"measured {review['realised_gain_ms']:.3f} ms/iter: {verdict}"
            )
    return "\n".join(lines)
