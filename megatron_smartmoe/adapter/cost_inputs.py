"""This run's prices: what the planners of homes and replicas are told about the machine and the model."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import replace

from megatron.core import parallel_state as mpu
from megatron.core.num_microbatches_calculator import get_num_microbatches

from megatron_smartmoe.adapter.expert_sizes import expert_shape, state_bytes
from megatron_smartmoe.adapter.flags.replica_arguments import replicas_mode
from megatron_smartmoe.adapter.machine import machine, nodes_of_group
from megatron_smartmoe.cost.moe_layer import constants_of, exchange_bytes_s, replica_tokens
from megatron_smartmoe.placement.homes_planner import OnlineOptions
from megatron_smartmoe.placement.layer_cost import LayerPricing
from megatron_smartmoe.placement.plan_replicas import ReplicaOptions
from megatron_smartmoe.placement.policy import PolicyOptions


def online_setting(options: Namespace, mode: str | None = None) -> LayerPricing:
    """The cost model's view of one expert-parallel group.

    Copies from history are fetched once for all micro-batches of an iteration, so that one bears a share of the price.

    Args:
        options: Megatron's.
        mode: how copies are planned; None for what the flags say.
    """
    num_ranks = mpu.get_expert_model_parallel_world_size()
    constants = constants_of(machine(options), expert_shape(options))
    if (mode or replicas_mode(options)) == "history":
        shares = get_num_microbatches()
        constants = replace(
            constants,
            intra_replica_s=constants.intra_replica_s / shares,
            inter_replica_s=constants.inter_replica_s / shares,
        )
    return LayerPricing(
        num_ranks=num_ranks,
        num_nodes=nodes_of_group(num_ranks),
        constants=constants,
    )


def online_options(options: Namespace, review_records: int) -> OnlineOptions:
    """What the planners are told.

    Args:
        options: Megatron's.
        review_records: records after a move of homes on which it is judged.
    """
    cluster = machine(options)
    num_nodes = nodes_of_group(mpu.get_expert_model_parallel_world_size())
    return OnlineOptions(
        homes_interval=1,  # the controller asks once an interval
        replicas="exact" if replicas_mode(options) == "exact" else "history",
        micro_batches=get_num_microbatches(),
        state_bytes=state_bytes(options),
        migration_bytes_s=exchange_bytes_s(cluster, between_nodes=num_nodes > 1),
        replica=replica_options(options),
        policy=PolicyOptions(
            horizon_iterations=options.smartmoe_homes_horizon,
            margin=options.smartmoe_homes_margin,
            cooldown_iterations=options.smartmoe_homes_interval,
        ),
        review_records=review_records,
    )


def replica_options(options: Namespace) -> ReplicaOptions:
    """Where copies may lie, and what one costs."""
    return ReplicaOptions(num_nodes=scope_nodes(options), replica_price_tokens=replica_price_tokens(options))


def scope_nodes(options: Namespace) -> int:
    """Nodes that replicas are bound to; 1 lets them lie anywhere in the group."""
    if options.smartmoe_replicas_scope == "group":
        return 1
    return nodes_of_group(mpu.get_expert_model_parallel_world_size())


def replica_price_tokens(options: Namespace) -> float:
    """Tokens that the busiest rank must be spared for a replica, --smartmoe-replicas-margin included."""
    constants = constants_of(machine(options), expert_shape(options))
    between_nodes = nodes_of_group(mpu.get_expert_model_parallel_world_size()) > scope_nodes(options)
    return float(options.smartmoe_replicas_margin * replica_tokens(constants, between_nodes=between_nodes))
