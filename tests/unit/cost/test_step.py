"""Step time: groups, schedules, and what each size of a launch does to its term."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from megatron_smartmoe.cost.moe_layer import ALL_TO_ALLS, LayerConstants, LayerFlow, LayerTime
from megatron_smartmoe.cost.step.constants import StepConstants, layer_constants
from megatron_smartmoe.cost.step.dense import dense_times
from megatron_smartmoe.cost.step.groups import Group, all_reduce_s, ring_s, send_s
from megatron_smartmoe.cost.step.moe import MoETimes, moe_times
from megatron_smartmoe.cost.step.pipeline import in_flight, schedule_s
from megatron_smartmoe.cost.step.step import StepTime, step_time
from megatron_smartmoe.spec.parallel import ParallelSpec, Replicas
from tests.support.models import CLUSTER, SMALL

CONSTANTS = StepConstants()
SPEC = ParallelSpec(gpus=8, ep=4, pp=2, micro_batch=2, global_batch=64)
ZERO = LayerTime(
    fixed_s=0.0,
    source_s=0.0,
    gemm_s=0.0,
    experts_s=0.0,
    all_to_all_intra_s=0.0,
    all_to_all_inter_s=0.0,
    replicas_s=0.0,
    hidden_s=0.0,
)


def moe(gemm_s: float = 1e-3, replicas_s: float = 0.0) -> MoETimes:
    return MoETimes(replace(ZERO, gemm_s=gemm_s), replicas_s, 0.0, 0.0)


def step(spec: ParallelSpec = SPEC, *parts: MoETimes) -> StepTime:
    return step_time(SMALL, spec, CLUSTER, CONSTANTS, parts or (moe(),))


@pytest.mark.parametrize(
    ("group", "inside", "crosses"),
    [(Group(4, 1), 4, False), (Group(2, 2), 2, False), (Group(8, 1), 4, True), (Group(2, 4), 1, True)],
)
def test_where_a_groups_ranks_lie(group: Group, inside: int, crosses: bool) -> None:
    assert (group.members_per_node(CLUSTER), group.crosses_nodes(CLUSTER)) == (inside, crosses)


def test_a_ring_between_nodes_uses_every_members_card() -> None:
    one, four = (ring_s(1e9, group, CLUSTER, CONSTANTS) for group in (Group(2, 4), Group(8, 1)))
    assert one == pytest.approx(0.5e9 / (25e9 * CONSTANTS.ring_inter), rel=0.01)
    assert four == pytest.approx(7 / 8 * 1e9 / (100e9 * CONSTANTS.ring_inter), rel=0.01)
    assert ring_s(1e9, Group(1, 1), CLUSTER, CONSTANTS) == 0.0


def test_sends_know_their_link() -> None:
    assert send_s(1e9, 4, CLUSTER, CONSTANTS) > 5 * send_s(1e9, 2, CLUSTER, CONSTANTS)


def test_equal_stages_have_the_usual_bubble() -> None:
    total_s, bubble_s, _ = schedule_s([1.0] * 4, 16, 1)
    assert (total_s, bubble_s) == (19.0, 3.0)
    assert schedule_s([1.0] * 4, 16, 3)[1] == 1.0


def test_the_slowest_stage_sets_the_pace() -> None:
    assert schedule_s([1.0, 3.0, 1.0], 10, 1) == (32.0, 2.0, 1)


def test_bubbles_are_filled_where_stages_share_cores() -> None:
    # Four stages on two cores: 16 units of work at half speed each, two at a time.
    assert schedule_s([1.0] * 4, 4, 1, ranks_per_device=2.0) == (4.0, 0.0, 0)
    # Two that get in each other's way a little: the two units in which one waits take 2 / 1.25.
    total_s, bubble_s, _ = schedule_s([1.0] * 2, 4, 1, ranks_per_device=1.25)
    assert (total_s, bubble_s) == (pytest.approx(3 + 2 / 1.25), pytest.approx(0.6))
    # A slow last stage goes on alone, faster.
    assert schedule_s([1.0, 3.0], 10, 1, ranks_per_device=2.0)[:2] == (20.0, -10.0)
    assert schedule_s([2.0], 10, 1, ranks_per_device=2.0) == (20.0, 0.0, 0)


def test_an_all_reduce_is_two_rings_unless_it_was_measured() -> None:
    group = Group(4, 1)
    ring = ring_s(1e9, group, CLUSTER, CONSTANTS)
    assert all_reduce_s(1e9, group, CLUSTER, CONSTANTS) == pytest.approx(2 * ring)
    faster = replace(CONSTANTS, all_reduce_intra=2 * CONSTANTS.ring_intra)
    assert all_reduce_s(1e9, group, CLUSTER, faster) == pytest.approx(ring, rel=0.01)


def test_alone_a_rank_exchanges_nothing() -> None:
    alone, four = (layer_constants(CLUSTER, SMALL, replace(SPEC, ep=ep), CONSTANTS).fixed_s for ep in (1, 4))
    link = CLUSTER.intra_node
    assert four - alone == pytest.approx(ALL_TO_ALLS * link.latency_s + link.ring_latency_of(4))


@pytest.mark.parametrize(
    ("stage", "virtual", "micro_batches", "chunks"),
    [(0, 1, 8, 4), (3, 1, 8, 1), (0, 1, 2, 2), (0, 2, 8, 11), (3, 2, 8, 5)],
)
def test_chunks_in_flight(stage: int, virtual: int, micro_batches: int, chunks: int) -> None:
    assert in_flight(stage, 4, virtual, micro_batches) == chunks


def test_terms_add_up() -> None:
    time = step()
    assert time.total_s == pytest.approx(sum(seconds for _, seconds in time.terms()))
    assert time.moe_gemm_s == pytest.approx(4 * 1e-3 * SPEC.micro_batches)  # four layers a stage


def test_a_hotter_half_of_the_model_slows_its_stage() -> None:
    even, uneven = step(SPEC, moe(2e-3)), step(SPEC, moe(1e-3), moe(3e-3))
    assert uneven.moe_gemm_s == pytest.approx(1.5 * even.moe_gemm_s)
    assert uneven.total_s > even.total_s


def test_every_micro_batch_bears_its_share_of_the_replicas() -> None:
    found = step(replace(SPEC, spare_slots=1, replicas="history"), moe(replicas_s=1e-3))
    assert found.replicas_s == pytest.approx(4e-3 * SPEC.micro_batches)


def test_replicas_from_history_move_once_a_step() -> None:
    """The same slots cost a step one transfer with history, and one per micro-batch with exact."""
    flow = LayerFlow(
        load_ER=np.array([[9.0, 9.0], [0.0, 9.0]]),
        traffic_RR=np.full((2, 2), 9.0),
        replicas_RR=np.array([[0.0, 1.0], [0.0, 0.0]]),
    )
    prices = LayerConstants(intra_replica_s=1.0)
    seconds: dict[str, float] = {}
    modes: tuple[Replicas, ...] = ("history", "exact")
    for mode in modes:
        spec = replace(SPEC, spare_slots=1, replicas=mode, overlap_param_gather=True)
        times = moe_times([flow], prices, SMALL, spec, CLUSTER, CONSTANTS)
        assert times.layer.replicas_s == times.layer.replicas_hidden_s == 0.0
        assert times.with_replicas_s == pytest.approx(times.total_s + times.replicas_s)
        seconds[mode] = times.replicas_s
    assert seconds["exact"] == pytest.approx(1.0)
    assert seconds["history"] == pytest.approx(1.0 / SPEC.micro_batches)


def test_recomputation_adds_work_in_order() -> None:
    seconds = [step(replace(SPEC, recompute=mode)).total_s for mode in ("none", "act", "moe", "full")]
    assert seconds[0] == seconds[1] < seconds[2] < seconds[3]


def test_tensor_parallelism_shares_the_work_and_adds_traffic() -> None:
    one, two = (dense_times(SMALL, replace(SPEC, tp=tp), CLUSTER, CONSTANTS) for tp in (1, 2))
    assert two.dense_mlp_s == pytest.approx(one.dense_mlp_s / 2, rel=0.1)
    assert one.tensor_comm_mlp_s == 0.0 < two.tensor_comm_mlp_s


def test_overlap_hides_gradients() -> None:
    plain = replace(SPEC, overlap_grad_reduce=False, overlap_param_gather=False)
    assert step(SPEC).grad_sync_s < step(plain).grad_sync_s
    assert step(SPEC).param_gather_s < step(plain).param_gather_s


def test_expert_tensor_parallelism_keeps_the_arithmetic_of_a_token() -> None:
    one, two = (layer_constants(CLUSTER, SMALL, replace(SPEC, etp=etp), CONSTANTS) for etp in (1, 2))
    assert two.token_s == pytest.approx(one.token_s, rel=0.2)  # rows are moved on both ranks
    assert two.expert_s == pytest.approx(one.expert_s / 2)
