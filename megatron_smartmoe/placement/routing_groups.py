"""Homes under group-limited routing: groups of experts stay whole on a node, so that a token still goes to few nodes.

Method. Megatron's --moe-router-num-groups divides the experts, by their numbers, into equal groups, and a token takes
its experts from --moe-router-group-topk of them. While every group lies on one node, a token goes to at most that many
nodes. A swap of two experts between nodes would break that for all tokens of their groups. So between nodes only whole
groups are swapped, expert for expert in the order of their loads; inside a node experts are free. Where a group has
several nodes to itself, experts are free inside those and never leave them.

The alternative, to price the wider spread of the tokens, needs to know which experts tokens take together, which the
counts do not say.
"""

from __future__ import annotations

import itertools

import numpy as np

from megatron_smartmoe.spec.arrays import FloatArray, IntArray


def stay_whole(num_ranks: int, num_nodes: int, num_groups: int) -> bool:
    """Whether every group has its place on one node, or on nodes of its own."""
    return num_groups % num_nodes == 0 or (num_nodes % num_groups == 0 and num_ranks % num_groups == 0)


def explain(num_ranks: int, num_nodes: int, num_groups: int) -> str:
    """What group-limited routing means for homes, for people."""
    if not stay_whole(num_ranks, num_nodes, num_groups):
        return "groups do not lie whole on nodes, so homes move without regard to them"
    whole = num_groups >= num_nodes
    return "homes move between nodes by whole groups" if whole else "homes stay on the nodes of their group"


def domains(num_ranks: int, num_nodes: int, num_groups: int) -> IntArray:
    """Part of the ranks that each rank's homes are swapped within, one by one, `[R]`; one part without groups."""
    if num_groups <= 1 or not stay_whole(num_ranks, num_nodes, num_groups):
        return np.zeros(num_ranks, dtype=np.int64)
    return np.arange(num_ranks) * min(num_nodes, num_groups) // num_ranks


def group_swaps(home_RH: IntArray, load_E: FloatArray, node_R: IntArray, num_groups: int) -> list[IntArray]:
    """Swaps of a whole group of the busiest node with one of another node that has less load.

    Args:
        home_RH: experts by home slot.
        load_E: load of each expert.
        node_R: node of each rank.
        num_groups: groups of the routing, each of which lies on one node; one that does not is left alone.

    Returns:
        For each swap the home slots that exchange their experts, `[experts of a group, 2]` flat indices.
    """
    # Step 1: the node of each group, and its load.
    home_slots = home_RH.shape[1]
    slot_E = np.argsort(home_RH.ravel())
    node_GE = node_R[slot_E // home_slots].reshape(num_groups, -1)
    load_GE = load_E.reshape(num_groups, -1)
    whole_G = (node_GE == node_GE[:, :1]).all(axis=1)
    node_G, load_G = node_GE[:, 0], load_GE.sum(axis=1)
    load_N = np.bincount(node_R, weights=load_E[home_RH].sum(axis=1))
    # Step 2: every pair, experts matched by their loads.
    slot_GE = np.take_along_axis(slot_E.reshape(num_groups, -1), np.argsort(-load_GE, axis=1, kind="stable"), axis=1)
    here_G = whole_G & (node_G == int(load_N.argmax()))
    there_G = whole_G & ~here_G
    return [
        np.stack([slot_GE[here], slot_GE[there]], axis=1)
        for here, there in itertools.product(np.nonzero(here_G)[0], np.nonzero(there_G)[0])
        if load_G[here] > load_G[there]
    ]
