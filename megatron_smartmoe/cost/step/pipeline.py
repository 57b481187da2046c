"""Pipeline schedules: from the time of a micro-batch on each stage to the time of all of them.

Method. Under 1F1B (Narayanan et al. 2021) the slowest stage works without a gap once it has begun, and begins and ends
late by what one micro-batch needs on the other stages: m x slowest + sum of the others. Interleaving with v chunks per
stage fills and drains in chunks, so that sum shrinks to 1 / v. Equal stages give the usual (p - 1) / (v m) bubble;
stages that differ (embedding, loss, a dense layer in front) are why this is not a formula with p in it.
"""

from __future__ import annotations

from collections.abc import Sequence

from megatron_smartmoe.cost.compute import time_shared


def schedule_s(
    stage_s: Sequence[float], micro_batches: int, virtual: int, ranks_per_device: float = 1.0
) -> tuple[float, float, int]:
    """(seconds of the schedule, bubble, slowest stage): the bubble is what the slowest stage waits.

    Where stages share a device (CPU ranks on fewer cores), the others are `ranks_per_device` times as fast while one
    waits: if the stages wait in turn, for the sum of what each of them waits; but the schedule never ends before all
    work has been shared out. The bubble may then be negative: the slowest stage is faster than it would be beside
    others that never wait.

    Args:
        stage_s: forward and backward of one micro-batch on each stage, all its chunks.
        micro_batches: m.
        virtual: chunks per stage.
        ranks_per_device: see `GpuSpec`.
    """
    slowest = max(range(len(stage_s)), key=lambda stage: stage_s[stage])
    bubble_s = (sum(stage_s) - stage_s[slowest]) / virtual
    work_s = micro_batches * stage_s[slowest]
    total_s = work_s + bubble_s
    if ranks_per_device > 1:
        works_s = [micro_batches * each for each in stage_s]
        waiting_s = min(sum(total_s - each for each in works_s), total_s)
        saved_s = (1 - 1 / ranks_per_device) * waiting_s
        total_s = max(total_s - saved_s, time_shared(works_s, ranks_per_device))
    return total_s, total_s - work_s, slowest


def in_flight(stage: int, stages: int, virtual: int, micro_batches: int) -> int:
    """Chunks' worth of activations that a stage holds at its fullest (one chunk of one micro-batch counts one).

    Megatron's warm-up forwards plus the one in hand: p - s for 1F1B; 2 (p - s - 1) + (v - 1) p + 1 interleaved.
    """
    if stages == 1:
        return 1
    if virtual == 1:
        return min(micro_batches, stages - stage)
    return min(micro_batches * virtual, 2 * (stages - stage - 1) + (virtual - 1) * stages + 1)
