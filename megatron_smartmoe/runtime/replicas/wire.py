"""Messages of the replicas: weights from homes to replicas, gradients back, within one group of ranks.

Both are relayed along one tree per expert (`placement.relay`): a rank that has received an expert's weights sends them
on in the next rounds, so that the home sends log2 of the number of replicas and not all of them. Gradients come back up
the same tree in the opposite order of its rounds. A rank adds what its children send to what it has, in float32, in the
order of the rounds, those of the expert last reached first; then it sends the sum to its parent. So a sum has one order
whatever arrives when, and a repeated run has the same bits. A gradient with which no other was summed travels in its
own type, a sum in float32.

This is where a transport that knows more than sends and receives would go: `start_fetch` is a multicast of each expert
from its home to its replicas (NVLink SHARP, or NVSHMEM's copy engines, which also leave the multiprocessors to the
GEMMs), `start_return` a reduction to the home. Such a transport replaces the rounds of both, and nothing outside.

Every message has a tag of its own, so that on gloo, where messages of a pair match by tag, one that is sent twice is
never taken for another. NCCL ignores tags and matches by order, which is the same on all ranks (`transfer`).

The group is used for nothing else, so that the token exchange of a layer and its replicas do not wait for each other in
one queue.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from megatron_smartmoe.runtime.digest import digest_bounds, is_one_digest
from megatron_smartmoe.runtime.replicas.fp8_blocks import PackedSlots
from megatron_smartmoe.runtime.replicas.links import Link
from megatron_smartmoe.runtime.replicas.per_slot import SlotWeight
from megatron_smartmoe.runtime.replicas.transfer import Beside, Round, Transfer
from megatron_smartmoe.runtime.step_clock import STEP_CLOCK, Part

Totals = Callable[[], Sequence[SlotWeight]]
_MOST_TAGS = 2**30  # gloo's are non-negative int32


class ReplicaWire:
    """Sends replicas and their gradients. All ranks of the group construct it together.

    Args:
        group: The ranks of one expert-parallel group, in its order; used for nothing else.
        num_nodes: Nodes that they lie on, consecutive ranks on one node: trees of relays enter a node once.
    """

    def __init__(self, group: dist.ProcessGroup, num_nodes: int = 1) -> None:
        self._group, self._ranks, self.num_nodes = group, dist.get_process_group_ranks(group), num_nodes
        self.rank, self.num_ranks = dist.get_rank(group), len(self._ranks)
        self._device = torch.cuda.current_device() if dist.get_backend(group) == "nccl" else "cpu"
        self._under_way: list[Transfer] = []  # in the order of their start
        self._next_tag = 0
        self._sent_bytes = [0, 0]  # by this rank: weights, gradients
        # NCCL connects a group in its first operation and waits there for all of its ranks. Only the ranks that send or
        # receive something post a fetch, so a fetch must not be that first operation.
        dist.all_reduce(torch.zeros(1, device=self._device), group=group)

    @STEP_CLOCK.within(Part.REPLICAS)
    @torch.no_grad()
    def start_fetch(
        self,
        links: Sequence[Link],
        homes: Sequence[SlotWeight | PackedSlots],
        spares: Sequence[torch.Tensor],
        num_links: int,
    ) -> Transfer:
        """Start to copy weights to the replicas. A call of the whole group.

        Args:
            links: Those in which this rank takes part.
            homes: Weights of this rank's home slots, `[S, ...]` each, or messages that have them.
            spares: Weights of this rank's spare slots, `[K, ...]` each, or memory for the messages.
            num_links: All links of the table.
        """
        rounds = [Round() for _ in range(max((link.round + 1 for link in links), default=0))]
        tags = self._tags(num_links, len(homes))
        for link in links:
            for part, (home, spare) in enumerate(zip(homes, spares, strict=True)):
                if link.parent == self.rank:
                    data = (home if link.from_home else spare)[link.parent_slot]
                    operation = self._operation(dist.isend, data, link.child, tags(link, part))
                    self._sent_bytes[0] += data.nbytes
                else:
                    operation = self._operation(dist.irecv, spare[link.slot], link.parent, tags(link, part))
                rounds[link.round].operations.append(operation)
        return self._start("weights of replicas", rounds, homes[0].device)

    @STEP_CLOCK.within(Part.REPLICAS)
    @torch.no_grad()
    def start_return(
        self,
        links: Sequence[Link],
        gradients: Sequence[torch.Tensor],
        totals: Totals,
        num_links: int,
    ) -> Transfer:
        """Start to add the replicas' gradients to those of their homes. A call of the whole group.

        Args:
            links: Those in which this rank takes part, as in the fetch.
            gradients: Gradients of this rank's spare slots, `[K, ...]` each; contiguous, of one dtype on all ranks.
                They are kept until the transfer has finished, and not changed.
            totals: Returns the gradients of this rank's home slots, `[S, ...]` each; added to in place, in their own
                dtype, when the transfer finishes.
            num_links: All links of the table.
        """
        for transfer in [each for each in self._under_way if each.delivers and each.is_posted]:
            transfer.finish()  # it was posted at an earlier point, at which as much had been computed since
        rounds = [Round() for _ in range(max((link.back_round + 1 for link in links), default=0))]
        tags = self._tags(num_links, len(gradients))
        arriving = list[tuple[int, int, torch.Tensor]]()  # which of `totals`, its slot, and what is added to it
        sums = dict[tuple[int, int], torch.Tensor]()  # of replicas that have children, by (part, slot)
        for link in sorted(links, key=lambda link: (link.back_round, link.number)):
            operations, added = rounds[link.back_round].operations, rounds[link.back_round].sums
            for part, gradient in enumerate(gradients):
                if link.child == self.rank:
                    data = sums.get((part, link.slot), gradient[link.slot])
                    operations.append(self._operation(dist.isend, data, link.parent, tags(link, part)))
                    self._sent_bytes[1] += data.nbytes
                    continue
                dtype = torch.float32 if link.relays else gradient.dtype
                staged = torch.empty(gradient.shape[1:], dtype=dtype, device=gradient.device)
                operations.append(self._operation(dist.irecv, staged, link.child, tags(link, part)))
                if link.from_home:
                    arriving.append((part, link.parent_slot, staged))
                    continue
                place = part, link.parent_slot
                if place not in sums:
                    sums[place] = gradient[link.parent_slot].to(torch.float32, copy=True)
                added.append((sums[place], staged))

        def deliver() -> None:
            of_homes = totals()
            for part, slot, staged in arriving:
                of_homes[part][slot].add_(staged)
                if staged.is_cuda:  # the stream may be another than that of the backward pass, which it belongs to
                    staged.record_stream(torch.cuda.current_stream())

        return self._start("gradients of replicas", rounds, gradients[0].device, deliver)

    def advance(self) -> None:
        """Post the next round of every transfer. To be called at the same points of all ranks' programs."""
        for transfer in self._under_way:
            transfer.advance()

    def settle(self) -> None:
        """Wait for transfers that nobody has asked for, and drop what they brought: an iteration was broken off."""
        while self._under_way:
            self._under_way.pop(0).drop()

    def take_sent_bytes(self) -> tuple[int, int]:
        """Bytes of weights and of gradients that all ranks have sent since the last call. A collective call."""
        sums = torch.tensor(self._sent_bytes, device=self._device)
        dist.all_reduce(sums, group=self._group)
        self._sent_bytes = [0, 0]
        weights, gradients = sums.tolist()
        return weights, gradients

    def is_equal_on_all_ranks(self, digest: str) -> bool:
        """Whether all ranks of the group pass the same hexadecimal digest. A collective call; the host waits."""
        bounds = digest_bounds(digest, self._device)
        dist.all_reduce(bounds, op=dist.ReduceOp.MAX, group=self._group)
        return is_one_digest(bounds.tolist())

    def _start(
        self, what: str, rounds: list[Round], device: torch.device, delivers: Callable[[], None] | None = None
    ) -> Transfer:
        self.advance()
        transfer = Transfer(what, rounds, Beside(device), delivers)
        self._under_way = [each for each in self._under_way if not each.is_finished]
        self._under_way.append(transfer)
        return transfer

    def _tags(self, num_links: int, num_parts: int) -> Callable[[Link, int], int]:
        """Tags of the messages of one transfer; all ranks count them alike."""
        first, self._next_tag = self._next_tag, (self._next_tag + num_links * num_parts) % _MOST_TAGS
        return lambda link, part: (first + link.number * num_parts + part) % _MOST_TAGS

    def _operation(self, kind: Callable[..., Any], data: torch.Tensor, peer: int, tag: int) -> dist.P2POp:
        return dist.P2POp(kind, data.detach(), self._ranks[peer], self._group, tag)


def advancing(rows: torch.Tensor, wire: ReplicaWire) -> torch.Tensor:
    """The same rows, at which the backward pass posts the next round of every transfer."""
    passed: torch.Tensor = _Advancing.apply(rows, wire)  # type: ignore[no-untyped-call]
    return passed


class _Advancing(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, wire: ReplicaWire) -> torch.Tensor:
        ctx.wire = wire
        return rows.view_as(rows)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        ctx.wire.advance()
        return gradient, None
