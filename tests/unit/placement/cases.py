"""Problems that the placement tests draw: counts and slots of one layer."""

import numpy as np
from hypothesis import strategies as st

from megatron_smartmoe.cost.replicas import LegPrice
from megatron_smartmoe.placement.layer_plan import LayerPlan, tokens_by_rank
from megatron_smartmoe.spec.arrays import FloatArray, IntArray
from megatron_smartmoe.spec.placement import EMPTY

LEGS = st.builds(
    LegPrice,
    inside_tokens=st.sampled_from([0.0, 3.0, 40.0]),
    between_tokens=st.sampled_from([0.0, 20.0, 200.0]),
    hidden_tokens=st.sampled_from([0.0, 15.0]),
)  # prices of a way of replicas


def contiguous_slots(num_experts: int, num_ranks: int, spare_slots: int) -> IntArray:
    """Megatron's homes and empty spare slots, `[R, S]`."""
    home_RH = np.arange(num_experts).reshape(num_ranks, -1)
    return np.pad(home_RH, ((0, 0), (0, spare_slots)), constant_values=EMPTY)


def random_counts(
    rng: np.random.Generator, num_ranks: int, num_experts: int, *, sigma: float = 1.0, tokens: int = 2048
) -> IntArray:
    """Counts `[R, E]` of a lognormal popularity, drawn token by token."""
    popularity = rng.lognormal(0, sigma, num_experts)
    return rng.multinomial(tokens, popularity / popularity.sum(), size=num_ranks)


def random_slots(
    rng: np.random.Generator, num_experts: int, num_ranks: int, spare_slots: int, *, filled: float = 0.8
) -> IntArray:
    """A permutation of homes, spare slots filled with random experts that the rank does not hold yet."""
    slots_RS = contiguous_slots(num_experts, num_ranks, spare_slots)
    slots_RS[:, : num_experts // num_ranks] = rng.permutation(num_experts).reshape(num_ranks, -1)
    for rank in range(num_ranks):
        for slot in range(num_experts // num_ranks, slots_RS.shape[1]):
            expert = rng.integers(num_experts)
            if rng.random() < filled and expert not in slots_RS[rank]:
                slots_RS[rank, slot] = expert
    return slots_RS


def rank_loads(plan: LayerPlan, counts_RE: IntArray) -> FloatArray:
    """Tokens that each rank computes, `[R]`, when `plan` is applied to `counts_RE`."""
    return np.asarray(tokens_by_rank(plan, counts_RE).sum(axis=0), dtype=np.float64)
