"""`--parallel auto`, the pure part: the result, the same one on every node and on every return, and its words."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from megatron_smartmoe.errors import ConfigError
from megatron_smartmoe.planner.auto import (
    PlanRequest,
    PlanResult,
    _break_ties,
    choose_launch,
    describe,
    reuse_saved_plan,
    to_json,
)
from megatron_smartmoe.planner.constraints import Constraints, constraints_from_flags
from megatron_smartmoe.planner.pool import Pool
from megatron_smartmoe.planner.space import SpaceOptions
from megatron_smartmoe.spec.parallel import ParallelSpec
from tests.support.models import CLUSTER, SMALL

SPACE = SpaceOptions(micro_batches=(1, 2), spare_slots=(0,), overlap_degrees=(1,), max_virtual=2)
REQUEST = PlanRequest(model=SMALL, cluster=CLUSTER, constraints=Constraints(options=SPACE))


def asked(words: str = "", **changes: object) -> PlanRequest:
    constraints = constraints_from_flags(words.split(), SPACE)
    return replace(REQUEST, constraints=constraints, **changes)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def result() -> PlanResult:
    return choose_launch(REQUEST)


def test_the_fastest_is_chosen(result: PlanResult) -> None:
    assert result.search is not None
    assert result.launch is result.search.best[0]
    assert result.launch.spec.gpus == 8
    assert result.launch.expected_s == min(plan.expected_s for plan in result.search.best)


def test_the_same_question_has_the_same_answer(result: PlanResult) -> None:
    content, again = to_json(result, REQUEST), to_json(choose_launch(REQUEST), REQUEST)
    del content["seconds"], again["seconds"]
    assert content == again


def test_rounding_does_not_decide(result: PlanResult) -> None:
    """On a node with another processor the last bits differ; the names do not."""
    assert result.search is not None
    best = result.search.best[:3]
    orders = []
    for shift in (1e-9, -1e-9):
        time = replace(best[0].time, attention_s=best[0].time.attention_s * (1 + shift))
        tied = [replace(plan, time=best[0].time) for plan in best[1:]] + [replace(best[0], time=time)]
        found = replace(result.search, best=tied)
        _break_ties(found)
        orders.append([launch.spec.label() for launch in found.best])
    assert orders[0] == orders[1] == sorted(orders[0])


def test_users_sizes_are_kept() -> None:
    request = asked("--pipeline-model-parallel-size 4 --micro-batch-size 1")
    spec = choose_launch(request).launch.spec
    assert (spec.pp, spec.micro_batch) == (4, 1)


def test_nothing_fits() -> None:
    small = replace(CLUSTER, gpu=replace(CLUSTER.gpu, memory_bytes=5e9))
    with pytest.raises(ConfigError) as caught:
        choose_launch(asked("--tensor-model-parallel-size 1 --pipeline-model-parallel-size 1", cluster=small))
    said = str(caught.value)
    assert said.startswith("--parallel = 'auto': on 8 ranks no launch fits: the smallest needs ")
    assert " GB per GPU, and a GPU has 5.0 GB (" in said
    assert " GB too much: TP1 PP1 EP8 DP8 mbs1 re:full). " in said
    assert said.endswith("remove one of: --tensor-model-parallel-size 1, --pipeline-model-parallel-size 1.")


def test_what_is_written_is_what_the_tool_writes(result: PlanResult) -> None:
    content = json.loads(json.dumps(to_json(result, REQUEST)))
    assert content["question"]["gpus"] == 8
    assert content["best"][0]["launch"] == result.launch.spec.label()
    assert Pool.from_json(content["pool"]).launch == result.launch.spec.label()


@pytest.fixture(scope="module")
def content() -> object:
    """The plan of a run whose user wanted another launch than the fastest."""
    request = asked("--pipeline-model-parallel-size 2 --micro-batch-size 2")
    return json.loads(json.dumps(to_json(choose_launch(request), request)))


class TestAgain:
    """A run directory's plan is kept as long as it can be launched."""

    def test_it_is_kept_although_it_is_not_the_fastest(self, content: object, result: PlanResult) -> None:
        again = reuse_saved_plan(content, REQUEST)
        assert isinstance(again, PlanResult)
        assert again.search is None
        assert again.launch.spec.pp == 2
        assert again.launch.spec != result.launch.spec

    def test_another_batch_is_no_reason(self, content: object) -> None:
        again = reuse_saved_plan(content, asked(model=replace(SMALL, global_batch=128)))
        assert isinstance(again, PlanResult)
        assert again.launch.spec.global_batch == 128

    @pytest.mark.parametrize(
        ("request_now", "reason"),
        [
            (asked(cluster=replace(CLUSTER, nodes=1)), "it is for 8 ranks, this job has 4"),
            (asked("--pipeline-model-parallel-size 4"), "it has pp 2, not 4"),
            (asked(model=replace(SMALL, layers=9)), "PP x VPP"),
            (asked(model=replace(SMALL, global_batch=2)), "does not divide the global batch of 2"),
            (
                asked(cluster=replace(CLUSTER, gpu=replace(CLUSTER.gpu, memory_bytes=4e9))),
                "GB, and a rank has 4.0 GB",
            ),
        ],
        ids=["ranks", "flag", "layers", "batch", "memory"],
    )
    def test_what_cannot_be_kept_says_why(self, content: object, request_now: PlanRequest, reason: str) -> None:
        again = reuse_saved_plan(content, request_now)
        assert isinstance(again, str)
        assert reason in again

    @pytest.mark.parametrize("content", [{}, [], {"best": []}, {"best": [3]}, None])
    def test_another_file_is_refused(self, content: object) -> None:
        with pytest.raises(ConfigError, match=r"plan.json = None: is not a plan that --parallel auto wrote. Remove it"):
            reuse_saved_plan(content, REQUEST)

    @pytest.mark.parametrize(
        ("changed", "message"),
        [
            ({"tp": 1.5}, "tp = 1.5: must be a whole number of at least 0"),
            ({"tp": True}, "tp = True: must be a whole number"),
            ({"ep": 0}, "ep = 0: must be a whole number of at least 1"),
            ({"ep": 3}, "gpus = 8: must be a multiple of ETP x EP x PP = 3"),
            ({"recompute": "some"}, "recompute = 'some': must be one of none, act, moe, full"),
            ({"layers_of_chunk": [1, "x"]}, r"layers_of_chunk\[1\] = 'x': must be a whole number"),
            (
                {"spare_slots": 10**9},
                "spare_slots = 1000000000: must be a whole number of at least 0 and at most 1,000",
            ),
        ],
    )
    def test_a_damaged_plan_names_the_key(self, changed: dict[str, object], message: str) -> None:
        spec = {**ParallelSpec(gpus=8).to_json(), **changed}
        with pytest.raises(ConfigError, match=rf"plan\.json: best\[0\]\.spec\.{message}"):
            reuse_saved_plan({"best": [{"spec": spec}]}, REQUEST)


def test_a_few_lines_say_what_and_why(result: PlanResult) -> None:
    lines = describe(result, REQUEST, "the device's own", ["--micro-batch-size 4 by 1"])
    text = "\n".join(lines)
    assert lines[0] == "  machine   8 x G on 2 nodes, 24.0 GB each (the device's own)"
    assert "  replaced  the configuration's --micro-batch-size 4 by 1" in lines
    assert f"  choice    {result.launch.spec.label()}: " in text
    assert result.search is not None
    assert f"next: {result.search.best[1].spec.label()} is " in text
    assert 7 <= len(lines) <= 9
    assert "kept" not in text


def test_what_is_kept_is_said() -> None:
    request = asked("--expert-model-parallel-size 1")
    lines = describe(choose_launch(request), request, "cluster file 2x4", [])
    assert "  kept      --expert-model-parallel-size 1" in lines
    assert "  because   EP 1 needs no all-to-all: every rank has all experts." in lines
