"""Why a decision was made, and what came of it: from what a run directory holds, as text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_smartmoe.errors import ConfigError
from megatron_smartmoe.report.candidates import candidate_lines, prices, runner_up
from megatron_smartmoe.report.run_record import (
    RunRecord,
    is_move,
    read_decisions,
    read_lines,
    replica_files,
    whole,
    with_homes,
)
from megatron_smartmoe.spec.arrays import FloatArray, IntArray
from megatron_smartmoe.spec.placement import EMPTY, Placement

_AROUND = 20  # iterations before and after a decision whose load is shown
_MOST_LAYERS = 8
_STAYS = {
    "settling": "the last switch, or the start, is too recent",
    "margin": "no other setting is predicted to save enough",
    "trial": "too few steps have been timed since the switch",
}
_TITLES = {
    "homes": "homes (which rank owns which expert)",
    "review": "review of the last move of homes",
    "replicas": "replicas (copies in spare slots) for this iteration",
    "replans": "replicas planned anew within this iteration, from the counts of a micro-batch",
    "pool": "pool (settings that change without a restart)",
}


def explain(run: RunRecord, directory: Path, iteration: int, layer: int | None) -> str:
    """What was decided before an iteration.

    Args:
        run: the run.
        directory: its run directory.
        iteration: the iteration before which the decisions take effect.
        layer: the only layer to show, from 1; None for all.

    Raises:
        ConfigError: nothing was decided then.
    """
    replicas = [one for path in replica_files(directory) for one in read_decisions(path)]
    made = [one for one in [*run.decisions, *replicas] if one["iteration"] == iteration]
    stays = [] if any(one["kind"] == "pool" for one in made) else _evaluations(directory, iteration)
    if not made and not stays:
        others = sorted({int(one["iteration"]) for one in [*run.decisions, *replicas]})
        near = sorted(sorted(others, key=lambda other: abs(other - iteration))[:4])
        rule = "nothing was decided then" + ("" if near else ", nor in any other iteration")
        way_out = f"Decisions near it: {', '.join(map(str, near))}." if near else "Train with --smartmoe."
        raise ConfigError("--iteration", iteration, rule, way_out)
    parts = [f"{run.name}, iteration {iteration:,}"]
    for decision in made:
        parts.append("\n".join(f"  {name:<10} {text}" for name, text in _rows(run, decision, layer)))
        parts[-1] = f"{_title(decision)}\n{parts[-1]}"
    return "\n\n".join([*parts, *stays])


def _evaluations(directory: Path, iteration: int) -> list[str]:
    """Re-evaluations of the pool that changed nothing."""
    return [
        f"{_TITLES['pool']}: {one['setting']} stays\n"
        f"  inputs     a step took {one['step_s'] * 1e3:.1f} ms: median of {one['timed']}, give or take "
        f"{one['noise_s'] * 1e3:.1f} ms\n"
        f"  verdict    {_STAYS.get(one['reason'], one['reason'])}"
        for one in read_lines(directory / "pool.jsonl")
        if one["iteration"] == iteration
    ]


def _title(decision: dict[str, Any]) -> str:
    group = f", expert-parallel group {decision['group']}" if decision["group"] >= 0 else ""
    return f"{_TITLES.get(decision['kind'], decision['kind'])}{group}: {_verdict(decision)}"


def _rows(run: RunRecord, decision: dict[str, Any], layer: int | None) -> Iterator[tuple[str, str]]:
    """(name, text) of each thing that is known of the decision, in the order in which it was made."""
    found = {
        "inputs": [f"digest {decision['inputs']}; placement {decision['before']} -> {decision['after']}"],
        "forecast": _forecast(run, decision, layer),
        "candidates": candidate_lines(decision, layer),
        "runner-up": [runner_up(decision, layer)],
        "prices": [prices(decision)],
        "verdict": [f"{_verdict(decision)}: {decision['why']}", *_price(decision)],
        "changes": _changes(run, decision, layer),
        "load": _loads(run, decision, layer),
        "outcome": _outcome(run, decision, layer),
    }
    for name, texts in found.items():
        for number, text in enumerate(filter(None, texts)):
            yield "" if number else name, text


def _verdict(decision: dict[str, Any]) -> str:
    return "taken" if decision["taken"] else "refused"


def _price(decision: dict[str, Any]) -> list[str]:
    """What it was predicted to save, and what it cost."""
    if decision.get("predicted_gain_s") is None:
        return []
    cost = "" if decision.get("cost_s") is None else f", costs {decision['cost_s'] * 1e3:.3f} ms once"
    size = f" ({decision['moved_bytes'] / 2**20:.1f} MiB)" if decision.get("moved_bytes") else ""
    return [f"predicted to save {decision['predicted_gain_s'] * 1e3:+.3f} ms per iteration{cost}{size}"]


def _forecast(run: RunRecord, decision: dict[str, Any], layer: int | None) -> list[str]:
    """The experts that were expected to be the hottest, and what share of the tokens they then had."""
    lines = []
    for one in decision.get("forecast", ()):
        if layer is not None and one["layer"] + 1 != layer:
            continue
        expected = ", ".join(f"expert {expert} {share:.1%}" for expert, share in one["hottest"])
        error = f"earlier forecasts were off by {one['error']:.1%} of the tokens"
        lines.append(f"layer {one['layer'] + 1}: {expected} of the tokens ({error})")
        lines += _turned_out(run, decision, one)
    return lines


def _turned_out(run: RunRecord, decision: dict[str, Any], forecast: dict[str, Any]) -> list[str]:
    """The shares that these experts had in the iterations that were decided for, where counts were recorded."""
    if run.trace is None or forecast["layer"] >= run.trace.num_layers:
        return []
    first, length = decision["iteration"], 1
    if decision["kind"] == "homes":
        first, length = first + 1, _AROUND
    last = min(first + length - 1, int(run.trace.iteration[-1]))
    load_E = _mean_load(run, int(run.trace.layer[forecast["layer"]]), first, last + 1)
    if load_E is None:
        return []
    shares = ", ".join(f"expert {expert} {load_E[expert] / load_E.sum():.1%}" for expert, _ in forecast["hottest"])
    when = f"iteration {first}" if first == last else f"iterations {first} to {last}"
    return [f"  turned out in {when}: {shares}"]


def _changes(run: RunRecord, decision: dict[str, Any], layer: int | None) -> list[str]:
    """Which experts move, in words."""
    experts, ranks = (whole(run.arguments, name) for name in ("num_experts", "expert_model_parallel_size"))
    homes = experts // ranks if experts and ranks else 0
    if decision["kind"] == "pool":
        return [f"{decision['before']} -> {decision['after']}" if decision["taken"] else ""]
    if decision["kind"] == "replans":
        return []
    lines = []
    changes = decision["changes"]
    if decision["kind"] != "replicas":  # spare slots of the homes' planner are filled by that of the replicas
        changes = [change for change in changes if change[2] < homes]
    for row in sorted({change[0] for change in changes}):
        if layer is not None and row + 1 != layer:
            continue
        of_layer = [change for change in changes if change[0] == row]
        came = [_place(change, homes) for change in of_layer if change[4] != EMPTY]
        left = sum(change[4] == EMPTY for change in of_layer)
        freed = [f"{left} slot{'s' if left > 1 else ''} freed"] if left else []
        lines.append(f"layer {row + 1}: {'; '.join([*came, *freed])}")
    if len(lines) > _MOST_LAYERS:
        lines[_MOST_LAYERS:] = [f"and {len(lines) - _MOST_LAYERS} layers more: --layer N shows one"]
    return lines or ["no expert moves"]


def _place(change: Sequence[int], homes: int) -> str:
    _, rank, slot, _, after = change
    return f"expert {after} {'at home on' if slot < homes else 'as a replica on'} rank {rank}"


def _loads(run: RunRecord, decision: dict[str, Any], layer: int | None) -> list[str]:
    """The busiest rank over the mean with both homes, on the load of then and on the load that followed."""
    trace, placement = run.trace, placement_before(run, decision)
    if decision["kind"] not in ("homes", "review") or placement is None:
        return []
    if trace is None:
        return ["no counts were recorded: --smartmoe-record-trace does"]
    moved = with_homes(placement, decision["changes"])
    lines = []
    for row in sorted({change[0] for change in decision["changes"]}):
        if (layer is not None and row + 1 != layer) or row not in trace.layer:
            continue
        texts = []
        for name, low, high in (("before", -_AROUND, 0), ("after", 0, _AROUND)):
            load_E = _mean_load(run, row, decision["iteration"] + low, decision["iteration"] + high)
            if load_E is not None:
                old, new = (_busiest(load_E, one.slots_LRS[row], one.home_slots) for one in (placement, moved))
                texts.append(f"{old:.3f} -> {new:.3f} on the {_AROUND} iterations {name}")
        if texts:
            lines.append(f"layer {row + 1}: busiest rank over the mean by homes: {', '.join(texts)}")
    return lines[:_MOST_LAYERS]


def _mean_load(run: RunRecord, row: int, first: int, last: int) -> FloatArray | None:
    """Tokens of each expert in the recorded iterations from `first` to before `last`."""
    assert run.trace is not None
    is_in = (run.trace.iteration >= first) & (run.trace.iteration < last)
    at = int(np.flatnonzero(run.trace.layer == row)[0])
    counts = run.trace.counts[is_in, at]
    if not counts.any():
        return None
    load_E: FloatArray = counts.sum(axis=tuple(range(counts.ndim - 1)), dtype=np.int64).astype(np.float64)
    return load_E


def _busiest(load_E: FloatArray, slots_RS: IntArray, homes: int) -> float:
    load_R = load_E[slots_RS[:, :homes]].sum(axis=1)
    return float(load_R.max() / load_R.mean())


def _outcome(run: RunRecord, decision: dict[str, Any], layer: int | None) -> list[str]:
    """What it turned out to be: predicted and realised gain, or how balanced the iteration was."""
    if decision.get("failure"):
        return [f"the experts did not move: {decision['failure']}"]
    if decision.get("realised_gain_s") is not None:
        return [_compared(decision)]
    if decision["kind"] in ("replicas", "replans"):
        return _balance(run, decision, layer)
    if not decision["taken"]:
        return []
    kind = "pool" if decision["kind"] == "pool" else "review"
    for one in run.decisions:
        if one["iteration"] > decision["iteration"] and one["kind"] == kind:
            if one.get("realised_gain_s") is None:
                break
            return [f"iteration {one['iteration']:,}: {one['why']}", _compared(one)]
    return ["not reviewed yet" if not run.is_finished else "the run ended before its review"]


def _compared(decision: dict[str, Any]) -> str:
    """Predicted and realised gain of what a verdict is about: that of homes is priced, that of a switch measured."""
    predicted, realised = (decision.get(name) for name in ("predicted_gain_s", "realised_gain_s"))
    assert realised is not None
    saved = f"{realised * 1e3:+.3f} ms per iteration"
    before = "" if predicted is None else f"predicted {predicted * 1e3:+.3f} ms per iteration, "
    return before + (f"measured {saved}" if decision["kind"] == "pool" else f"found {saved} on the loads since")


def _balance(run: RunRecord, decision: dict[str, Any], layer: int | None) -> list[str]:
    """How balanced the layers of the candidates were in the iteration that replicas were planned for."""
    rows = {one["layer"] for one in decision.get("candidates", ())}
    lines = []
    for row in sorted(rows):
        if layer is not None and row + 1 != layer:
            continue
        number = int(run.trace.layer[row]) if run.trace is not None and row < run.trace.num_layers else row
        for one in run.balance:
            at = np.flatnonzero(one.iteration == decision["iteration"])
            if one.layer == number and at.size:
                homes, split = float(one.homes[at[0]]), float(one.split[at[0]])
                lines.append(
                    f"layer {row + 1}: busiest rank {split:.3f} times the mean in the iteration's worst micro-batch, "
                    f"{homes:.3f} by homes alone"
                )
    return lines


def placement_before(run: RunRecord, decision: dict[str, Any]) -> Placement | None:
    """Where the homes were when a decision was made; None where that cannot be known."""
    if run.placement is None:
        return None
    start = Placement.contiguous(
        num_layers=run.placement.num_layers,
        num_experts=run.placement.num_experts,
        num_ranks=run.placement.num_ranks,
        spare_slots=run.placement.spare_slots,
    )
    for one in run.decisions:
        if one is decision:
            return start
        if is_move(one):
            start = with_homes(start, one["changes"])
    return start
