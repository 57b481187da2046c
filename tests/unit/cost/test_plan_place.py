"""Where a micro-batch is planned: both prices, beside what was measured and counted."""

from __future__ import annotations

import pytest

from megatron_smartmoe.cost.plan_place import LAUNCHES, STEP_S, device_plan_s, host_plan_s

MEASURED_US = {(32, 8, 1): 49, (64, 8, 1): 53, (256, 64, 1): 112}  # docs/benchmarks.md, without the search
COUNTED_STEPS = {(64, 8, 1): 729, (256, 32, 1): 5132, (256, 64, 1): 14820}  # docs/log.md


@pytest.mark.parametrize("sizes", MEASURED_US)
def test_the_hosts_price_is_near_what_was_measured(sizes: tuple[int, int, int]) -> None:
    experts, ranks, spare_slots = sizes
    found = host_plan_s(ranks=ranks, experts=experts, spare_slots=spare_slots)
    assert found == pytest.approx(MEASURED_US[sizes] * 1e-6, rel=0.15)


@pytest.mark.parametrize("sizes", COUNTED_STEPS)
def test_the_devices_price_is_near_the_steps_that_were_counted(sizes: tuple[int, int, int]) -> None:
    experts, ranks, spare_slots = sizes
    found = device_plan_s(ranks=ranks, experts=experts, spare_slots=spare_slots, launch_s=0.0)
    lane_steps = 6 * (experts + ranks * spare_slots)
    assert found == pytest.approx((COUNTED_STEPS[sizes] + lane_steps) * STEP_S, rel=0.15)


@pytest.mark.parametrize(("launch_s", "device_is_faster"), [(10e-6, False), (0.2e-6, True)])
def test_small_groups_would_plan_on_a_device_that_launches_fast(launch_s: float, device_is_faster: bool) -> None:
    small, large = {"ranks": 8, "experts": 64, "spare_slots": 1}, {"ranks": 64, "experts": 256, "spare_slots": 1}
    assert (device_plan_s(**small, launch_s=launch_s) < host_plan_s(**small)) == device_is_faster
    assert device_plan_s(**large, launch_s=launch_s) > host_plan_s(**large)
    assert device_plan_s(**small, launch_s=launch_s) > LAUNCHES * launch_s
