"""One launch in words: where its groups lie, what fills memory and time, and what another launch does better."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from megatron_smartmoe.cost.memory.budget import stage_budget
from megatron_smartmoe.cost.step.groups import Group
from megatron_smartmoe.planner.pricing import Plan, Pricing
from megatron_smartmoe.spec.model import ModelSpec
from megatron_smartmoe.spec.parallel import ParallelSpec, violation

GB = 1e9
UNTOLD = 0.002  # of the step: a difference that is not worth a word


def explain(plan: Plan, pricing: Pricing, against: Plan | None = None) -> str:
    """Walk through one launch; `against` is compared with it, term by term."""
    parts = [
        f"Launch: {plan.spec.label()} on {plan.spec.gpus} x {pricing.cluster.gpu.name}",
        *_rules(pricing.model, plan.spec),
        "",
        *_groups(plan.spec, pricing),
        "",
        *_load(plan, pricing),
        "",
        *time_lines(plan),
        "",
        *memory_lines(plan, pricing),
    ]
    if against is not None and against.spec != plan.spec:
        parts += ["", *compare(plan, against)]
    return "\n".join(parts)


def _rules(model: ModelSpec, spec: ParallelSpec) -> list[str]:
    broken = violation(model, spec)
    return [f"Megatron refuses it: {broken}"] if broken else ["Megatron's rules: all kept"]


def _groups(spec: ParallelSpec, pricing: Pricing) -> list[str]:
    """Where each group's ranks lie."""
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


def _load(plan: Plan, pricing: Pricing) -> list[str]:
    """How each scenario falls, before and after balancing."""
    spec = plan.spec
    plain = pricing.balance(replace(spec, spare_slots=0, replicas="off", homes_interval=0))
    before, after = pricing.loads.fallen(plain), pricing.loads.fallen(pricing.balance(spec))
    lines = ["Load (busiest rank over mean, worst part of the model; homes in order -> as the online phase leaves it):"]
    for scenario, was, now, seconds in zip(pricing.loads.scenarios, before, after, plan.scenario_s, strict=True):
        lines.append(f"  {scenario.name:<52} {was.hot:5.2f} -> {now.hot:5.2f}   step {seconds:8.3f} s")
    return lines


def time_lines(plan: Plan) -> list[str]:
    """The terms of the step and their sum."""
    total_s = plan.time.total_s
    lines = ["Time of a step:"]
    lines += [f"  {what:<44} {s:10.4f} s {s / total_s:7.1%}" for what, s in plan.time.terms()]
    return [*lines, f"  {'step':<44} {total_s:10.4f} s", f"  {'step, worst scenario':<44} {plan.worst_s:10.4f} s"]


def memory_lines(plan: Plan, pricing: Pricing) -> list[str]:
    """The parts of the fullest rank's memory, their sum, and what it was without hot ranks."""
    has = pricing.cluster.gpu.memory_bytes
    lines = [f"Memory of the fullest rank (stage {plan.stage}, busiest rank {plan.hot:.2f}x the mean):"]
    lines += [f"  {what:<44} {b / GB:10.3f} GB" for what, b in plan.memory.parts()]
    lines.append(f"  {'sum':<44} {plan.memory.total / GB:10.3f} GB of {has / GB:.1f} GB")
    even = stage_budget(pricing.model, plan.spec, pricing.cluster.gpu, plan.stage, 1.0)
    lines.append(f"  {'with a load that falls evenly':<44} {even.total / GB:10.3f} GB")
    if plan.memory.total > has:
        lines.append(f"  It does not fit: {(plan.memory.total - has) / GB:.1f} GB too much.")
    return lines


def compare(plan: Plan, other: Plan) -> list[str]:
    """What `other` does better or worse, largest difference first."""
    mine, theirs = dict(plan.time.terms()), dict(other.time.terms())
    difference = {what: theirs.get(what, 0.0) - mine.get(what, 0.0) for what in {**mine, **theirs}}
    lines = [f"Against {other.spec.label()} ({other.expected_s:.3f} s, {other.memory.total / GB:.1f} GB):"]
    for what, seconds in sorted(difference.items(), key=lambda entry: -abs(entry[1])):
        if abs(seconds) >= UNTOLD * plan.expected_s:
            lines.append(f"  {what:<44} {seconds:+10.4f} s")
    return [*lines, f"  {'step':<44} {other.expected_s - plan.expected_s:+10.4f} s"]


def why(best: Plan, others: Sequence[Plan], pricing: Pricing) -> list[str]:
    """The choice in a few sentences, from the groups' places and the largest differences."""
    spec, cluster = best.spec, pricing.cluster
    lines = []
    expert = Group(spec.ep, spec.etp)
    if spec.ep > 1:
        inside = not expert.crosses_nodes(cluster)
        where = "inside a node" if inside else "across nodes"
        share = best.time.all_to_all_intra_s + best.time.all_to_all_inter_s
        lines.append(f"EP {spec.ep} keeps the all-to-all {where}: {share / best.expected_s:.1%} of the step.")
    for other in others:
        lines.append(sentence(best, other))
    return lines


def sentence(best: Plan, other: Plan) -> str:
    """Why another plan is slower: its two largest losses."""
    mine, theirs = dict(best.time.terms()), dict(other.time.terms())
    losses = sorted(((theirs.get(w, 0.0) - mine.get(w, 0.0), w) for w in {**mine, **theirs}), reverse=True)
    told = [(seconds, what) for seconds, what in losses[:2] if seconds > UNTOLD * best.expected_s]
    words = " and ".join(f"{what} (+{short_time(seconds)})" for seconds, what in told)
    slower = other.expected_s / best.expected_s - 1
    fits = "" if other.memory.total <= best.memory.total * 1.02 else f"; it needs {other.memory.total / GB:.1f} GB"
    return f"{other.spec.label()} is {slower:.1%} slower, by {words or 'small differences'}{fits}."


def short_time(seconds: float) -> str:
    """`1.23 s`, `456 ms` or `7.8 ms`."""
    if seconds >= 1:
        return f"{seconds:.2f} s"
    return f"{seconds * 1e3:.0f} ms" if seconds >= 0.1 else f"{seconds * 1e3:.1f} ms"
