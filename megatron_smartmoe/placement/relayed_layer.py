"""What a layer's time depends on where replicas travel along relay trees and the split is best for the busiest rank.

The simulator and the reviews of moved homes price every layer and micro-batch of a trace; the compiled twin takes all
steps below in one call.
"""

from __future__ import annotations

import numpy as np

from megatron_smartmoe.cost.moe_layer import RelayedFlow
from megatron_smartmoe.placement.relay import relay_tree
from megatron_smartmoe.placement.split import assign_sources, min_max_split
from megatron_smartmoe.spec.arrays import FloatArray, IntArray
from megatron_smartmoe.spec.placement import BoolArray, hosts_of


def relayed_layer(
    counts_RE: IntArray, slots_RS: IntArray, home_slots: int, num_nodes: int, kept_RS: IntArray | None = None
) -> RelayedFlow:
    """The flow of a layer with the exact split, added up over the experts.

    Args:
        counts_RE: tokens of source rank r for expert e.
        slots_RS: homes, then replicas.
        home_slots: columns of homes, E / R.
        num_nodes: nodes that the ranks lie on.
        kept_RS: the slots with the replicas from history, where those of `slots_RS` were planned anew.
    """
    hosts_ER = hosts_of(slots_RS, counts_RE.shape[1])
    tokens_ER = min_max_split(counts_RE, hosts_ER)
    sent_RRS = assign_sources(counts_RE, slots_RS, tokens_ER, num_nodes)
    return RelayedFlow(
        tokens_R=tokens_ER.sum(axis=0).astype(np.float64),
        active_R=(tokens_ER > 0).sum(axis=0),
        traffic_RR=sent_RRS.sum(axis=2).astype(np.float64),
        num_nodes=num_nodes,
        replica_steps=relay_tree(slots_RS, home_slots, num_nodes).steps_by_link(num_nodes),
        early_tokens=early_tokens(tokens_ER.astype(np.float64), home_ranks(slots_RS, home_slots), hosts_ER),
        kept_steps=(0, 0) if kept_RS is None else relay_tree(kept_RS, home_slots, num_nodes).steps_by_link(num_nodes),
    )


def home_ranks(slots_RS: IntArray, home_slots: int) -> IntArray:
    """The rank of each expert's home, `[E]`."""
    order: IntArray = np.argsort(slots_RS[:, :home_slots].ravel(), kind="stable")
    return order // home_slots


def early_tokens(load_ER: FloatArray, home_E: IntArray, hosts_ER: BoolArray) -> float:
    """Tokens for homes on that rank with replicas which has fewest of them."""
    is_home_ER = np.zeros_like(hosts_ER)
    is_home_ER[np.arange(len(home_E)), home_E] = True
    holds_R = (hosts_ER & ~is_home_ER).any(axis=0)
    return float(np.where(is_home_ER, load_ER, 0.0).sum(axis=0)[holds_R].min()) if holds_R.any() else 0.0
