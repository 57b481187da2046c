"""One launch explained: where its groups lie, what takes memory and time, and where other launches differ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from megatron_smartmoe.cost.memory.budget import stage_budget
from megatron_smartmoe.cost.step.groups import Group
from megatron_smartmoe.planner.pricing import Launch, Pricing
from megatron_smartmoe.spec.parallel import ParallelSpec, violation

GB = 1e9
MIN_REPORTED = 0.002  # share of the step time; smaller differences are not reported


def explain(launch: Launch, pricing: Pricing, other: Launch | None = None) -> str:
    """Describe one launch, and compare `other` with it, term by term."""
    broken = violation(pricing.model, launch.spec)
    parts = [
        f"Launch: {launch.spec.label()} on {launch.spec.gpus} x {pricing.cluster.gpu.name}",
        f"Megatron refuses it: {broken}" if broken else "It satisfies Megatron's constraints.",
        "",
        *_groups(launch.spec, pricing),
        "",
        *_load(launch, pricing),
        "",
        *time_lines(launch),
        "",
        *memory_lines(launch, pricing),
    ]
    if other is not None and other.spec != launch.spec:
        parts += ["", *compare(launch, other)]
    return "\n".join(parts)


def _groups(spec: ParallelSpec, pricing: Pricing) -> list[str]:
    """Size and place of each process group."""
    groups = (
        ("tensor parallel", Group(spec.tp, 1)),
        ("context parallel", Group(spec.cp, spec.tp)),
        ("expert tensor parallel", Group(spec.etp, 1)),
        ("expert parallel", Group(spec.ep, spec.etp)),
        ("data parallel (with context)", Group(spec.dp * spec.cp, spec.tp)),
        ("expert data parallel", Group(spec.edp, spec.etp * spec.ep)),
        ("pipeline", Group(spec.pp, spec.gpus // spec.pp)),
    )
    lines = ["Groups (ranks are numbered tensor, context, expert, data, pipeline):"]
    for name, group in groups:
        if group.size > 1:
            inside = group.members_per_node(pricing.cluster)
            where = "between nodes" if inside == 1 else f"{inside} per node"
            where = "inside a node" if not group.crosses_nodes(pricing.cluster) else where
            lines.append(f"  {name:<30} {group.size:5} ranks, {group.stride} apart, {where}")
    return lines


def _load(launch: Launch, pricing: Pricing) -> list[str]:
    """Per-rank load in each scenario, before and after balancing."""
    spec = launch.spec
    unbalanced = pricing.balance(replace(spec, spare_slots=0, replicas="off", homes_interval=0))
    before, after = pricing.loads.after_balancing(unbalanced), pricing.loads.after_balancing(pricing.balance(spec))
    lines = ["Load (busiest rank over the mean, worst part of the model; before -> after balancing):"]
    for scenario, plain, balanced, seconds in zip(
        pricing.loads.scenarios, before, after, launch.scenario_s, strict=True
    ):
        lines.append(f"  {scenario.name:<52} {plain.hot:5.2f} -> {balanced.hot:5.2f}   step {seconds:8.3f} s")
    return lines


def time_lines(launch: Launch) -> list[str]:
    """The terms of the step and their sum."""
    total_s = launch.time.total_s
    lines = ["Time of a step:"]
    lines += [f"  {what:<44} {s:10.4f} s {s / total_s:7.1%}" for what, s in launch.time.terms()]
    return [*lines, f"  {'step':<44} {total_s:10.4f} s", f"  {'step, worst scenario':<44} {launch.worst_s:10.4f} s"]


def memory_lines(launch: Launch, pricing: Pricing) -> list[str]:
    """The parts of the fullest rank's memory, their sum, and the sum with an even load."""
    has = pricing.cluster.gpu.memory_bytes
    lines = [f"Memory of the fullest rank (stage {launch.stage}, busiest rank {launch.hot:.2f}x the mean):"]
    lines += [f"  {what:<44} {b / GB:10.3f} GB" for what, b in launch.memory.parts()]
    lines.append(f"  {'sum':<44} {launch.memory.total / GB:10.3f} GB of {has / GB:.1f} GB")
    even = stage_budget(pricing.model, launch.spec, pricing.cluster.gpu, launch.stage, 1.0)
    lines.append(f"  {'with an even load':<44} {even.total / GB:10.3f} GB")
    if launch.memory.total > has:
        lines.append(f"  It does not fit: it needs {(launch.memory.total - has) / GB:.1f} GB more than there are.")
    return lines


def compare(launch: Launch, other: Launch) -> list[str]:
    """The terms of the step time in which `other` differs, largest difference first."""
    mine, theirs = dict(launch.time.terms()), dict(other.time.terms())
    difference = {what: theirs.get(what, 0.0) - mine.get(what, 0.0) for what in {**mine, **theirs}}
    lines = [f"Compared with {other.spec.label()} ({other.expected_s:.3f} s, {other.memory.total / GB:.1f} GB):"]
    for what, seconds in sorted(difference.items(), key=lambda entry: -abs(entry[1])):
        if abs(seconds) >= MIN_REPORTED * launch.expected_s:
            lines.append(f"  {what:<44} {seconds:+10.4f} s")
    return [*lines, f"  {'step':<44} {other.expected_s - launch.expected_s:+10.4f} s"]


def why(best: Launch, others: Sequence[Launch], pricing: Pricing) -> list[str]:
    """The choice in a few sentences, from the places of the groups and the largest differences."""
    spec, lines = best.spec, []
    if spec.ep > 1:
        crosses = Group(spec.ep, spec.etp).crosses_nodes(pricing.cluster)
        where = "spreads the all-to-all across nodes" if crosses else "keeps the all-to-all inside a node"
        exchange_s = best.time.all_to_all_intra_s + best.time.all_to_all_inter_s
        lines.append(f"EP {spec.ep} {where}: {exchange_s / best.expected_s:.1%} of the step.")
    return lines + [sentence(best, other) for other in others]


def sentence(best: Launch, other: Launch) -> str:
    """Why another launch is slower: the two terms in which it loses most."""
    mine, theirs = dict(best.time.terms()), dict(other.time.terms())
    losses = sorted(((theirs.get(term, 0.0) - mine.get(term, 0.0), term) for term in {**mine, **theirs}), reverse=True)
    reported = [(seconds, term) for seconds, term in losses[:2] if seconds > MIN_REPORTED * best.expected_s]
    words = " and ".join(f"{term} (+{short_time(seconds)})" for seconds, term in reported)
    slower = other.expected_s / best.expected_s - 1
    fits = "" if other.memory.total <= best.memory.total * 1.02 else f"; it needs {other.memory.total / GB:.1f} GB"
    return f"{other.spec.label()} is {slower:.1%} slower, by {words or 'small differences'}{fits}."


def short_time(seconds: float) -> str:
    """`1.23 s`, `456 ms` or `7.8 ms`."""
    if seconds >= 1:
        return f"{seconds:.2f} s"
    return f"{seconds * 1e3:.0f} ms" if seconds >= 0.1 else f"{seconds * 1e3:.1f} ms"
