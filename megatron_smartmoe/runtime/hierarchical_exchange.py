"""Hierarchical all-to-all: a token crosses the links between nodes once for each node, whatever its number of experts.

A flat all-to-all sends a token once for each of its K experts. Where several of them are on one other node, the same
row crosses the slow links several times. Here it takes two hops. With N nodes of L ranks, rank l of a node sends one
row for each token and node to rank l of that node, its gateway there; the gateway copies it to the ranks of its node:

    between nodes   (n, l) -> (m, l)    one row for each token that has experts on node m
    inside a node   (m, l) -> (m, j)    one row for each of its experts on rank j

Rows, their number and their order are those of the flat exchange, to the bit: they are copied and never added.

The way back is another matter. A token's K results differ from each other, and a gateway could only add them up before
they cross. It would have to add them in the order of the nodes, and the flat combine adds them in the order of the
token's experts: the sums would differ in their last bits, and with every move of an expert. So what comes back is not
added up on the way: it takes the flat exchange, with K rows for each token.

Each of the two exchanges of a layer has a direction of each kind:

    dispatch    forward: tokens, hierarchical                     backward: gradients of K copies, flat
    combine     forward: results of K experts, flat               backward: K copies of one gradient, hierarchical

so of four exchanges of rows two save traffic. The alternative, adding up inside the node (DeepEP's combine), saves
traffic in all four and gives up equal bits.

Ranks that have nothing for each other exchange empty messages of the same collective, so no further process group is
needed: NCCL skips them, and for gloo they are a header each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_smartmoe.ops import chunk_rows
from megatron_smartmoe.spec.arrays import IntArray


@dataclass(frozen=True, kw_only=True)
class RowsOnce:
    """Which rows a rank sends once for each token and node, on the device. M is T x K_top, the most rows there can be.

    Attributes:
        first_M: the row of a token's first choice on each node, by node, then row; as many as `number_N` sums to, and
            undefined behind them.
        copy_M: for each row, which of the rows sent to its node it is a copy of, int32; undefined behind the last row.
        number_N: rows sent to each node, int64.
    """

    first_M: torch.Tensor
    copy_M: torch.Tensor
    number_N: torch.Tensor


def rows_once(rows_TK: torch.Tensor, ends_N: torch.Tensor) -> RowsOnce:
    """Find the rows that are the first of their token on their node. The host never waits for the device.

    Args:
        rows_TK: the row of each choice, when rows are in the order in which a flat exchange sends them, `[T, K_top]`;
            -1 for a dropped choice.
        ends_N: where each node's rows end, ascending, int64, on the same device.
    """
    most = rows_TK.numel()
    # Step 1: the node of every choice; one that is dropped is behind the last row, on no node.
    row_TK = torch.where(rows_TK < 0, most, rows_TK).long()
    node_TK = torch.bucketize(row_TK, ends_N, right=True)
    # Step 2: the row of the token's first choice on that node. argmax finds the first of equal values.
    same_TKK = (node_TK[:, :, None] == node_TK[:, None, :]).to(torch.uint8)
    first_TK = row_TK.gather(1, same_TKK.argmax(dim=2))
    # Step 3: number the first rows in their order, which is by node. Row `most` takes what is dropped.
    is_first_M = row_TK.new_zeros(most + 1).scatter_(0, row_TK.flatten(), (first_TK == row_TK).long().flatten())
    before_M = is_first_M[:most].cumsum(0) - is_first_M[:most]
    before_M = torch.cat((before_M, is_first_M[:most].sum().view(1)))  # first rows before each row, and all of them
    begins_N = before_M[torch.cat((ends_N.new_zeros(1), ends_N[:-1]))]
    # Step 4: where each first row is, and which one each row is a copy of.
    place_M = torch.where(is_first_M[:most] > 0, before_M[:most], most)
    first_M = row_TK.new_empty(most + 1).scatter_(0, place_M, torch.arange(most, device=row_TK.device))
    begin_TK = torch.cat((begins_N, begins_N.new_zeros(1)))[node_TK]
    copy_M = row_TK.new_empty(most + 1).scatter_(0, row_TK.flatten(), (before_M[first_TK] - begin_TK).flatten())
    return RowsOnce(first_M=first_M[:most], copy_M=copy_M[:most].int(), number_N=before_M[ends_N] - begins_N)


@dataclass(frozen=True, kw_only=True, eq=False)
class ExchangeSizes:
    """Numbers of rows of one rank's exchange, int64, on the host. `[n, j]` is rank j of node n.

    Attributes:
        once_sent_N: rows to this rank's gateway on each node.
        once_received_N: rows from the rank of each node whose gateway this rank is.
        relayed_NL: what this rank passes on as a gateway: rows from node n for rank j of its own node.
        sent_NL: rows to each rank in the flat exchange.
        received_NL: rows from each rank in the flat exchange.
    """

    once_sent_N: IntArray
    once_received_N: IntArray
    relayed_NL: IntArray
    sent_NL: IntArray
    received_NL: IntArray

    @classmethod
    def of(cls, sent_RR: IntArray, once_RN: IntArray, rank: int) -> ExchangeSizes:
        """The sizes for one rank.

        Args:
            sent_RR: rows that each rank sends to each rank in the flat exchange.
            once_RN: rows that each rank sends to each node, once for each token.
            rank: of the group; ranks of a node are consecutive.
        """
        num_nodes = once_RN.shape[1]
        per_node = len(sent_RR) // num_nodes
        node, peers = rank // per_node, _gateways(rank, per_node)
        return cls(
            once_sent_N=once_RN[rank],
            once_received_N=once_RN[peers, node],
            relayed_NL=sent_RR[peers, node * per_node : (node + 1) * per_node],
            sent_NL=sent_RR[rank].reshape(num_nodes, per_node),
            received_NL=sent_RR[:, rank].reshape(num_nodes, per_node),
        )

    def port_rows(self, rank: int) -> int:
        """Rows that a rank sends to others or receives from them, the greater of the two, in the mean exchange.

        Two of a layer's four exchanges are flat, and two have both hops.

        Args:
            rank: of the group.
        """
        num_nodes, per_node = self.sent_NL.shape
        node, place = divmod(rank, per_node)
        away_N, away_L = np.arange(num_nodes) != node, np.arange(per_node) != place
        away_NL = away_N[:, None] | away_L
        flat = max(int(each_NL[away_NL].sum()) for each_NL in (self.sent_NL, self.received_NL))
        out = self.once_sent_N[away_N].sum() + self.relayed_NL[:, away_L].sum()
        arriving = self.once_received_N[away_N].sum() + self.received_NL[:, away_L].sum()
        return (flat + max(int(out), int(arriving))) // 2


def exchange_sizes(
    group: dist.ProcessGroup, number_N: torch.Tensor, sent_NL: IntArray, received_NL: IntArray
) -> ExchangeSizes:
    """The sizes where no rank knows what the others send: each sends its own to its gateways. The host waits for them.

    Args:
        group: the expert-parallel group; all ranks call this.
        number_N: rows that this rank sends to each node, once for each token; on the device.
        sent_NL: rows to each rank in the flat exchange.
        received_NL: rows from each rank in the flat exchange.
    """
    num_nodes, per_node = sent_NL.shape
    copies_NL = torch.from_numpy(sent_NL).to(number_N.device, non_blocking=True)
    own = torch.cat((number_N[:, None], copies_NL), dim=1)
    sizes_R = _at(_gateways(group.rank(), per_node), np.ones(num_nodes, dtype=np.int64), group.size())
    arriving = torch.cat((own.cpu(), _all_to_all(group, own, sizes_R, sizes_R).cpu()), dim=1).numpy()
    return ExchangeSizes(
        once_sent_N=arriving[:, 0],
        once_received_N=arriving[:, 1 + per_node],
        relayed_NL=arriving[:, 2 + per_node :],
        sent_NL=sent_NL,
        received_NL=received_NL,
    )


class HierarchicalExchange:
    """The dispatch and the combine of one micro-batch, forward and backward.

    All ranks of the group make one at the same point: it sends every gateway the copies that it has to make, four bytes
    for each row of the flat exchange.

    Args:
        group: the expert-parallel group; ranks of a node are consecutive.
        rows: which rows this rank sends.
        sizes: how many, on all ways.
    """

    def __init__(self, group: dist.ProcessGroup, rows: RowsOnce, sizes: ExchangeSizes) -> None:
        self._group = group
        per_node = sizes.sent_NL.shape[1]
        node = group.rank() // per_node
        # Step 1: sizes by rank, of the two hops and of the way back.
        gateways, neighbours = _gateways(group.rank(), per_node), slice(node * per_node, (node + 1) * per_node)
        self._between = (
            _at(gateways, sizes.once_sent_N, group.size()),
            _at(gateways, sizes.once_received_N, group.size()),
        )
        self._inside = (
            _at(neighbours, sizes.relayed_NL.sum(axis=0), group.size()),
            _at(neighbours, sizes.received_NL.sum(axis=0), group.size()),
        )
        self._back = sizes.received_NL.ravel().tolist(), sizes.sent_NL.ravel().tolist()
        # Step 2: what this rank sends, and the rows that it copies as a gateway, by target, then source node.
        self._first_N = rows.first_M[: sum(self._between[0])]
        self._copies_N = self._announce(rows.copy_M, sizes, gateways)
        # Step 3: rows arrive by gateway, then source node; the flat order is by node, then the rank on it.
        self._arrived_N = _transposed(sizes.received_NL.T, rows.copy_M.device)

    def _announce(self, copy_M: torch.Tensor, sizes: ExchangeSizes, gateways: slice) -> torch.Tensor:
        """Tell the gateways which rows are copies of which; returns the rows that this rank copies as a gateway."""
        sent_N, relayed_N = sizes.sent_NL.sum(axis=1), sizes.relayed_NL.sum(axis=1)
        sent_R, received_R = (_at(gateways, each, self._group.size()) for each in (sent_N, relayed_N))
        copy_N = _all_to_all(self._group, copy_M[: sum(sent_R)], sent_R, received_R)
        begins_N = np.cumsum(sizes.once_received_N) - sizes.once_received_N
        runs_2N = torch.from_numpy(np.stack((begins_N, relayed_N))).to(copy_M.device, non_blocking=True)
        row_N = copy_N + torch.repeat_interleave(runs_2N[0], runs_2N[1], output_size=sum(received_R))
        return row_N.index_select(0, _transposed(sizes.relayed_NL, copy_M.device))

    def dispatch(self, rows_NH: torch.Tensor) -> torch.Tensor:
        """Rows to the ranks of their experts; the same as a flat exchange, to the bit.

        Args:
            rows_NH: rows `[N, H]` in the order of the ranks that they go to; the rows of one token are equal.

        Returns:
            The rows that have arrived, in the order of their source ranks.
        """
        arrived: torch.Tensor = _Dispatch.apply(self, rows_NH)  # type: ignore[no-untyped-call]
        return arrived

    def combine(self, rows_NH: torch.Tensor) -> torch.Tensor:
        """Results back to the ranks of their tokens, in the order of `dispatch`'s rows; their gradients are equal rows.

        Args:
            rows_NH: results `[N, H]` in the order in which `dispatch` returned the rows.
        """
        returned: torch.Tensor = _Combine.apply(self, rows_NH)  # type: ignore[no-untyped-call]
        return returned

    def spread(self, rows_NH: torch.Tensor) -> torch.Tensor:
        """The hierarchical way: to the gateways, once for each token and node, and on to the ranks of the node."""
        once_NH = rows_NH.index_select(0, self._first_N)
        at_gateway_NH = _all_to_all(self._group, once_NH, *self._between)
        copies_NH = at_gateway_NH.index_select(0, self._copies_N)
        arrived_NH = _all_to_all(self._group, copies_NH, *self._inside)
        return arrived_NH.index_select(0, self._arrived_N)

    def bring_back(self, rows_NH: torch.Tensor) -> torch.Tensor:
        """The flat way back, all rows of a token."""
        return _all_to_all(self._group, rows_NH.contiguous(), *self._back)


def _gateways(rank: int, per_node: int) -> slice:
    """A rank's gateways: on each node the rank with its place; it is theirs as well."""
    return slice(rank % per_node, None, per_node)


def _at(ranks: slice, sizes_N: IntArray, num_ranks: int) -> list[int]:
    """Sizes for some ranks, and 0 for all others."""
    sizes_R = [0] * num_ranks
    sizes_R[ranks] = sizes_N.tolist()
    return sizes_R


def _transposed(counts_QS: IntArray, device: torch.device) -> torch.Tensor:
    """For rows in the order (q, s): which of them come one after the other in the order (s, q), int32."""
    counts = torch.from_numpy(np.ascontiguousarray(counts_QS)).to(device, non_blocking=True)
    return chunk_rows(counts, int(counts_QS.sum()))[1]


def _all_to_all(
    group: dist.ProcessGroup, rows_N: torch.Tensor, sent_R: Sequence[int], received_R: Sequence[int]
) -> torch.Tensor:
    arrived_N = rows_N.new_empty((sum(received_R), *rows_N.shape[1:]))
    dist.all_to_all_single(arrived_N, rows_N, list(received_R), list(sent_R), group=group)
    return arrived_N


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, exchange: HierarchicalExchange, rows_NH: torch.Tensor) -> torch.Tensor:
        ctx.exchange = exchange
        return exchange.spread(rows_NH)

    @staticmethod
    def backward(ctx: Any, grad_NH: torch.Tensor) -> tuple[None, torch.Tensor]:
        return None, ctx.exchange.bring_back(grad_NH)


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, exchange: HierarchicalExchange, rows_NH: torch.Tensor) -> torch.Tensor:
        ctx.exchange = exchange
        return exchange.bring_back(rows_NH)

    @staticmethod
    def backward(ctx: Any, grad_NH: torch.Tensor) -> tuple[None, torch.Tensor]:
        return None, ctx.exchange.spread(grad_NH)
