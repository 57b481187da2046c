"""Migration plans: every element of every expert arrives where it is needed, exactly once, within the memory given."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_smartmoe.errors import MigrationError, PlanError
from megatron_smartmoe.placement.migration import MigrationPlan, plan_migration
from megatron_smartmoe.placement.transfers import LayerLayout, TensorLayout
from megatron_smartmoe.spec.arrays import IntArray

R, S, D = 3, 4, 2
NUMEL = 30


def replicated(name: str = "weight", itemsize: int = 2) -> TensorLayout:
    held_SC2 = np.tile(np.array([0, NUMEL]), (S, 1, 1))
    return TensorLayout(
        name=name, numel=NUMEL, itemsize=itemsize, copies=tuple((d,) for d in range(D)), held_SC2=held_SC2
    )


def sharded(cut: int, copies: tuple[tuple[int, ...], ...] = ((0, 1),)) -> TensorLayout:
    """A parameter of S experts in a row, cut in two at element `cut`."""
    starts_S = np.arange(S) * NUMEL
    low_S2 = np.stack([np.zeros(S), np.clip(cut - starts_S, 0, NUMEL)], axis=1)
    high_S2 = np.stack([np.clip(cut - starts_S, 0, NUMEL), np.full(S, NUMEL)], axis=1)
    held_SC2 = np.stack([low_S2, high_S2], axis=1).astype(np.int64)
    return TensorLayout(name="exp_avg", numel=NUMEL, itemsize=4, copies=copies, held_SC2=held_SC2)


def layout(cut: int = 47) -> LayerLayout:
    return LayerLayout(layer=0, tensors=(replicated(), sharded(cut)))


def plan(after_E: IntArray, one: LayerLayout, staging_bytes: int = 1 << 20, **options: int) -> MigrationPlan:
    before = np.arange(R * S)[None]
    return plan_migration(before, after_E[None], [one], num_ranks=R, staging_bytes=staging_bytes, **options)


def stays_on_W(result: MigrationPlan) -> list[int]:
    """Bytes that each worker moves between slots of its own."""
    moved = [step.transfers for step in result.steps]
    return [sum(int(m.nbytes[(m.source == w) & (m.target == w)].sum()) for m in moved) for w in range(R * D)]


def carried_out(result: MigrationPlan, one: LayerLayout) -> None:
    """Follow the plan on arrays that name their owner, and check that each worker ends with what it must hold."""
    held = {}  # (tensor, worker, slot) -> expert and element of each position, -1 where the worker holds nothing
    for index, tensor in enumerate(one.tensors):
        for rank in range(R):
            for group in tensor.copies:
                for shard, d in enumerate(group):
                    for slot in range(S):
                        array = np.full((NUMEL, 2), -1)
                        low, high = tensor.held_SC2[slot, shard]
                        array[low:high, 0] = rank * S + slot
                        array[low:high, 1] = np.arange(low, high)
                        held[index, rank * D + d, slot] = array
    homes = np.arange(R * S)
    for step in result.steps:
        moved = step.transfers
        staged = [
            held[t, w, s][low:high].copy()
            for t, w, s, low, high in zip(
                moved.tensor, moved.source, moved.from_slot, moved.start, moved.stop, strict=True
            )
        ]
        for values, t, w, s, low, high in zip(
            staged, moved.tensor, moved.target, moved.to_slot, moved.start, moved.stop, strict=True
        ):
            held[t, w, s][low:high] = values
        homes[list(step.experts)] = step.to_slot
    expert_in = np.argsort(homes)
    for (index, worker, slot), array in held.items():
        tensor = one.tensors[index]
        shard = next(group.index(worker % D) for group in tensor.copies if worker % D in group)
        low, high = tensor.held_SC2[slot, shard]
        assert (array[low:high, 0] == expert_in[worker // D * S + slot]).all()
        assert (array[low:high, 1] == np.arange(low, high)).all()


@settings(max_examples=60, deadline=None)
@given(
    st.permutations(range(R * S)),
    st.integers(0, S * NUMEL),
    st.sampled_from([1 << 20, 2600]),
    st.sampled_from([((0, 1),), ((1, 0),)]),
)
def test_everything_arrives(
    after: list[int], cut: int, staging_bytes: int, copies: tuple[tuple[int, ...], ...]
) -> None:
    one = LayerLayout(layer=0, tensors=(replicated(), sharded(cut, copies)))
    try:
        result = plan(np.array(after), one, staging_bytes)
    except MigrationError:
        assert staging_bytes < 1 << 20
        return
    carried_out(result, one)
    assert result.staging_bytes <= staging_bytes


def test_bytes_by_hand() -> None:
    """Experts 0 (rank 0, slot 0) and 5 (rank 1, slot 1) change places; the shard ends in the middle of slot 1."""
    after = np.arange(R * S)
    after[[0, 5]] = [5, 0]
    result = plan(after, layout(cut=NUMEL + 10))
    # Weights: 60 bytes per EDP rank each way. State: slot 0 is held by d = 0; of slot 1 d = 0 holds 10 elements.
    assert result.wire_bytes == 2 * D * NUMEL * 2 + 2 * NUMEL * 4
    assert result.sent_bytes_W.tolist() == [60 + 120, 60, 60 + 40, 60 + 80, 0, 0]
    assert result.received_bytes_W.tolist() == [60 + 120, 60, 60 + 40, 60 + 80, 0, 0]
    assert stays_on_W(result) == [0] * (R * D)


def test_a_move_inside_a_rank_sends_what_changes_its_shard_only() -> None:
    after = np.arange(R * S)
    after[[0, 1]] = [1, 0]
    result = plan(after, layout(cut=NUMEL + 10))
    # The 20 elements of slot 1 that belong to d = 1 change places with those of slot 0 that belong to d = 0.
    assert result.sent_bytes_W.tolist() == [80, 80, 0, 0, 0, 0]
    assert stays_on_W(result) == [2 * 60 + 2 * 40, 2 * 60, 0, 0, 0, 0]


def test_two_instances_keep_to_themselves() -> None:
    """With two optimizer instances each EDP rank holds all of the state; nothing crosses between them."""
    whole = LayerLayout(layer=0, tensors=(replicated(), replicated("exp_avg", 4)))
    moved = plan(np.roll(np.arange(R * S), 1), whole).steps[0].transfers
    assert (moved.source % D == moved.target % D).all()


@settings(max_examples=30, deadline=None)
@given(st.permutations(range(R * S)))
def test_rounds_have_no_conflicts(after: list[int]) -> None:
    for step in plan(np.array(after), layout()).steps:
        assert sorted(index for members in step.rounds for index in members) == list(range(len(step.messages)))
        for members in step.rounds:
            for end in ("source", "target"):
                ends = [getattr(step.messages[index], end) for index in members]
                assert len(set(ends)) == len(ends)


def test_steps_are_whole_cycles() -> None:
    """Three swaps; memory for one at a time. After each step the homes are a permutation."""
    after = np.array([4, 5, 6, 3, 0, 1, 2, 7, 8, 9, 10, 11])
    memory = 400
    result = plan(after, layout(cut=0), memory)
    assert [sorted(step.experts) for step in result.steps] == [[0, 4], [1, 5], [2, 6]]
    assert len(plan(after, layout(cut=0)).steps) == 1
    assert all(0 < step.staging_bytes <= memory for step in result.steps)
    assert all(0 < step.chunk_bytes < max(m.nbytes for m in step.messages) for step in result.steps)  # cut to fit


def test_too_little_memory_is_an_error_that_names_the_flag() -> None:
    after = np.arange(R * S)
    after[[0, 5]] = [5, 0]
    with pytest.raises(MigrationError) as caught:
        plan(after, layout(), staging_bytes=200)
    assert str(caught.value) == (
        "layer 0: experts 0, 5 exchange their slots and must be committed together, for which a rank needs 1 MiB of "
        "staging memory; --smartmoe-migration-staging-mib allows 0.000190735. Raise it to at least 1."
    )


def test_nothing_to_do_is_an_empty_plan() -> None:
    result = plan(np.arange(R * S), layout())
    assert (result.steps, result.wire_bytes, result.staging_bytes) == ((), 0, 0)


def test_the_digest_tells_plans_apart() -> None:
    swap = np.arange(R * S)
    swap[[0, 5]] = [5, 0]
    plans = [
        plan(swap, layout()),
        plan(np.arange(R * S), layout()),
        plan(swap, layout(cut=48)),
        plan(swap, layout(), 1 << 21),
        plan(swap, layout(), max_chunk_bytes=1024),
    ]
    assert len({p.digest for p in plans}) == len(plans)
    assert plan(swap, layout()).digest == plans[0].digest


def test_refuses_homes_that_are_no_permutation() -> None:
    with pytest.raises(PlanError, match="homes after, layer 0: not a permutation of 12 slots"):
        plan(np.zeros(R * S, dtype=np.int64), layout())
    with pytest.raises(PlanError, match=r"exp_avg, slot 0: its shards hold 29 of 30 elements"):
        TensorLayout(name="exp_avg", numel=30, itemsize=4, copies=((0,),), held_SC2=np.array([[[0, 29]]]))
