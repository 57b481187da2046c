"""What a decision chose between, in words: for `smartmoe explain` and the page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Candidate = dict[str, Any]

NOT_RECORDED = "not recorded: the run is of an earlier version"
_NOTHING = {  # what changing nothing is, by kind, where it is not among the candidates
    "homes": "change nothing",
}


def candidate_lines(decision: dict[str, Any], layer: int | None = None) -> list[str]:
    """A line per candidate, the one that was proposed marked with `>`.

    Args:
        decision: a line of the log.
        layer: the only layer to show, from 1; None for all.
    """
    shown = _of_layer(decision, layer)
    if not decision.get("candidates"):
        return [NOT_RECORDED] if decision["kind"] in ("homes", "replicas", "replans") else []
    names = [*(one["name"] for one in shown), *_nothing(decision)]
    width = max(map(len, names), default=0)
    lines = [
        f"{'>' if one['chosen'] else ' '} {one['name']:<{width}}  {price(one, decision)}".rstrip() for one in shown
    ]
    return [*lines, *(f"  {name:<{width}}  saves nothing, costs nothing" for name in _nothing(decision))]


def _of_layer(decision: dict[str, Any], layer: int | None) -> Sequence[Candidate]:
    candidates: Sequence[Candidate] = decision.get("candidates", ())
    return [one for one in candidates if layer is None or one.get("layer") is None or one["layer"] + 1 == layer]


def _nothing(decision: dict[str, Any]) -> list[str]:
    return [_NOTHING[decision["kind"]]] if decision["kind"] in _NOTHING else []


def runner_up(decision: dict[str, Any], layer: int | None = None) -> str:
    """The best candidate that was not proposed, and by how much it is worse; empty where there is none.

    Args:
        decision: a line of the log.
        layer: the only layer to show, from 1; None for all.
    """
    candidates = _of_layer(decision, layer)
    others = [one for one in candidates if not one["chosen"]]
    chosen = [one for one in candidates if one["chosen"]]
    if not chosen:
        return ""
    if not others:
        return _NOTHING.get(decision["kind"], "")
    best = min(others, key=lambda one: _cost(one, decision))
    worse = _cost(best, decision) - min(_cost(one, decision) for one in chosen)
    if worse < 0 and decision["kind"] == "replicas":  # suspended in spite of the forecast: past ones were wrong
        return f"{best['name']}, {-worse:,.0f} tokens better if the forecast is right"
    unit = f"{worse:,.0f} tokens" if "busiest_tokens" in best else f"{worse * 1e3:.3f} ms per iteration"
    return f"{best['name']}, {unit} worse"


def _cost(one: Candidate, decision: dict[str, Any]) -> float:
    """What candidates are compared by, less is better: tokens with transfers priced, or seconds per iteration."""
    if "busiest_tokens" in one:
        return float(one["busiest_tokens"] + _transfer_tokens(one, decision))
    cost_s = one.get("cost_s", 0.0) * decision.get("margin", 1.0) / decision.get("horizon_iterations", 1)
    return float(cost_s - one.get("gain_s", 0.0))


def _transfer_tokens(one: Candidate, decision: dict[str, Any]) -> float:
    """Tokens that take as long as the transfers: all at one price, unless they are priced together."""
    return float(one.get("transfer_tokens", one.get("transfers", 0) * decision.get("price_tokens", 0.0)))


def price(one: Candidate, decision: dict[str, Any]) -> str:
    """The figures of a candidate, with their units."""
    if "busiest_tokens" in one:
        transfers, tokens = one.get("transfers", 0), one["busiest_tokens"]
        priced = _transfer_tokens(one, decision)
        worth = f", worth {tokens + priced:,.0f} tokens with the transfers" if priced else ""
        per = "a micro-batch" if decision["kind"] == "replans" else "an iteration"
        return f"busiest rank {tokens:,.0f} tokens {per}, {_number(transfers, 'replica transfer')} in a row{worth}"
    parts = []
    if "step_s" in one:
        parts.append(f"a step of {one['step_s'] * 1e3:.1f} ms")
    if "gain_s" in one:
        terms = {"computation": "compute_s", "sending tokens": "traffic_s", "replicas": "replicas_s"}
        split = ", ".join(f"{name} {one[key] * 1e3:+.3f}" for name, key in terms.items() if key in one)
        parts.append(f"saves {one['gain_s'] * 1e3:+.3f} ms per iteration{f' ({split})' if split else ''}")
    if one.get("cost_s"):
        parts.append(f"costs {one['cost_s'] * 1e3:.3f} ms once")
    return ", ".join(parts)


def prices(decision: dict[str, Any]) -> str:
    """The rule that the figures were judged by; empty where it is not recorded."""
    if decision.get("horizon_iterations") is not None:
        return (
            f"a gain counts over {decision['horizon_iterations']:,} iterations, and must be more than "
            f"{decision['margin']:g} times the cost"
        )
    if decision.get("price_tokens") == 0:
        return "replica transfers count as nothing: computation hides them, or --smartmoe-replicas-margin is 0"
    if decision.get("price_tokens") is not None:
        return f"a replica transfer takes as long as {decision['price_tokens']:,.0f} tokens of the busiest rank"
    return ""


def _number(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
