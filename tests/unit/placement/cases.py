"""Problems that the placement tests draw: counts and slots of one layer."""

import numpy as np

from megatron_smartmoe.spec.placement import EMPTY


def contiguous_slots(num_experts, num_ranks, spare_slots):
    """Megatron's homes and empty spare slots, `[R, S]`."""
    home_RH = np.arange(num_experts).reshape(num_ranks, -1)
    return np.pad(home_RH, ((0, 0), (0, spare_slots)), constant_values=EMPTY)


def random_counts(rng, num_ranks, num_experts, *, sigma=1.0, tokens=2048):
    """Counts `[R, E]` of a lognormal popularity, drawn token by token."""
    popularity = rng.lognormal(0, sigma, num_experts)
    return rng.multinomial(tokens, popularity / popularity.sum(), size=num_ranks)


def random_slots(rng, num_experts, num_ranks, spare_slots, *, filled=0.8):
    """A permutation of homes, spare slots filled with random experts that the rank does not hold yet."""
    slots_RS = contiguous_slots(num_experts, num_ranks, spare_slots)
    slots_RS[:, : num_experts // num_ranks] = rng.permutation(num_experts).reshape(num_ranks, -1)
    for rank in range(num_ranks):
        for slot in range(num_experts // num_ranks, slots_RS.shape[1]):
            expert = rng.integers(num_experts)
            if rng.random() < filled and expert not in slots_RS[rank]:
                slots_RS[rank, slot] = expert
    return slots_RS
