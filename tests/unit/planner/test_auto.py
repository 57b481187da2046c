"""`--parallel auto`, the pure part: the choice, the same one on every node and on every return, and its words."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from megatron_smartmoe.errors import ConfigError
from megatron_smartmoe.planner.auto import (
    Choice,
    Question,
    _settle_ties,
    choose_again,
    choose_launch,
    describe,
    to_json,
)
from megatron_smartmoe.planner.constraints import Constraints, constraints_from_flags
from megatron_smartmoe.planner.pool import Pool
from megatron_smartmoe.planner.space import SpaceOptions
from tests.support.models import SMALL
from tests.unit.planner.cases import CLUSTER

SPACE = SpaceOptions(micro_batches=(1, 2), spare_slots=(0,), overlap_degrees=(1,), max_virtual=2)
QUESTION = Question(model=SMALL, cluster=CLUSTER, constraints=Constraints(options=SPACE))


def asked(words: str = "", **changes: object) -> Question:
    constraints = constraints_from_flags(words.split(), SPACE)
    return replace(QUESTION, constraints=constraints, **changes)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def choice() -> Choice:
    return choose_launch(QUESTION)


def test_the_fastest_is_chosen(choice: Choice) -> None:
    assert choice.result is not None
    assert choice.plan is choice.result.best[0]
    assert choice.plan.spec.gpus == 8
    assert choice.plan.expected_s == min(plan.expected_s for plan in choice.result.best)


def test_the_same_question_has_the_same_answer(choice: Choice) -> None:
    content, again = to_json(choice, QUESTION), to_json(choose_launch(QUESTION), QUESTION)
    del content["seconds"], again["seconds"]
    assert content == again


def test_rounding_does_not_decide(choice: Choice) -> None:
    """On a node with another processor the last bits differ; the names do not."""
    assert choice.result is not None
    best = choice.result.best[:3]
    orders = []
    for shift in (1e-9, -1e-9):
        time = replace(best[0].time, attention_s=best[0].time.attention_s * (1 + shift))
        tied = [replace(plan, time=best[0].time) for plan in best[1:]] + [replace(best[0], time=time)]
        result = replace(choice.result, best=tied)
        _settle_ties(result)
        orders.append([plan.spec.label() for plan in result.best])
    assert orders[0] == orders[1] == sorted(orders[0])


def test_users_sizes_are_kept() -> None:
    question = asked("--pipeline-model-parallel-size 4 --micro-batch-size 1")
    spec = choose_launch(question).plan.spec
    assert (spec.pp, spec.micro_batch) == (4, 1)


def test_nothing_fits() -> None:
    small = replace(CLUSTER, gpu=replace(CLUSTER.gpu, memory_bytes=5e9))
    with pytest.raises(ConfigError) as caught:
        choose_launch(asked("--tensor-model-parallel-size 1 --pipeline-model-parallel-size 1", cluster=small))
    said = str(caught.value)
    assert said.startswith("--parallel = 'auto': on 8 ranks no launch fits: the smallest needs ")
    assert " GB per GPU, there are 5.0 GB (" in said
    assert " GB too much: TP1 PP1 EP8 DP8 mbs1 re:full). " in said
    assert said.endswith("leave out one of: --tensor-model-parallel-size 1, --pipeline-model-parallel-size 1.")


def test_what_is_written_is_what_the_tool_writes(choice: Choice) -> None:
    content = json.loads(json.dumps(to_json(choice, QUESTION)))
    assert content["question"]["gpus"] == 8
    assert content["best"][0]["launch"] == choice.plan.spec.label()
    assert Pool.from_json(content["pool"]).launch == choice.plan.spec.label()


@pytest.fixture(scope="module")
def content() -> object:
    """The plan of a run whose user wanted another launch than the fastest."""
    question = asked("--pipeline-model-parallel-size 2 --micro-batch-size 2")
    return json.loads(json.dumps(to_json(choose_launch(question), question)))


class TestAgain:
    """A run directory's plan is kept as long as it can be launched."""

    def test_it_is_kept_although_it_is_not_the_fastest(self, content: object, choice: Choice) -> None:
        again = choose_again(content, QUESTION)
        assert isinstance(again, Choice)
        assert again.result is None
        assert again.plan.spec.pp == 2
        assert again.plan.spec != choice.plan.spec

    def test_another_batch_is_no_reason(self, content: object) -> None:
        again = choose_again(content, asked(model=replace(SMALL, global_batch=128)))
        assert isinstance(again, Choice)
        assert again.plan.spec.global_batch == 128

    @pytest.mark.parametrize(
        ("question", "reason"),
        [
            (asked(cluster=replace(CLUSTER, nodes=1)), "it is for 8 ranks, there are 4"),
            (asked("--pipeline-model-parallel-size 4"), "it has pp 2, not 4"),
            (asked(model=replace(SMALL, layers=9)), "PP x VPP"),
            (asked(model=replace(SMALL, global_batch=2)), "does not divide the global batch of 2"),
            (asked(cluster=replace(CLUSTER, gpu=replace(CLUSTER.gpu, memory_bytes=4e9))), "GB, there are 4.0 GB"),
        ],
        ids=["ranks", "flag", "layers", "batch", "memory"],
    )
    def test_what_cannot_be_kept_says_why(self, content: object, question: Question, reason: str) -> None:
        again = choose_again(content, question)
        assert isinstance(again, str)
        assert reason in again

    @pytest.mark.parametrize("content", [{}, [], {"best": []}, {"best": [{"spec": {"tp": 1}}]}, None])
    def test_another_file_is_refused(self, content: object) -> None:
        with pytest.raises(ConfigError, match=r"plan.json = None: is not a plan that --parallel auto wrote. Remove it"):
            choose_again(content, QUESTION)


def test_a_few_lines_say_what_and_why(choice: Choice) -> None:
    lines = describe(choice, QUESTION, "the device's own", ["--micro-batch-size 4 by 1"])
    text = "\n".join(lines)
    assert lines[0] == "  machine   8 x G on 2 nodes, 24.0 GB each (the device's own)"
    assert "  replaced  the configuration's --micro-batch-size 4 by 1" in lines
    assert f"  choice    {choice.plan.spec.label()}: " in text
    assert choice.result is not None
    assert f"next: {choice.result.best[1].spec.label()} is " in text
    assert 7 <= len(lines) <= 9
    assert "kept" not in text


def test_what_is_kept_is_said() -> None:
    question = asked("--expert-model-parallel-size 1")
    lines = describe(choose_launch(question), question, "cluster file 2x4", [])
    assert "  kept      --expert-model-parallel-size 1" in lines
    assert "  because   EP 1 needs no all-to-all: every rank has all experts." in lines
