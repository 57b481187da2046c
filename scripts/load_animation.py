#!/usr/bin/env python3
"""docs/load.svg: tokens of each rank, step by step, without balancing and with it; `python -m scripts.load_animation`.

The load is the drifting workload of the imbalance benchmark with a burst every eighth step; the plans are those of
`smartmoe simulate`. One file of CSS animations, which stands still where the reader's system asks for less motion.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from megatron_smartmoe.cli.policies import own_policy, setup_of
from megatron_smartmoe.cli.simulate_prices import DEFAULT_CLUSTER, Prices
from megatron_smartmoe.cost.compute import ExpertShape
from megatron_smartmoe.placement.layer_plan import evaluate
from megatron_smartmoe.simulate.workloads import corrected
from megatron_smartmoe.spec.arrays import FloatArray
from megatron_smartmoe.spec.placement import Placement

PATH = Path(__file__).parents[1] / "docs" / "load.svg"
RANKS, EXPERTS, STEPS, WARMUP = 8, 64, 24, 4
SHAPE = corrected.Shape(num_experts=EXPERTS, top_k=8, tokens=4096, num_ranks=RANKS, micro_batches=1)
SECONDS_A_STEP = 0.5
WIDTH, HEIGHT, BASE, UNIT = 960, 300, 240, 60  # of the picture; of the bars' foot; pixels of an even share
PANELS = ((60, "without balancing", "#0072B2"), (540, "homes and replicas", "#D55E00"))


def loads() -> tuple[FloatArray, FloatArray]:
    """Tokens of each rank over the mean, `[steps, R]`, without balancing and with it."""
    counts_NRE = corrected.counts("C11_drift", SHAPE, STEPS + WARMUP, seed=7)[:, :, 0]
    burst_NRE = corrected.counts("C1_hot_contiguous", SHAPE, STEPS + WARMUP, seed=7)[:, :, 0]
    counts_NRE[WARMUP + 7 :: 8] = burst_NRE[WARMUP + 7 :: 8]
    prices = Prices(
        cluster=DEFAULT_CLUSTER,
        expert=ExpertShape(hidden=4096, ffn=1536),
        num_ranks=RANKS,
        num_nodes=1,
        micro_batches=1,
        rank_tokens=SHAPE.tokens * SHAPE.top_k,
        margin=0.0,
    )
    setup = setup_of(prices, spare_slots=2, warmup=0)
    placement = Placement.contiguous(num_layers=1, num_experts=EXPERTS, num_ranks=RANKS, spare_slots=2)
    policy = own_policy("auto", placement, 1, setup, prices, homes_interval=8)
    before, after = [], []
    for step, counts_RE in enumerate(counts_NRE):
        policy.before(step)
        tokens_R = evaluate(policy.plan(0, 0, counts_RE).plan, counts_RE).load_ER.sum(axis=0)
        before.append(counts_RE.sum(axis=0).reshape(RANKS, -1).sum(axis=1))
        after.append(tokens_R)
        policy.observe(counts_RE[None, None, None])
    return tuple(np.array(each[WARMUP:]) / np.mean(each[WARMUP:]) for each in (before, after))  # type: ignore[return-value]


def draw() -> str:
    """The picture."""
    duration = STEPS * SECONDS_A_STEP
    style = [f"rect {{ transform-origin: 0 {BASE}px; animation: {duration:g}s ease-in-out infinite; }}"]
    style.append("@media (prefers-reduced-motion: reduce) { rect { animation: none !important; } }")
    shapes = []
    for panel, ((left, name, colour), load_NR) in enumerate(zip(PANELS, loads(), strict=True)):
        worst = load_NR.max(axis=1)
        shapes.append(_text(left, 28, f"{name}: {worst.mean():.2f} at the busiest rank", colour, weight="bold"))
        for rank in range(RANKS):
            key, x = f"b{panel}{rank}", left + rank * 46
            frames = [
                f"{100 * step / STEPS:.2f}% {{ transform: scaleY({load:.3f}); }}"
                for step, load in enumerate(load_NR[:, rank])
            ]
            frames.append(f"100% {{ transform: scaleY({load_NR[0, rank]:.3f}); }}")
            style.append(f"@keyframes {key} {{ {' '.join(frames)} }}")
            style.append(f"#{key} {{ animation-name: {key}; transform: scaleY({load_NR[0, rank]:.3f}); }}")
            shapes.append(f'<rect id="{key}" x="{x}" y="{BASE - UNIT}" width="36" height="{UNIT}" fill="{colour}"/>')
            shapes.append(_text(x + 18, BASE + 20, str(rank), anchor="middle"))
        right, even = left + RANKS * 46, BASE - UNIT
        shapes.append(
            f'<line x1="{left - 8}" y1="{even}" x2="{right}" y2="{even}" stroke="#777" stroke-dasharray="4 4"/>'
        )
        shapes.append(_text(left - 12, even + 5, "1", anchor="end"))
        shapes.append(_text(left + RANKS * 23, BASE + 44, "rank; height: tokens over the mean", anchor="middle"))
    description = (
        f"Bars of the tokens of {RANKS} ranks over {STEPS} steps. Without balancing they differ and change; with homes "
        "and replicas they stay near the mean."
    )
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-labelledby="t d" '
        'font-family="Helvetica, Arial, sans-serif" font-size="15">'
    )
    lines = [head, '<title id="t">Load of a layer before and after balancing</title>']
    lines += [f'<desc id="d">{description}</desc>', "<style>", *style, "</style>"]
    lines += [f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff" style="animation: none"/>', *shapes, "</svg>"]
    return "\n".join(lines) + "\n"


def _text(x: float, y: float, text: str, colour: str = "#333", *, anchor: str = "start", weight: str = "normal") -> str:
    return f'<text x="{x}" y="{y}" fill="{colour}" text-anchor="{anchor}" font-weight="{weight}">{text}</text>'


if __name__ == "__main__":
    PATH.write_text(draw(), encoding="utf-8")
    print(f"written: {PATH}")
