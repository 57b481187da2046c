"""Replicas from exact counts where they pay: for the planners, and for the dispatcher of training, which passes the
compiled planner (`runtime.replicas.split.exact_slots`)."""

from __future__ import annotations

from collections.abc import Callable

from megatron_smartmoe.placement.exact_replicas import exact_replicas
from megatron_smartmoe.placement.plan_replicas import ReplicaOptions, replicas_pay
from megatron_smartmoe.spec.arrays import IntArray
from megatron_smartmoe.spec.placement import EMPTY


def paying_exact_replicas(
    load_E: IntArray,
    slots_RS: IntArray,
    home_slots: int,
    options: ReplicaOptions,
    limit: float,
    plan: Callable[[IntArray, IntArray, int, int], IntArray] = exact_replicas,
) -> IntArray:
    """Slots with replicas planned for exactly these tokens, or without any where they would not pay.

    Args:
        load_E: tokens of each expert.
        slots_RS: the slots as they are; only the homes are read.
        home_slots: columns of homes, E / R.
        options: where replicas may be placed, and what one costs.
        limit: no replica is made while max / mean tokens per rank of the homes alone are at most this.
        plan: plans them; its arguments are the first four of `exact_replicas`.
    """
    bare_RS = slots_RS.copy()
    bare_RS[:, home_slots:] = EMPTY
    num_ranks, tokens = len(slots_RS), int(load_E.sum())
    busiest = int(load_E[slots_RS[:, :home_slots]].sum(axis=1).max())
    # Step 1: homes that are balanced well enough get no replicas.
    if busiest * num_ranks <= limit * tokens:
        return bare_RS
    # Step 2: keep the planned ones if they pay. They can bring the busiest rank down to the mean at best, and mostly
    # come within a few tokens of it. In floats from the start, as in C++: Python would round the quotient of large
    # integers once.
    planned_RS = plan(load_E, bare_RS, home_slots, options.num_nodes)
    saved_tokens = float(busiest) - float(tokens) / num_ranks
    pays = replicas_pay(planned_RS, home_slots, saved_tokens, options.replica_price_tokens)
    return planned_RS if pays else bare_RS
