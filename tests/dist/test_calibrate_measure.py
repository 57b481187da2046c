"""What is measured, on two gloo ranks: amounts, turns, groups. The numbers themselves are the machine's business."""

from __future__ import annotations

import itertools
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_smartmoe.calibrate import measure
from megatron_smartmoe.calibrate.measure import Bench, BenchPlan, Task
from megatron_smartmoe.calibrate.measurement import COLLECTIVES, MachineMeasurement, Point
from megatron_smartmoe.cost.compute import ExpertShape
from tests.support.ranks import run_ranks

RANKS, REPEATS = 2, 3
PLAN = BenchPlan(
    expert=ExpertShape(hidden=16, ffn=8, element_bytes=4),
    num_experts=2,
    tokens=(2, 8),
    sizes_bytes=(1000, 4096),
    copy_bytes=(4096, 8192),
)


def bench(links: tuple[str, ...]) -> Bench:
    world = dist.group.WORLD
    assert world is not None
    return Bench(
        device=torch.device("cpu"),
        dtype=torch.float32,
        world=world,
        links=dict.fromkeys(links, world),
        nodes=RANKS if "inter" in links else 1,
        repeats=REPEATS,
    )


def turns() -> tuple[list[int], list[float]]:
    """The order in which two tasks are called in turns of one call; and the medians when rank 1 is slow in one."""
    order: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "TURN_S", 0.0)
        tasks = [Task(1.0, lambda: order.append(0)), Task(2.0, lambda: order.append(1), 0.5)]
        bench(("intra",)).series(tasks)
        clock = itertools.count()
        slow = 3.0 if dist.get_rank() == 1 else 1.0
        patch.setattr("megatron_smartmoe.calibrate.measure.time.perf_counter", lambda: next(clock) * slow)
        found = bench(("intra",)).series(tasks)
    return order, [point.time_s for point in found.points]


def at_the_start(sizes_bytes: tuple[int, ...]) -> tuple[str, Any]:
    """The line of a measurement at the start of training, and the machine that is priced with afterwards."""
    from argparse import Namespace

    from megatron_smartmoe.adapter import cost_inputs, measured_prices

    args = Namespace(smartmoe=True, smartmoe_cluster=None)
    before = cost_inputs.machine(args)
    of_job = measure.bench_of_job(torch.device("cpu"), torch.float32, RANKS, REPEATS)
    line = measured_prices.measure_prices(replace(PLAN, sizes_bytes=sizes_bytes), of_job, before)
    return line, cost_inputs.machine(args)


def on_a_rank() -> dict[str, Any]:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    found = {
        "one node": measure.measure(PLAN, bench(("intra",)), "gloo"),
        "two nodes": measure.measure(PLAN, bench(("inter",)), "gloo"),
        "turns": turns(),
        "no line": at_the_start((4096, 4096)),  # then another time's numbers cannot be in use yet
        "start": at_the_start(PLAN.sizes_bytes),
    }
    dist.destroy_process_group()
    return found


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_ranks(on_a_rank, RANKS, log_dir=tmp_path_factory.mktemp("calibrate"))


@pytest.mark.dist
@pytest.mark.parametrize(("case", "link"), [("one node", "intra"), ("two nodes", "inter")])
def test_every_series_has_its_points(case: str, link: str, measured: list[dict[str, Any]]) -> None:
    found: MachineMeasurement = measured[0][case]
    assert (found.device, found.nodes * found.ranks_per_node) == ("CPU-thread", RANKS)
    assert found.members == {link: RANKS}
    assert set(found.links) == {(operation, link) for operation in COLLECTIVES}
    amounts = {
        "all_to_all": [500, 2048],  # half of the buffer stays
        "ring": [1000, 4096],  # half of it twice: reduced, then gathered
        "all_reduce": [1000, 4096],  # the same
        "send_recv": [1000, 4096],
    }
    for operation, expected in amounts.items():
        assert [point.units for point in found.links[operation, link].points] == expected
    assert [point.units for point in found.gemm.points] == [2, 8]
    assert [point.units for point in found.copy.points] == [8192, 16384]  # read and written
    for series in (found.gemm, found.copy, *found.links.values()):
        assert all(0 < point.time_s < 10 and point.spread >= 0 for point in series.points)
    assert found.memory_bytes > 1e8
    assert found.extra == {}
    assert found.ranks_per_device >= 1
    assert case == "one node" or found.ranks_per_device == 1  # alone on its node


@pytest.mark.dist
def test_every_rank_has_the_same(measured: list[dict[str, Any]]) -> None:
    assert measured[0]["one node"] == measured[1]["one node"]


@pytest.mark.dist
def test_prices_measured_at_the_start_are_used_and_the_same_on_all_ranks(measured: list[dict[str, Any]]) -> None:
    (line, cluster), (_, other) = (found["start"] for found in measured)
    assert cluster == other
    assert (cluster.name, cluster.gpu.name, cluster.gpus_per_node) == ("measured", "CPU-thread", RANKS)
    assert re.fullmatch(
        r"prices measured in [\d.]+ s on 2 x CPU-thread: [\d.e+-]+ TFLOP/s of grouped GEMM, [\d.e+-]+ GB/s of "
        r"memory, [\d.e+-]+ GB/s between ranks of a node\. To have the same in every run: smartmoe calibrate "
        r"--output FILE, then --smartmoe-cluster FILE",
        line,
    )
    line, cluster = measured[0]["no line"]
    assert line.startswith("prices could not be measured (")
    assert line.endswith("): those of cpu are used")
    assert cluster.name == "cpu"


@pytest.mark.dist
def test_points_take_turns_and_the_slowest_rank_counts(measured: list[dict[str, Any]]) -> None:
    for rank in range(RANKS):
        order, medians = measured[rank]["turns"]
        # A call to warm up and one to count each, then rounds.
        assert order[: 4 + 2 * REPEATS] == [0, 0, 1, 1, *([0, 1] * REPEATS)]
        assert medians == [3.0, 1.5]


def test_what_a_product_takes_is_no_part_of_a_collective() -> None:
    point = Point(units=8.0, time_s=3.0, spread=0.1)
    left = measure._less(point, 2.0)
    assert (left.units, left.time_s) == (8.0, 1.0)
    assert left.spread == pytest.approx(0.3)
    assert measure._less(point, 3.5).time_s == 1e-7  # noise; a line wants a positive time


def test_a_container_may_have_less_memory_than_the_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(measure, "_CGROUP_LIMIT", limit)
    physical = measure._host_bytes()
    limit.write_text("max\n")
    assert measure._host_bytes() == physical
    limit.write_text("1000000\n")
    assert measure._host_bytes() == 1e6
