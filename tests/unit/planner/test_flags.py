"""Flags: what a plan becomes, and what a user's own command line means."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_smartmoe.errors import ConfigError
from megatron_smartmoe.planner.flags import layout_text, megatron_flags, parallel_from_flags
from megatron_smartmoe.spec.parallel import ParallelSpec
from tests.support.models import SMALL

SPEC = ParallelSpec(gpus=16, tp=2, pp=2, ep=4, micro_batch=2, global_batch=64)


@pytest.mark.parametrize(
    "spec",
    [
        SPEC,
        replace(SPEC, vpp=2, recompute="full"),
        replace(SPEC, layers_of_chunk=(5, 3), recompute="moe", cp=2),
        replace(SPEC, spare_slots=1, replicas="history", homes_interval=100, overlap_degree=2, recompute="act"),
        replace(SPEC, dispatch="hierarchical"),
        replace(SPEC, overlap_param_gather=False, overlap_grad_reduce=False, distributed_optimizer=False),
        replace(SPEC, grad_reduce_in_fp32=False),
    ],
    ids=lambda spec: spec.label(),
)
def test_they_read_back_as_the_plan(spec: ParallelSpec) -> None:
    assert parallel_from_flags(megatron_flags(SMALL, spec).all, SMALL, 16) == spec


def test_a_layout_has_embedding_loss_and_prediction_blocks() -> None:
    spec = replace(SPEC, layers_of_chunk=(5, 3))
    assert layout_text(SMALL, spec) == "Ettttt|tttL"
    assert layout_text(replace(SMALL, mtp_layers=1), spec) == "Ettttt|tttmL"


def test_a_written_layout_may_multiply() -> None:
    tokens = "--pipeline-model-parallel-size 2 --pipeline-model-parallel-layout E(tt|)*3,ttL".split()
    spec = parallel_from_flags(tokens, SMALL, 16)
    assert (spec.layers_of_chunk, spec.vpp) == ((2, 2, 2, 2), 2)


def test_megatrons_defaults_hold_where_nothing_is_said() -> None:
    spec = parallel_from_flags("--tensor-model-parallel-size 2 --lr 1e-4 --swiglu".split(), SMALL, 16)
    assert (spec.etp, spec.precision, spec.distributed_optimizer, spec.overlap_grad_reduce) == (2, "fp32", False, False)


def test_the_last_of_a_repeated_flag_wins() -> None:
    spec = parallel_from_flags("--micro-batch-size 1 --micro-batch-size=4".split(), SMALL, 16)
    assert spec.micro_batch == 4


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ("--micro-batch-size two", "--micro-batch-size = 'two': must be a whole number"),
        ("--pipeline-model-parallel-layout Ettx|L", "may hold E, t, m, L and | only"),
    ],
)
def test_what_cannot_be_read_is_refused(tokens: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parallel_from_flags(tokens.split(), SMALL, 16)
    assert message in str(caught.value)


def test_without_balancing_there_are_no_flags_of_ours() -> None:
    assert megatron_flags(SMALL, SPEC).smartmoe == []
