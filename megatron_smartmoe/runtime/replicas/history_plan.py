"""Replicas and homes planned from history by the compiled library, without the interpreter's lock."""

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
from megatron_smartmoe.placement.search.objective import Objective, Space
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
    return _improved(new_RS, imbalance_K, value_2)


def compiled_improve(
    slots_RS: IntArray, loads_KE: FloatArray | IntArray, objective: Objective, space: Space
) -> ImprovedPlacement:
    """The best replicas and homes; see `placement.search.improve.improve`, with a space in which homes move."""
    num_ranks = len(slots_RS)
    new_RS, imbalance_K, value_2 = ops.swap_homes(
        torch.from_numpy(np.array(slots_RS)),
        torch.from_numpy(scaled(loads_KE, num_ranks).astype(np.int64)),
        space.home_slots,
        int(space.node_R[-1]) + 1,
        space.max_steps,
        space.max_experts,
        space.max_slots,
        space.trials,
        objective.worst_weight,
        objective.replica_price,
        objective.change_price,
        objective.home_price,
        objective.min_gain,
        objective.enough,
    )
    return _improved(new_RS, imbalance_K, value_2)


def _improved(new_RS: torch.Tensor, imbalance_K: torch.Tensor, value_2: torch.Tensor) -> ImprovedPlacement:
    excess, steps = value_2.tolist()
    return ImprovedPlacement(
        slots_RS=np.asarray(new_RS.numpy()),
        imbalance_K=np.asarray(imbalance_K.numpy()),
        excess=excess,
        steps=int(steps),
    )
