"""Pipeline schedules: from the time of a micro-batch on each stage to the time of all of them.

Method. Under 1F1B (Narayanan et al. 2021) the slowest stage works without a gap once it has begun, and begins and ends
late by what one micro-batch needs on the other stages: m x slowest + sum of the others. Interleaving with v chunks per
stage fills and drains in chunks, so that sum shrinks to 1 / v. Equal stages give the usual (p - 1) / (v m) bubble;
stages that differ (embedding, loss, a dense layer in front) are why this is not a formula with p in it.
"""

from __future__ import annotations

from collections.abc import Sequence


def schedule_s(stage_s: Sequence[float], micro_batches: int, virtual: int) -> tuple[float, float, int]:
    """(all of it, bubble, slowest stage): the bubble is what the slowest stage waits.

    Args:
        stage_s: forward and backward of one micro-batch on each stage, all its chunks.
        micro_batches: m.
        virtual: chunks per stage.
    """
    slowest = max(range(len(stage_s)), key=lambda stage: stage_s[stage])
    bubble_s = (sum(stage_s) - stage_s[slowest]) / virtual
    return micro_batches * stage_s[slowest] + bubble_s, bubble_s, slowest


def in_flight(stage: int, stages: int, virtual: int, micro_batches: int) -> int:
    """Chunks' worth of activations that a stage holds at its fullest (one chunk of one micro-batch counts one).

    Megatron's warm-up forwards plus the one in hand: p - s for 1F1B; 2 (p - s - 1) + (v - 1) p + 1 interleaved.
    """
    if stages == 1:
        return 1
    if virtual == 1:
        return min(micro_batches, stages - stage)
    return min(micro_batches * virtual, 2 * (stages - stage - 1) + (virtual - 1) * stages + 1)
