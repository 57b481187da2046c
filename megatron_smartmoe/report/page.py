"""The page: headline, curves, balance, loads, placement, decisions, memory of where the run was made."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from megatron_smartmoe.report.account import CLOCKS, RunAccount, memory, parts_over_time, split, table
from megatron_smartmoe.report.binning import Loads, loads_of
from megatron_smartmoe.report.candidates import candidate_lines, prices
from megatron_smartmoe.report.charts import COLOURS, Line, heat_map, lines, stacked
from megatron_smartmoe.report.chosen import Chosen
from megatron_smartmoe.report.run_record import Balance, RunRecord, is_move, whole
from megatron_smartmoe.spec.placement import EMPTY

_MOST_DECISIONS = 400
_MOST_HEAT = 4.0  # loads from here on have the brightest colour


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A chart with its heading and a sentence below."""

    heading: str
    svg: str
    caption: str


@dataclass(frozen=True, kw_only=True)
class LayerView:
    """What the page shows of one layer.

    Attributes:
        number: from 1, as Megatron counts.
        summary: one line.
        pictures: heading, data URI, text for screen readers.
        begin: first iteration of the pictures.
        end: the last one.
        slots: of each rank: homes, replicas.
    """

    number: int
    summary: str
    pictures: tuple[tuple[str, str, str], ...]
    begin: int
    end: int
    slots: tuple[tuple[str, str], ...]


@dataclass(frozen=True, kw_only=True)
class AccountView:
    """What the page shows of where a step goes.

    Attributes:
        svg: parts of the step over iterations; dashed: the ideal's step.
        text: what the times are.
        share: of the ideal that was reached; empty without one.
        terms: what, ms, share of the step, how it is known.
        split: part, ms, share of the step, ms of the ideal.
        memory: what, GiB.
    """

    svg: str
    text: str
    share: str
    terms: list[tuple[str, str, str, str]]
    split: list[tuple[str, str, str, str]]
    memory: list[tuple[str, str]]


def page(runs: Sequence[RunRecord], *, accounts: Sequence[RunAccount | None] = (), refresh_s: int | None = None) -> str:
    """The HTML page of a run, or of two that are compared.

    Args:
        runs: the run; a second one is drawn dashed beside it.
        accounts: of the runs, where they have measured their steps.
        refresh_s: seconds after which a browser loads the page again; None for never.
    """
    run, *others = runs
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    template = environment.from_string((Path(__file__).parent / "page.html.j2").read_text(encoding="utf-8"))
    return template.render(
        run=run,
        others=others,
        refresh_s=refresh_s,
        headline=_headline(runs, accounts),
        account=_account(accounts[0]) if accounts and accounts[0] is not None else None,
        figures=[figure for figure in (_loss(runs), _speed(runs), _balance_chart(runs)) if figure is not None],
        balance=[(balance.layer + 1, *_balance_row(balance)) for balance in run.balance],
        layers=_layers(run),
        most_heat=_MOST_HEAT,
        decisions=[_decision(run, decision) for decision in run.decisions[-_MOST_DECISIONS:]],
        decisions_left_out=max(0, len(run.decisions) - _MOST_DECISIONS),
        plan=json.dumps(run.plan, indent=2) if run.plan else "",
        facts=_facts(run),
    )


def _account(found: RunAccount) -> AccountView:
    """What the page shows of where a step goes."""
    account, (iteration, parts) = found.account, parts_over_time(found)
    ideal_ms = None if account.ideal_s is None else account.ideal_s * 1e3
    title = "Milliseconds of a step by part over iterations"
    return AccountView(
        svg=stacked(iteration, parts, y_label="ms of a step", title=title, line=ideal_ms),
        text=f"{CLOCKS[account.basis]}, mean of {account.iterations} iterations",
        share=f"{account.share:.1%}" if account.share is not None else "",
        terms=table(account),
        split=split(account),
        memory=memory(found),
    )


def _median_interval(found: RunAccount | None, name: str, form: str) -> str:
    """Median over log intervals of a figure, where the run has it."""
    intervals = found.steps.intervals.values() if found is not None else ()
    values = [interval[name] for interval in intervals if interval[name] is not None]
    return form.format(np.median(values)) if values else ""


def _peak_memory(found: RunAccount | None) -> str:
    latest = found.latest if found is not None else {}
    return f"{latest['memory']['peak_bytes'] / 2**30:.2f}" if latest else ""


def _headline(runs: Sequence[RunRecord], accounts: Sequence[RunAccount | None]) -> list[tuple[str, list[str]]]:
    """Rows of name and a value per run."""
    rows = {
        "iterations": [_last_iteration(run) for run in runs],
        "training loss, nats per token": [_last(run, "lm loss", "{:.4f}") for run in runs],
        "validation loss, nats per token": [_last(run, "validation loss", "{:.4f}") for run in runs],
        "seconds per step, median": [_median(run, "seconds_per_step", "{:.3f}") for run in runs],
        "tokens per second, median": [_median(run, "tokens_per_second", "{:,.0f}") for run in runs],
        f"max / mean tokens per rank, {runs[0].compared[0]}": [_mean_balance(run, "homes") for run in runs],
        f"max / mean tokens per rank, {runs[0].compared[1]}": [_mean_balance(run, "split") for run in runs],
        "moves of experts taken": [_moves(run) for run in runs],
        "model TFLOP/s per rank, median": [
            _median_interval(found, "model_tflops_per_rank", "{:.3g}") for found in accounts
        ],
        "MFU of the cluster file's peak, median": [_median_interval(found, "mfu", "{:.1%}") for found in accounts],
        "peak memory of the fullest rank, GiB": [_peak_memory(found) for found in accounts],
        "share of the force-balanced ideal": [
            f"{found.account.share:.1%}" if found is not None and found.account.share is not None else ""
            for found in accounts
        ],
    }
    return [(name, values) for name, values in rows.items() if any(values)]


def _last_iteration(run: RunRecord) -> str:
    logged = [int(series.iteration[-1]) for series in run.metrics.values()]
    last = max(logged, default=int(run.summary.get("iterations", 0)))
    return f"{last:,}{'' if run.is_finished else ' so far'}"


def _last(run: RunRecord, name: str, form: str) -> str:
    return form.format(run.metrics[name].value[-1]) if name in run.metrics else ""


def _median(run: RunRecord, name: str, form: str) -> str:
    return form.format(np.median(run.metrics[name].value)) if name in run.metrics else ""


def _mean_balance(run: RunRecord, which: str) -> str:
    if not run.balance:
        return ""
    return f"{np.mean([getattr(balance, which).mean() for balance in run.balance]):.3f}"


def _moves(run: RunRecord) -> str:
    taken = sum(decision["kind"] == "homes" and bool(decision["taken"]) for decision in run.decisions)
    reverted = sum(decision["kind"] == "review" and bool(decision["changes"]) for decision in run.decisions)
    return f"{taken}" + (f", {reverted} reverted" if reverted else "") if run.decisions else ""


def _curves(runs: Sequence[RunRecord], names: Sequence[tuple[str, str]]) -> list[Line]:
    """A line per run and metric."""
    return [
        Line(
            name=label + (f", {run.name}" if len(runs) > 1 else ""),
            iteration=run.metrics[name].iteration,
            value=run.metrics[name].value,
            colour=COLOURS[at % len(COLOURS)],
            dashed=number > 0,
        )
        for number, run in enumerate(runs)
        for at, (name, label) in enumerate(names)
        if name in run.metrics
    ]


def _move_marks(run: RunRecord) -> list[float]:
    return [float(one["iteration"]) for one in run.decisions if is_move(one)]


def _loss(runs: Sequence[RunRecord]) -> Figure | None:
    curves = _curves(runs, [("lm loss", "training"), ("validation loss", "validation")])
    if not curves:
        return None
    svg = lines(curves, y_label="nats per token", title="Loss over iterations", at_least=float("nan"))
    return Figure(heading="Loss", svg=svg, caption="As logged; balancing does not change it.")


def _speed(runs: Sequence[RunRecord]) -> Figure | None:
    curves = _curves(runs, [("seconds_per_step", "step")])
    if not curves:
        return None
    svg = lines(curves, y_label="seconds", title="Seconds of a step over iterations", marks=_move_marks(runs[0]))
    return Figure(
        heading="Step time",
        svg=svg,
        caption="Measured; means between two log lines. Dotted: homes moved or moved back.",
    )


def _balance_chart(runs: Sequence[RunRecord]) -> Figure | None:
    curves = []
    for number, run in enumerate(runs):
        if run.balance:
            iterations = np.unique(np.concatenate([balance.iteration for balance in run.balance]))
            for at, (which, label) in enumerate(zip(("split", "homes"), reversed(run.compared), strict=True)):
                worst = [
                    max(getattr(one, which)[one.iteration == iteration].max(initial=1.0) for one in run.balance)
                    for iteration in iterations
                ]
                name = label + (f", {run.name}" if len(runs) > 1 else "")
                value = np.array(worst)
                curves.append(Line(name=name, iteration=iterations, value=value, colour=COLOURS[at], dashed=number > 0))
    if not curves:
        return None
    svg = lines(curves, y_label="max / mean tokens per rank", title="Balance over iterations", at_least=1.0)
    return Figure(heading="Balance", svg=svg, caption="The worst layer, micro-batch and group; 1 is an even load.")


def _balance_row(balance: Balance) -> tuple[str, str, str, str]:
    return (
        f"{balance.homes.mean():.3f}",
        f"{balance.split.mean():.3f}",
        f"{balance.split.max():.3f}",
        "" if balance.replicas is None else f"{balance.replicas.mean():.1f}",
    )


def _layers(run: RunRecord) -> list[LayerView]:
    """Loads over time where the counts were recorded, and where the experts are."""
    ranks = whole(run.arguments, "expert_model_parallel_size") or 1
    loads: dict[int, Loads] = {}
    if run.trace is not None and run.trace.num_experts % ranks == 0:
        loads = {one.layer: one for one in loads_of(run.trace, ranks)}
    placed = range(run.placement.num_layers) if run.placement is not None else range(0)
    return [_layer(run, layer, loads.get(layer)) for layer in sorted({*loads, *placed})]


def _layer(run: RunRecord, layer: int, load: Loads | None) -> LayerView:
    pictures: list[tuple[str, str, str]] = []
    summary, begin, end = "", 0, 0
    if load is not None:
        hottest = int(np.argmax(load.expert_BE.mean(axis=0)))
        peak = float(load.expert_BE[:, hottest].mean())
        summary = (
            f"hottest expert {hottest}: {peak:.2f} times an even share; busiest rank without balancing: "
            f"{load.mean_B.mean():.2f} times the mean, at worst {load.worst_B.max():.2f}"
        )
        begin, end = int(load.starts[0]), int(load.starts[-1])
        for heading, values in (("experts", load.expert_BE), ("ranks, without balancing", load.rank_BR)):
            text = (
                f"Layer {layer + 1}: load of {values.shape[1]} {heading} over iterations {begin} to {end}. {summary}."
            )
            rows = f"{heading.capitalize()}: 0 at the top to {values.shape[1] - 1} at the bottom"
            pictures.append((rows, heat_map(values, _MOST_HEAT), text))
    slots = []
    if run.placement is not None and layer < run.placement.num_layers:
        homes = run.placement.home_slots
        for row in run.placement.slots_LRS[layer].tolist():
            replicas = ", ".join(str(expert) for expert in row[homes:] if expert != EMPTY)
            slots.append((", ".join(map(str, row[:homes])), replicas))
    return LayerView(
        number=layer + 1, summary=summary, pictures=tuple(pictures), begin=begin, end=end, slots=tuple(slots)
    )


def _decision(run: RunRecord, decision: dict[str, Any]) -> dict[str, Any]:
    """A row of the table of decisions."""

    def milliseconds(name: str) -> str:
        value = decision.get(name)
        return "" if value is None else f"{value * 1e3:+.3f}"

    changes = decision.get("changes") or []
    kind = decision["kind"]
    if kind == "pool":
        what = f"{decision['before']} to {decision['after']}" if decision["taken"] else f"{decision['before']} stays"
    elif kind == "review":
        what = "moved back" if changes else "kept"
    else:
        slots = run.placement.home_slots if run.placement is not None else None  # those behind them are replicas
        homes = [change for change in changes if slots is None or change[2] < slots]
        experts = len({(change[0], change[4]) for change in homes if change[4] != EMPTY})
        what = f"{experts} expert{'' if experts == 1 else 's'}"
    return {
        "iteration": f"{decision['iteration']:,}",
        "kind": kind,
        "what": what,
        "verdict": "taken" if decision["taken"] else "refused",
        "predicted": milliseconds("predicted_gain_s"),
        "found": milliseconds("realised_gain_s"),
        "why": str(decision["why"]),
        "candidates": candidate_lines(decision) if decision.get("candidates") else [],
        "prices": prices(decision),
    }


def _exchange(chosen: Chosen | None) -> str:
    if chosen is None:
        return ""
    chunks = f"{chosen.overlap_degree} chunk{'' if chosen.overlap_degree == 1 else 's'}"
    return f"{chosen.dispatch} dispatch in {chunks}, {chosen.ranks_per_node} ranks a node"


def _facts(run: RunRecord) -> list[tuple[str, str]]:
    """Where the run was made."""
    environment = run.environment
    versions = {name: value for name, value in environment.get("versions", {}).items() if value}
    facts = {
        "started": str(environment.get("time", "")),
        "host": str(environment.get("host", "")),
        "revision": str(environment.get("git", "")),
        "versions": ", ".join(f"{name} {value}" for name, value in versions.items()),
        "command line": " ".join(map(str, environment.get("argv", []))),
        "exchange of tokens": _exchange(run.chosen),
    }
    return [(name, value) for name, value in facts.items() if value]
