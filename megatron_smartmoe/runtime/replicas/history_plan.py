"""Replicas planned from history by the compiled library, without the interpreter's lock."""

from __future__ import annotations

import numpy as np
import torch

from megatron_smartmoe import ops
from megatron_smartmoe.placement.plan_replicas import (
    ReplicaOptions,
    is_many,
    search_objective,
    search_space,
)
from megatron_smartmoe.placement.search.cuts import scaled
from megatron_smartmoe.placement.search.improve import ImprovedPlacement
from megatron_smartmoe.spec.arrays import FloatArray, IntArray


def compiled_best_replicas(
    slots_RS: IntArray, scenarios_KE: FloatArray, home_slots: int, options: ReplicaOptions
) -> ImprovedPlacement:
    """The best replicas; see `placement.plan_replicas.best_replicas`."""
    num_ranks = len(slots_RS)
    space, objective = search_space(num_ranks, home_slots, options), search_objective(num_ranks, options)
    loads_KE = scaled(scenarios_KE, num_ranks).astype(np.int64)
    new_RS, imbalance_K, value_2 = ops.history_replicas(
        torch.from_numpy(np.array(slots_RS)),  # a copy: those of a placement cannot be written, which torch warns of
        torch.from_numpy(loads_KE),
        home_slots,
        options.num_nodes,
        is_many(num_ranks),
        space.max_steps,
        space.max_experts,
        space.max_slots,
        space.trials,
        options.good_enough,
        objective.worst_weight,
        objective.replica_price,
        objective.change_price,
        objective.min_gain,
        objective.enough,
    )
    excess, steps = value_2.tolist()
    return ImprovedPlacement(
        slots_RS=np.asarray(new_RS.numpy()),
        imbalance_K=np.asarray(imbalance_K.numpy()),
        excess=excess,
        steps=int(steps),
    )
