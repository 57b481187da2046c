"""Buffers: padding, buckets and slices on sizes small enough to do by hand; real runs are in tests/megatron."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_smartmoe.cost.memory.activations import activation_bytes, layer_bytes
from megatron_smartmoe.cost.memory.budget import memory_budget
from megatron_smartmoe.cost.memory.buffers import Layout, largest_state_bytes, layout
from megatron_smartmoe.cost.memory.parameters import Parameter
from megatron_smartmoe.spec.parallel import ParallelSpec
from tests.support.models import CLUSTER, SMALL

SPEC = ParallelSpec(gpus=8, ep=4, pp=2, micro_batch=2, global_batch=64)


def lay(*sizes: int, bucket: int | None = None, ranks: int = 1, shared: tuple[int, ...] = ()) -> Layout:
    params = [Parameter(str(at), size, shared=at in shared) for at, size in enumerate(sizes)]
    return layout(params, bucket, ranks)


def test_parameters_begin_at_64_and_the_end_is_padded_to_128() -> None:
    assert lay(10, 10).total == 128  # 10 at 0, 10 at 64, up to 128
    assert lay(10, 100).total == 256  # 100 at 0, 10 at 128


def test_the_end_is_a_multiple_of_the_ranks_too() -> None:
    assert lay(10, ranks=3).total == 384
    assert lay(10, ranks=3).owned_D.tolist() == [10, 0, 0]


def test_slices_own_what_lies_in_them() -> None:
    assert lay(100, 100, ranks=2).owned_D.tolist() == [100, 100]  # second at 0 to 100, first at 128 to 228, of 256
    assert lay(200, 56, ranks=2).owned_D.tolist() == [56 + 128, 72]  # 0 to 56, 64 to 264, of 384


def test_buckets_are_cut_when_full() -> None:
    assert lay(100, 100, 100, bucket=100).total == 3 * 128
    assert lay(100, 100, 100).total == 2 * 128 + 128


def test_a_shared_weight_has_a_bucket_of_its_own() -> None:
    assert lay(100, 10, shared=(0,)).total == 128 + 128
    assert lay(100, 10).total == 256
    assert lay(30, 30).total == 128
    assert lay(30, 30, shared=(0,)).total == 256


def test_nothing_is_nothing() -> None:
    assert lay().total == 0


def test_without_the_distributed_optimizer_every_rank_holds_18_bytes_per_weight() -> None:
    spec = replace(SPEC, distributed_optimizer=False, overlap_param_gather=False)
    dense, _ = largest_state_bytes(SMALL, spec, 0)
    assert dense.total == dense.params // 2 * 18


def test_hot_ranks_hold_more() -> None:
    even, hot = (layer_bytes(SMALL, SPEC, True, factor) for factor in (1.0, 3.0))
    assert hot.experts == pytest.approx(3 * even.experts)
    assert hot.attention == even.attention


@pytest.mark.parametrize("stage", [0, 1])
def test_recomputation_keeps_less(stage: int) -> None:
    kept = [
        activation_bytes(SMALL, replace(SPEC, recompute=mode), stage, 1.5).layers
        + activation_bytes(SMALL, replace(SPEC, recompute=mode), stage, 1.5).experts
        for mode in ("none", "act", "moe", "full")
    ]
    assert kept == sorted(kept, reverse=True)
    assert len(set(kept)) == 4


def test_the_first_stage_holds_more_micro_batches() -> None:
    first, last = (activation_bytes(SMALL, SPEC, stage, 1.0).layers for stage in (0, 1))
    assert first == 2 * last


def test_parts_add_up_and_replicas_cost() -> None:
    plain, _ = memory_budget(SMALL, SPEC, CLUSTER.gpu, 1.0)
    replicas, _ = memory_budget(SMALL, replace(SPEC, spare_slots=2, replicas="history"), CLUSTER.gpu, 1.0)
    assert sum(size for _, size in plain.parts()) == plain.total
    expert = 3 * 1024 * 2048
    assert replicas.total - plain.total == 2 * 4 * expert * 6  # slots, layers of a stage, weights and fp32 gradients
    anew, _ = memory_budget(SMALL, replace(SPEC, spare_slots=2, replicas="auto"), CLUSTER.gpu, 1.0)
    assert anew.total - replicas.total == 2 * 4 * expert * 2  # weights; the last stage has one micro-batch in flight
    auto = replace(SPEC, spare_slots=2, replicas="auto", recompute="full")
    recomputed = [memory_budget(SMALL, each, CLUSTER.gpu, 1.0)[0] for each in (auto, replace(auto, replicas="history"))]
    assert recomputed[0].total - recomputed[1].total == 2 * expert * 2  # one layer at a time
