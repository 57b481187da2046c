"""A report as lines: parameters per stage, memory, samples."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_smartmoe.adapter.rehearsal.request import DataReport, Report, StageReport


def lines_of(report: Report) -> Iterator[str]:
    """What a rehearsal saw, for people. Without quotation marks: a dry run prints it beside a command."""
    for stage in report.stages:
        yield _stage(stage)
    if report.memory:
        total = sum(size for _, size in report.memory)
        parts = ", ".join(f"{what} {_bytes(size)}" for what, size in report.memory)
        yield f"memory of the fullest rank, predicted: {_bytes(total)} ({parts.replace(chr(39), '')})"
    for data in report.data:
        if data.asked != 0:
            yield _data(data)
    for note in report.notes:
        yield f"note: {note.replace(chr(39), '')}"


def _stage(report: StageReport) -> str:
    stages = report.stages
    ranges = f"{stages[0]}" if len(stages) == 1 else f"{stages[0]} to {stages[-1]}"
    if len(stages) > 1 and stages != tuple(range(stages[0], stages[-1] + 1)):
        ranges = ", ".join(map(str, stages))
    layers = [f"{report.moe_layers} MoE"] if report.moe_layers else []
    layers += [f"{report.dense_layers} dense"] if report.dense_layers else []
    count = report.dense_layers + report.moe_layers
    each = " each" if len(stages) > 1 else ""
    what = f"{' and '.join(layers) or 'no'} layer{'s' * (count != 1)}"
    return f"pipeline stage{'s' * (len(stages) > 1)} {ranges}: {what}, {report.parameters:,} parameters per rank{each}"


def _data(report: DataReport) -> str:
    asked = "all samples" if report.asked is None else f"{report.asked:,} samples"
    if report.epoch is None:
        return f"{report.split} data: {asked}"
    passes = "" if report.asked is None or not report.epoch else f": {report.asked / report.epoch:.3g} epochs"
    return f"{report.split} data: {asked}, {report.epoch:,} in an epoch{passes}"


def _bytes(size: float) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"
