"""The measurements as a table: points and lines, then the file's numbers beside nominal ones."""

from __future__ import annotations

from megatron_smartmoe.calibrate.cluster_file import MachineFit, all_series
from megatron_smartmoe.calibrate.measurement import MachineMeasurement
from megatron_smartmoe.cost.moe_layer import GEMM_EFFICIENCY, MEMORY_EFFICIENCY, exchange_bytes_s
from megatron_smartmoe.spec.cluster import ClusterSpec


def as_table(measured: MachineMeasurement, fit: MachineFit, nominal: ClusterSpec | None) -> str:
    """All points, the lines through them, the comparison with `nominal`, and the warnings."""
    ranks = f"{measured.nodes} x {measured.ranks_per_node} ranks"
    parts = [f"{measured.device}, {ranks} at once, {measured.how}", _points(measured, fit), _numbers(measured, fit)]
    if nominal is not None:
        parts.append(compared(fit.cluster, nominal))
    parts.append("\n".join(f"warning: {warning}" for warning in fit.warnings))
    return "\n\n".join(part for part in parts if part)


def compared(found: ClusterSpec, nominal: ClusterSpec) -> str:
    """The rates that the cost model uses with the measured file and with a nominal one, efficiencies included."""
    rows = [("products", "FLOP/s", _flops(found), _flops(nominal))]
    rows.append(("memory", "B/s", _memory(found), _memory(nominal)))
    rows.append(("memory of a rank", "B", found.gpu.memory_bytes, nominal.gpu.memory_bytes))
    for words, between in (("exchange inside a node", False), ("exchange between nodes", True)):
        here, there = (exchange_bytes_s(each, between_nodes=between) for each in (found, nominal))
        rows.append((words, "B/s", here, there))
    rows.append(("latency inside a node", "s", found.intra_node.latency_s, nominal.intra_node.latency_s))
    rows.append(("latency between nodes", "s", found.inter_node.latency_s, nominal.inter_node.latency_s))
    lines = [f"compared with {nominal.name}: rates that the cost model uses, efficiencies included"]
    lines.append(f"  {'':<24} {'measured':>14} {'nominal':>14}   measured / nominal")
    for words, unit, here, there in rows:
        lines.append(f"  {words:<24} {_si(here, unit):>14} {_si(there, unit):>14}   {here / there:.2f}x")
    return "\n".join(lines)


def _points(measured: MachineMeasurement, fit: MachineFit) -> str:
    """A row per point: measured and fitted time, their difference, spread of the repeats, and the rate."""
    rows = [f"{'':<17} {'amount':>11} {'measured':>10} {'line':>10} {'off':>7} {'spread':>7} {'rate':>14}"]
    for key, series in all_series(measured).items():
        line = fit.lines[key]
        for at, point in enumerate(series.points):
            rate = point.units / point.time_s
            amount, shown = _si(point.units, "B"), _si(rate, "B/s")
            if key == "gemm":
                amount = f"{point.units:g} tokens"
                shown = _si(rate * measured.expert.flops_per_token, "FLOP/s")
            expected_s = line.at(point.units)
            rows.append(
                f"{'' if at else key:<17} {amount:>11} {_si(point.time_s, 's'):>10} {_si(expected_s, 's'):>10} "
                f"{expected_s / point.time_s - 1:>+7.1%} {point.spread:>7.1%} {shown:>14}"
            )
    return "\n".join(rows)


def _numbers(measured: MachineMeasurement, fit: MachineFit) -> str:
    """The rate and the fit of each line."""
    rows = []
    for key, line in fit.lines.items():
        if key == "gemm":
            flops = measured.expert.flops_per_token / line.unit_s
            says = f"{_si(flops, 'FLOP/s')}, half of it at {fit.half_rate_tokens:.3g} tokens per expert"
        else:
            says = _si(1 / line.unit_s, "B/s") + (f" after {_si(line.fixed_s, 's')}" if line.fixed_s else "")
        poor = "  POOR" if line.poor else ""
        rows.append(f"  {key:<17} {says}; line off by {line.residual:.1%}, worst {line.worst:.1%}{poor}")
    if measured.ranks_per_device > 1:
        rows.append(f"  {'one rank alone':<17} {measured.ranks_per_device:.2f} times as fast: ranks share cores")
    rows += [f"  {what:<17} {_si(rate, 'B/s')} (not in the file)" for what, rate in measured.extra.items()]
    rows.append(f"  {'memory':<17} {_si(measured.memory_bytes, 'B')} for each rank")
    return "\n".join(["lines:", *rows])


def _si(value: float, unit: str) -> str:
    """Up to four digits and a prefix: 1.25 GB/s, 8 us."""
    prefixes = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, ""), (1e-3, "m"), (1e-6, "u"))
    scale, prefix = next((each for each in prefixes if value >= each[0] * 0.9995), (1e-9, "n"))
    return f"{value / scale:.4g} {prefix}{unit}"


def _flops(cluster: ClusterSpec) -> float:
    return cluster.gpu.peak_flops * cluster.efficiency.get("gemm", GEMM_EFFICIENCY)


def _memory(cluster: ClusterSpec) -> float:
    return cluster.gpu.memory_bandwidth_bytes_s * cluster.efficiency.get("memory", MEMORY_EFFICIENCY)
