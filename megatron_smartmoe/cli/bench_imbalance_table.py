"""The tables of `smartmoe bench-imbalance`: as text, and as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from megatron_smartmoe.simulate.imbalance import fastest

_WITHIN = 0.01  # a time this near to the fastest one is level with it
_OURS = "smartmoe-"
AUTO = "smartmoe-auto"

Row = dict[str, Any]


def as_text(rows: Sequence[Row]) -> str:
    """One table per series and cluster, and below it where ours is not among the fastest."""
    parts = []
    for title, what, lines, verdicts in _tables(rows):
        widths = [max(len(line[at]) for line in lines) for at in range(len(lines[0]))]
        text = ["  ".join(_aligned(cell, at, widths[at]) for at, cell in enumerate(line)).rstrip() for line in lines]
        parts.append("\n".join([f"{title}: {what}", "", *text, "", *verdicts]))
    return "\n\n".join(parts)


def as_markdown(rows: Sequence[Row]) -> str:
    """The same tables."""
    parts = ["# Results of the imbalance benchmark"]
    for title, what, lines, verdicts in _tables(rows):
        head, *body = [f"| {' | '.join(cell.strip() for cell in line)} |" for line in lines]
        rule = "|---|" + "---:|" * (len(lines[0]) - 1)
        parts.append(
            "\n".join(
                [
                    f"## {title}",
                    "",
                    f"{what[:1].upper()}{what[1:]}.",
                    "",
                    head,
                    rule,
                    *body,
                    "",
                    *(f"- {verdict}" for verdict in verdicts),
                ]
            )
        )
    return "\n\n".join(parts) + "\n"


def _aligned(cell: str, column: int, width: int) -> str:
    return f"{cell:<{width}}" if column == 0 else f"{cell:>{width}}"


def _tables(rows: Sequence[Row]) -> list[tuple[str, str, list[list[str]], list[str]]]:
    """Title, what a cell is, cells and verdicts of each series and cluster."""
    keys = list(dict.fromkeys((row["series"], row["cluster"]) for row in rows))
    return [_table([row for row in rows if (row["series"], row["cluster"]) == key]) for key in keys]


def _table(rows: Sequence[Row]) -> tuple[str, str, list[list[str]], list[str]]:
    """Rules by workloads; a cell is the predicted time over that of an even load."""
    workloads = list(dict.fromkeys(row["workload_id"] for row in rows))
    rules = list(dict.fromkeys(row["backend"] for row in rows))
    found = {(row["workload_id"], row["backend"]): row for row in rows}
    first = [found[name, rules[0]] for name in workloads]
    spare = max(row["spare_slots"] for row in rows)
    title = f"{first[0]['series']} series on {first[0]['cluster']}".capitalize()
    what = (
        "predicted time of a layer over that of an even load; "
        f"{first[0]['num_experts']} experts, top-{first[0]['topk']}, EP {first[0]['ep']} on "
        f"{first[0]['num_nodes']} node{'s' if first[0]['num_nodes'] > 1 else ''}, "
        f"{spare} spare slot{'s' if spare != 1 else ''} per rank, {first[0]['steps']} steps"
    )
    lines = [
        ["rule", *(name.split("_")[0] for name in workloads), "mean", "max/mean", "replicas", "plan ms"],
        ["tokens per rank, max/mean", *(f"{row['overload_before']:.2f}" for row in first), "", "", "", ""],
        ["even load, ms", *(f"{row['even_load_ms']:.2f}" for row in first), "", "", "", ""],
    ]
    for rule in rules:
        mine = [found[name, rule] for name in workloads]
        over = [row["modelled_ms"] / row["even_load_ms"] for row in mine]
        lines.append(
            [
                rule,
                *(f"{value:.3f}" for value in over),
                f"{np.mean(over):.3f}",
                f"{np.mean([row['overload_after'] for row in mine]):.3f}",
                f"{np.mean([row['replicas_per_step'] for row in mine]):.1f}",
                f"{np.mean([row['plan_ms'] for row in mine]):.2f}",
            ]
        )
    return title, what, lines, _verdicts(workloads, rules, found)


def _verdicts(workloads: Sequence[str], rules: Sequence[str], found: dict[tuple[str, str], Row]) -> list[str]:
    """What the workloads are called, and each one whose fastest rule is a peer's by more than 1%."""
    legend = "; ".join(f"{name.split('_')[0]} {name.split('_', 1)[1].replace('_', ' ')}" for name in workloads)
    lines = [f"workloads: {legend}"]
    ours = [rule for rule in rules if rule.startswith(_OURS)]
    peers = [rule for rule in rules if not rule.startswith(_OURS)]
    if not ours or not peers:
        return lines
    behind, auto_behind = [], []
    for name in workloads:
        best, peer = (fastest([found[name, rule] for rule in of]) for of in (ours, peers))
        share = best["modelled_ms"] / peer["modelled_ms"] - 1
        if share > _WITHIN:
            behind.append(f"{name}: {peer['backend']} is {share:.1%} ahead of {best['backend']}")
        if AUTO in ours:
            first = fastest([found[name, rule] for rule in rules])
            share = found[name, AUTO]["modelled_ms"] / first["modelled_ms"] - 1
            if share > _WITHIN:
                auto_behind.append(f"{name.split('_')[0]} {share:.1%} behind {first['backend']}")
    level = f"the best of smartmoe's modes is first, or within {_WITHIN:.0%} of the first, on every workload"
    alone = f"{AUTO} alone: {', '.join(auto_behind) or f'within {_WITHIN:.0%} of the first on every workload'}"
    return [*lines, *(behind or [level]), *([alone] if AUTO in ours else [])]
