"""A cluster file made of measurements.

Method. Each series becomes a line (`calibrate.line`), each line two numbers of the file:

- gemm: peak_flops, operations of a token over its time; weight_passes, an expert's fixed time over the time that its
  weights need to cross memory once (fixed time over a token's is the half-rate point);
- copy: memory_bandwidth_bytes_s;
- all_to_all, ring (reduce-scatter and all-gather), all_reduce, send_recv: bandwidth_bytes_s, the best of the four;
  latency_s, a message's; inside a node also the latencies of a ring's and an all-to-all's steps.
- gpu.ranks_per_device: how many times as fast a CPU rank's products are when the others wait.

A measured rate is reached: `efficiency` is 1 for gemm and memory, and for a link the share of its best rate that the
all-to-all, the ring and the all-reduce reach, so that the cost model discounts nothing twice. What could not be
measured (links between nodes on one node) comes from the shipped file for the device, or from an estimate; its source
says so, and it keeps the model's priors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from megatron_smartmoe.calibrate.line import LineFit
from megatron_smartmoe.calibrate.measurement import COLLECTIVES, LINKS, MachineMeasurement, Series
from megatron_smartmoe.spec.cluster import SCOPES, ClusterSpec, GpuSpec, LevelSpec, LinkSpec

_SHARED = ("all_to_all", "ring", "all_reduce")  # operations with a share; single messages have none in the model
NOISY_SPREAD = 0.5  # interquartile range of the repeats over their median above which a point is noisy
_LABELS = {
    "all_to_all": "all_to_all_single",
    "ring": "reduce_scatter and all_gather",
    "all_reduce": "all_reduce",
    "send_recv": "send to the next rank",
}
_ESTIMATES = {  # for a link that was not measured on a device without a shipped file
    "intra": (LinkSpec(bandwidth_bytes_s=25e9, latency_s=10e-6), "PCIe 4.0 x16, about 25 GB/s in each direction"),
    "inter": (LinkSpec(bandwidth_bytes_s=12.5e9, latency_s=20e-6), "one 100 Gb/s card per GPU"),
}


@dataclass(frozen=True, kw_only=True)
class MachineFit:
    """The cluster file's content, and how well it fits the measurements.

    Attributes:
        cluster: the file's content.
        lines: fitted line of every series, by its name ("gemm", "all_to_all intra").
        half_rate_tokens: tokens of one expert at which its products reach half of the full rate.
        warnings: why a number may be wrong, one sentence each.
    """

    cluster: ClusterSpec
    lines: Mapping[str, LineFit]
    half_rate_tokens: float
    warnings: tuple[str, ...]


def all_series(measured: MachineMeasurement) -> dict[str, Series]:
    """Every series by its name, in the order of a table."""
    names = [*LINKS, *measured.levels]
    links = {f"{op} {link}": measured.links[op, link] for link in names for op in COLLECTIVES if _has(measured, link)}
    return {"gemm": measured.gemm, "copy": measured.copy, **links}


def fit_machine(measured: MachineMeasurement, nominal: ClusterSpec | None = None, name: str = "measured") -> MachineFit:
    """Fit a line to every series, and make the cluster file's numbers of the lines.

    Args:
        measured: measurements of one job.
        nominal: the shipped file for this device, or None; numbers that could not be measured come from it.
        name: name of the cluster.

    Raises:
        PlanError: a series with fewer than two different amounts.
    """
    # Step 1: lines.
    lines = {key: series.fit() for key, series in all_series(measured).items()}
    # Step 2: numbers, sources and shares of the device and of each link.
    sources: dict[str, str] = {}
    shares = {"gemm": 1.0, "memory": 1.0}
    gpu = _gpu(measured, lines, sources)
    reserved = "gpu.reserved_bytes"
    if nominal is not None and reserved in nominal.sources:
        gpu, sources[reserved] = replace(gpu, reserved_bytes=nominal.gpu.reserved_bytes), nominal.sources[reserved]
    links = {}
    for link in LINKS:
        if _has(measured, link):
            links[link] = _link(measured, link, f"{link}_node", lines, sources, shares)
        else:
            links[link] = _unmeasured(link, nominal, sources)
    levels = _narrowing(_levels(measured, nominal, lines, sources, shares), links["inter"], sources)
    for share in ("gemm", "memory"):
        sources[f"efficiency.{share}"] = "the number above is measured: a rate that is reached, not a peak to discount"
    cluster = ClusterSpec(
        name=name,
        nodes=measured.nodes,
        gpus_per_node=measured.ranks_per_node,
        gpu=gpu,
        intra_node=links["intra"],
        inter_node=links["inter"],
        levels=levels,
        replica_scope=_scope(nominal, levels),
        sources=sources,
        efficiency=shares,
    )
    gemm = lines["gemm"]
    half_rate = gemm.fixed_s / gemm.unit_s
    return MachineFit(
        cluster=_rounded(cluster),
        lines=lines,
        half_rate_tokens=half_rate,
        warnings=tuple(_warnings(measured, lines, half_rate)),
    )


def _levels(
    measured: MachineMeasurement,
    nominal: ClusterSpec | None,
    lines: Mapping[str, LineFit],
    sources: dict[str, str],
    shares: dict[str, float],
) -> tuple[LevelSpec, ...]:
    """The levels above the nodes: measured, else as `nominal` has them; one that is neither is left out."""
    known = {} if nominal is None else {(level.name, level.nodes): level for level in nominal.levels}
    levels = []
    for name, nodes in measured.levels.items():
        path = f"levels.{name}"
        if _has(measured, name):
            link = _link(measured, name, path, lines, sources, shares)
            levels.append(LevelSpec(name=name, nodes=nodes, link=link))
        elif (name, nodes) in known and nominal is not None:
            levels.append(known[name, nodes])
            for number in ("bandwidth_bytes_s", "latency_s"):
                source = nominal.sources.get(f"{path}.{number}", "unknown")
                sources[f"{path}.{number}"] = f"not measured, one domain: {source}"
    return tuple(levels)


def _narrowing(levels: Sequence[LevelSpec], inter_node: LinkSpec, sources: dict[str, str]) -> tuple[LevelSpec, ...]:
    """The levels, none wider than what lies inside it: what leaves a domain of it has left those, too."""
    narrowed, inner, most = [], "nodes", inter_node.bandwidth_bytes_s
    for level in levels:
        path, found = f"levels.{level.name}.bandwidth_bytes_s", level.link.bandwidth_bytes_s
        if found > most:
            sources[path] = f"as between {inner}, which all of it crosses; alone {found:.4g}: {sources[path]}"
        most = min(found, most)
        narrowed.append(replace(level, link=replace(level.link, bandwidth_bytes_s=most)))
        inner = f"domains of level {level.name}"
    return tuple(narrowed)


def _scope(nominal: ClusterSpec | None, levels: Sequence[LevelSpec]) -> str:
    """Where replicas may be: as `nominal` has it, as long as there is that level."""
    scope = "auto" if nominal is None else nominal.replica_scope
    return scope if scope in (*SCOPES, *(level.name for level in levels)) else "auto"


def _has(measured: MachineMeasurement, link: str) -> bool:
    return measured.members.get(link, 1) > 1


def _gpu(measured: MachineMeasurement, lines: Mapping[str, LineFit], sources: dict[str, str]) -> GpuSpec:
    """The device's numbers, and their sources."""
    gemm, copy, expert = lines["gemm"], lines["copy"], measured.expert
    kind = "gated" if expert.gated else "plain"
    what = f"grouped_mm of {kind} {expert.hidden} x {expert.ffn} experts, forward and backward"
    amounts = ", ".join(f"{point.units:g}" for point in measured.gemm.points)
    sources["gpu.peak_flops"] = _source(measured, f"{what}, {amounts} tokens per expert", gemm)
    sources["gpu.memory_bytes"] = f"measured: the device's memory for each rank; {measured.how}"
    sources["gpu.memory_bandwidth_bytes_s"] = _source(measured, "copy in memory, read and written bytes", copy)
    bandwidth = 1 / copy.unit_s
    passes = gemm.fixed_s * bandwidth / expert.weight_bytes
    found = GpuSpec(
        name=measured.device,
        peak_flops=expert.flops_per_token / gemm.unit_s,
        memory_bytes=measured.memory_bytes,
        memory_bandwidth_bytes_s=bandwidth,
    )
    if measured.ranks_per_device > 1:
        sources["gpu.ranks_per_device"] = (
            f"measured: {what}, {measured.gemm.points[-1].units:g} tokens per expert, one of {measured.ranks_per_node} "
            f"ranks of a node alone over all at once on {measured.cores_per_node} cores; {measured.how}"
        )
        found = replace(found, ranks_per_device=measured.ranks_per_device)
    if passes <= 0:
        return found  # the line gives no fixed cost: the model's prior holds
    half = f"half of the full rate at {gemm.fixed_s / gemm.unit_s:.3g} tokens per expert"
    sources["gpu.weight_passes"] = _source(measured, f"{what}; {half}", gemm)
    return replace(found, weight_passes=passes)


def _link(
    measured: MachineMeasurement,
    link: str,
    path: str,
    lines: Mapping[str, LineFit],
    sources: dict[str, str],
    shares: dict[str, float],
) -> LinkSpec:
    """One link's numbers, and the shares of its bandwidth that the operations reach."""
    found = {op: lines[f"{op} {link}"] for op in COLLECTIVES}
    best = min(COLLECTIVES, key=lambda op: found[op].unit_s)
    among = f"among {measured.members[link]} ranks"
    sources[f"{path}.bandwidth_bytes_s"] = _source(measured, f"{_LABELS[best]} {among}", found[best])
    latency_of = next((op for op in ("send_recv", "all_to_all") if found[op].fixed_s > 0), "ring")
    sources[f"{path}.latency_s"] = _source(measured, f"{_LABELS[latency_of]} {among}", found[latency_of])
    for op in _SHARED:
        shares[f"{op}_{link}"] = found[best].unit_s / found[op].unit_s
        sources[f"efficiency.{op}_{link}"] = _source(
            measured, f"{_LABELS[op]} {among}, over {_LABELS[best]}", found[op]
        )
    return LinkSpec(
        bandwidth_bytes_s=1 / found[best].unit_s,
        latency_s=max(found[latency_of].fixed_s, 1e-9),  # a cluster file needs a positive number
        **_steps(measured, link, found, sources),
    )


def _steps(
    measured: MachineMeasurement, link: str, found: Mapping[str, LineFit], sources: dict[str, str]
) -> dict[str, float | None]:
    """Latencies of the steps of collectives; none between nodes, where groups in use are larger than the measured one
    and the model assumes trees."""
    steps: dict[str, float | None] = {}
    if link != "intra":
        return steps
    others = measured.members[link] - 1
    for op, collectives in (("ring", 2), ("all_to_all", 1)):
        if found[op].fixed_s > 0:
            name = f"{op}_latency_s"
            steps[name] = found[op].fixed_s / collectives / others
            what = f"{_LABELS[op]} among {others + 1} ranks, of each of its {collectives * others} steps"
            sources[f"{link}_node.{name}"] = _source(measured, what, found[op])
    return steps


def _unmeasured(link: str, nominal: ClusterSpec | None, sources: dict[str, str]) -> LinkSpec:
    """A link that was not measured: numbers of the shipped file, else an estimate."""
    why = "not measured, one rank per node" if link == "intra" else "not measured, one node"
    spec, estimate = _ESTIMATES[link]
    for number in ("bandwidth_bytes_s", "latency_s"):
        path = f"{link}_node.{number}"
        source = f"estimate: {estimate}" if nominal is None else nominal.sources.get(path, "unknown")
        sources[path] = f"{why}: {source}"
    if nominal is None:
        return spec
    return nominal.intra_node if link == "intra" else nominal.inter_node


def _source(measured: MachineMeasurement, what: str, line: LineFit) -> str:
    """The source of a number: what was measured, by how many ranks, how well the line fits, software and date."""
    ranks = measured.nodes * measured.ranks_per_node
    who = f"{ranks} ranks at once on {measured.nodes} x {measured.cores_per_node} cores" if ranks > 1 else "one rank"
    fit = f"line off by {line.residual:.1%} on average, {line.worst:.1%} at worst"
    return f"measured: {what}; {who}, medians of {measured.repeats}; {fit}; {measured.how}"


def _warnings(measured: MachineMeasurement, lines: Mapping[str, LineFit], half_rate: float) -> list[str]:
    """Reasons to doubt a number, each with what to do about it."""
    found = []
    for key, series in all_series(measured).items():
        line = lines[key]
        if line.poor:
            text = f"{key}: the line is off by {line.residual:.0%} on average, {line.worst:.0%} at worst"
            found.append(f"{text}; measure again on an idle machine, or with other --sizes or --tokens")
        noisy = [point for point in series.points if point.spread > NOISY_SPREAD]
        if len(noisy) * 2 > len(series.points):
            more = 2 * measured.repeats
            found.append(f"{key}: repeats differ by more than half of their median; try --repeats {more}")
    largest = max(point.units for point in measured.gemm.points)
    if largest < 2 * half_rate:
        found.append(
            f"gemm: half of the full rate at {half_rate:.0f} tokens, measured up to {largest:.0f}: "
            f"add {2 * half_rate:.0f} to --tokens"
        )
    for link, words in (("intra", "inside a node"), ("inter", "between nodes")):
        if not _has(measured, link):
            found.append(f"links {words}: not measured, there is no second rank; see their source in the file")
    for name, nodes in measured.levels.items():
        if not _has(measured, name):
            where = f"the job's {measured.nodes} nodes are in one domain of {nodes}"
            found.append(f"level {name}: not measured, {where}; without numbers in --compare it is left out")
    return found


def _rounded(cluster: ClusterSpec) -> ClusterSpec:
    """The numbers to 4 digits, as the file has them."""

    def four(value: float) -> float:
        return float(f"{value:.4g}") if math.isfinite(value) else value

    def numbers(spec: GpuSpec | LinkSpec) -> dict[str, Any]:
        return {name: four(value) for name, value in asdict(spec).items() if isinstance(value, float)}

    return replace(
        cluster,
        gpu=replace(cluster.gpu, **numbers(cluster.gpu)),
        intra_node=replace(cluster.intra_node, **numbers(cluster.intra_node)),
        inter_node=replace(cluster.inter_node, **numbers(cluster.inter_node)),
        levels=tuple(replace(level, link=replace(level.link, **numbers(level.link))) for level in cluster.levels),
        efficiency={name: four(share) for name, share in cluster.efficiency.items()},
    )
