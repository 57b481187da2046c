"""What the exchanges of a layer carry, by the name of its dispatcher: one function for all who price a layer.

Planner, simulator, and in training the homes, the replicas and the pool price a layer's tokens through `carried`, so
that none of them balances traffic that the run does not have. A flow says which choices go from which rank to which;
what crosses the links for them is the dispatcher's affair:

    flat           a row for each choice, in all four exchanges
    hierarchical   in two of four exchanges once between nodes for each token and node, and through a gateway there; in
                   the other two as flat (see `cost.hierarchical`)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_smartmoe.cost.comm import BusiestPorts, busiest_domain
from megatron_smartmoe.cost.hierarchical import (
    HopCounts,
    mean_ports,
    more_rows_by_node,
    rows_by_node,
    rows_copied,
    to_gateways,
)
from megatron_smartmoe.spec.parallel import FLAT, Dispatch


@dataclass(frozen=True, kw_only=True)
class TokenDispatch:
    """A dispatcher, and what its traffic depends on besides the flow.

    Attributes:
        name: as `--smartmoe-dispatch` names it.
        experts: E, that a token chooses from.
        top_k: K, choices of a token.
    """

    name: Dispatch = FLAT
    experts: int = 1
    top_k: int = 1


FLAT_DISPATCH = TokenDispatch()


@dataclass(frozen=True, kw_only=True)
class Carried:
    """What a layer's mean exchange carries, in rows.

    Attributes:
        ports: the busiest ports inside nodes and between them.
        leaving: rows out of the busiest domain of each level above the nodes, over its ranks.
        copied: rows that the busiest rank copies in memory besides permuting, in all four exchanges.
    """

    ports: BusiestPorts
    leaving: tuple[float, ...]
    copied: float = 0.0


def carried(
    flat: BusiestPorts,
    leaving: tuple[float, ...],
    hops: HopCounts | None,
    dispatch: TokenDispatch,
    ranks_of_levels: Sequence[int] = (),
) -> Carried:
    """What the mean exchange of a layer carries under a dispatcher.

    Args:
        flat: the busiest ports of a row for each choice.
        leaving: likewise out of the busiest domain of each level.
        hops: what two hops make of the flow; None on one node, where every dispatcher is flat.
        dispatch: the dispatcher.
        ranks_of_levels: consecutive ranks of a domain of each level.
    """
    if dispatch.name == FLAT or hops is None:
        return Carried(ports=flat, leaving=leaving)
    once_RN = rows_by_node(hops.choices_RN, dispatch.experts, dispatch.top_k)
    gateways_RR = to_gateways(once_RN)
    return Carried(
        ports=mean_ports(flat, hops, once_RN),
        leaving=tuple(
            (rows + busiest_domain(gateways_RR, ranks)) / 2
            for rows, ranks in zip(leaving, ranks_of_levels, strict=False)
        ),
        copied=rows_copied(hops, once_RN),
    )


@dataclass(frozen=True, kw_only=True)
class RowShares:
    """Rows that one more choice of a node's experts adds to a layer's mean exchange, at an even load.

    Attributes:
        between: between nodes.
        inside: inside the node.
    """

    between: float
    inside: float


def rows_of_a_choice(dispatch: TokenDispatch, num_nodes: int) -> RowShares:
    """The exchanges' part in what a choice costs that homes may move to another node.

    Args:
        dispatch: the dispatcher.
        num_nodes: nodes of the group.
    """
    away = 1 - 1 / num_nodes
    flat = RowShares(between=away, inside=1 - away)
    if dispatch.name == FLAT or num_nodes == 1:
        return flat
    # A gateway passes on every choice of its node, and gets one more row only for a token without an expert there yet.
    once = away * more_rows_by_node(1 / num_nodes, dispatch.experts, dispatch.top_k)
    return RowShares(between=(flat.between + once) / 2, inside=(flat.inside + 1) / 2)
