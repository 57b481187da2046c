"""Seconds to plan the replicas of one micro-batch and layer: on the host, or on the GPU where the counts are.

The host's time is a line through what `scripts/bench_placement.py --host` has measured (docs/benchmarks.md): one call
of the compiled library. The GPU's has not been measured. Its kernel is one warp, whose lanes exchange numbers step
after step: the steps are a line through what the tests' emulator counts (docs/log.md), and a step's cycles are an
estimate. What follows from the plan, in small operations, is launched one after the other.
"""

from __future__ import annotations

HOST_BASE_S, HOST_SLOT_S = 45e-6, 0.2e-6  # measured on an AMD EPYC core; slots of all ranks
STEPS_PER_REPLICA, STEPS_PER_REPLICA_AND_RANK = 65.0, 2.7
LANE_STEPS_PER_SLOT = 6.0  # of loops that one lane runs over all slots
STEP_S = 30 / 1.7e9  # cycles of a dependent exchange or read of shared memory, at a GPU's clock: an estimate
LAUNCHES = 70.0  # of the small operations behind the kernel: tests/megatron/test_meta_layer.py counts them


def host_plan_s(*, ranks: int, experts: int, spare_slots: int) -> float:
    """Seconds of a plan on the host.

    Args:
        ranks: of the expert-parallel group.
        experts: of the layer.
        spare_slots: of a rank.
    """
    return HOST_BASE_S + HOST_SLOT_S * (experts + ranks * spare_slots)


def device_plan_s(*, ranks: int, experts: int, spare_slots: int, launch_s: float) -> float:
    """Seconds of a plan on the GPU, if it makes as many replicas as fit.

    Args:
        ranks: of the expert-parallel group, on one node.
        experts: of the layer.
        spare_slots: of a rank.
        launch_s: from one small kernel to the next, where the GPU waits for it.
    """
    replicas = ranks * spare_slots
    warp_steps = replicas * (STEPS_PER_REPLICA + STEPS_PER_REPLICA_AND_RANK * ranks)
    lane_steps = LANE_STEPS_PER_SLOT * (experts + replicas)
    return STEP_S * (warp_steps + lane_steps) + LAUNCHES * launch_s
