"""The spare slots of one layer, and the replicas of other ranks' experts that they hold for a while.

A replica is no parameter. Its weights enter the computation through `_Use`, an autograd function with the home weights
as inputs: the backward pass of every rank goes through it before it reaches the home weights, whether that rank holds a
replica or not. There the gradients of the replicas are summed and, in the last backward pass that uses them, start on
their way to their homes while the pass goes on to other layers. They are added to the gradients that the optimizer will
read by `finish_returns`, which has to be called before those are reduced over data-parallel ranks. A return that has
been posted when a later one starts is finished then, so that only those of a few layers hold memory. Both moments are
points of the program, not of the clock: the order of all sums is the same in every run.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from megatron_smartmoe.runtime.replicas import fp8_blocks
from megatron_smartmoe.runtime.replicas.links import Link, links_of
from megatron_smartmoe.runtime.replicas.per_slot import SlotWeight, tensors_of
from megatron_smartmoe.runtime.replicas.transfer import Transfer
from megatron_smartmoe.runtime.replicas.wire import ReplicaWire, Totals
from megatron_smartmoe.spec.arrays import IntArray
from megatron_smartmoe.spec.placement import EMPTY


class ReplicasInUse:
    """One set of replicas, from the fetch of the weights to the return of the gradients.

    Args:
        slots_RS: The slot table, equal on all ranks of the group, with some replicas.
        takes_part: False where this rank holds none of them and has the home of none.
        wire: Sends the weights and gradients.
        homes: The home weights, `[S, ...]` each.
        spares: Memory for the replicas' weights, `[K, ...]` each.
        sums: Memory for their gradients, float32, summed over several backward passes and shaped as `spares`; None for
            one pass.
        returns: Where the returns of the layer's gradients are kept until they are finished.
        totals: Returns the home gradients that the optimizer reads, shaped as `homes`.
        num_passes: Number of backward passes before the gradients are sent to their homes.
        instead_of: Replicas of several passes that these serve one pass for; None for none.
        accumulates: Whether who computes the gradients may add them to the sums, which then are the weights'
            `main_grad`; see `SpareSlots`.
        packs: Whether matrices travel as fp8; see `SpareSlots`.
    """

    def __init__(
        self,
        slots_RS: IntArray,
        wire: ReplicaWire,
        *,
        takes_part: bool,
        homes: Sequence[SlotWeight],
        spares: Sequence[torch.Tensor],
        sums: Sequence[torch.Tensor] | None,
        returns: list[Transfer],
        totals: Totals,
        num_passes: int,
        instead_of: ReplicasInUse | None = None,
        accumulates: bool = False,
        packs: bool = False,
    ) -> None:
        assert sums is not None or num_passes == 1, "gradients of several passes need memory to be summed in"
        self._slots_RS, self._takes_part, self._wire = slots_RS, takes_part, wire
        self._homes, self._totals, self._returns = tuple(homes), totals, returns
        self.spares, self._sums = tuple(spares), sums
        self._num_passes, self._passes, self._has_sums = num_passes, 0, False
        self._instead_of = instead_of
        self.accumulates, self._is_clear = accumulates and sums is not None, False
        self._packs = [packs and fp8_blocks.can_pack(home) for home in self._homes]
        self._messages: dict[int, torch.Tensor] = {}  # of the weights that arrive packed, by their number
        self._fetch: Transfer | None = None

    def start(self) -> None:
        """Start to fetch the weights unless that was done already. A call of the whole group."""
        if self._fetch is None:
            sent: list[SlotWeight | fp8_blocks.PackedSlots] = list(self._homes)
            arrive = list(self.spares)
            for part in [part for part, packs in enumerate(self._packs) if packs]:
                num_slots, rows, columns = arrive[part].shape
                size = num_slots, fp8_blocks.message_bytes(rows, columns)
                sent[part] = fp8_blocks.PackedSlots(self._homes[part])
                arrive[part] = self._messages[part] = torch.zeros(size, dtype=torch.uint8, device=self.spares[0].device)
            self._fetch = self._wire.start_fetch(self._links(), sent, arrive, self._num_links)

    def finish(self) -> None:
        """Wait for the fetch if one is under way: nobody else may use its memory before it has ended."""
        if self._fetch is not None:
            self._fetch.finish()

    def weights(self) -> tuple[torch.Tensor, ...]:
        """Wait for the replicas' weights and return them as part of the autograd graph. A call of the whole group."""
        self.start()
        self.finish()
        self._unpack()
        used: tuple[torch.Tensor, ...] = _Use.apply(self, *tensors_of(self._homes))  # type: ignore[no-untyped-call]
        if self.accumulates:
            self._clear_sums()
            for weight, total in zip(used, self._sums or (), strict=True):
                weight.main_grad = total  # type: ignore[attr-defined]
        return used

    def _unpack(self) -> None:
        """Turn what has arrived into weights. A slot without a replica has got zeros."""
        for part, messages in self._messages.items():
            for message, weight in zip(messages, self.spares[part], strict=True):
                fp8_blocks.unpack(message, weight)
        self._messages.clear()

    def _clear_sums(self) -> None:
        """Start an iteration's sums from zero, where they are added to from outside; the last ones have to be home."""
        if self._is_clear:
            return
        self._finish_returns()
        for total in self._sums or ():
            total.zero_()
        self._is_clear = True

    def collect(self, gradients: Sequence[Any]) -> None:
        """Sum the replicas' gradients of one backward pass; after the last pass, start to send them to their homes.

        Args:
            gradients: Tensors; None where gradients are accumulated and are in the sums already.
        """
        if self._sums is None:
            self._return([gradient.contiguous() for gradient in gradients])
            if self._instead_of is not None:
                self._instead_of.end_pass()
            return
        if not self._has_sums:
            self._finish_returns()  # of an iteration that nobody finished
        for total, gradient in zip(self._sums, gradients, strict=True):
            if self.accumulates:
                if gradient is not None:  # one that was not added to the sums
                    total.add_(gradient)
            elif self._has_sums:
                total.add_(gradient)
            else:
                total.copy_(gradient)
        self._has_sums = True
        self.end_pass()

    def end_pass(self) -> None:
        """Count a backward pass, in which these replicas or others instead of them were used. A call of the whole
        group; after the last pass, send the gradients to their homes."""
        self._passes += 1
        if self._passes == self._num_passes:
            if self._has_sums:
                self._return(self._sums or ())
            self._passes, self._has_sums, self._is_clear = 0, False, False  # Megatron may run an iteration again

    def _return(self, gradients: Sequence[torch.Tensor]) -> None:
        """Start a return, when that of the micro-batch before is added up: sums have the order of the micro-batches."""
        self._finish_returns()
        self._returns.append(self._wire.start_return(self._links(), gradients, self._totals, self._num_links))

    def _finish_returns(self) -> None:
        while self._returns:
            self._returns.pop(0).finish()

    def _links(self) -> tuple[Link, ...]:
        """The messages in which this rank takes part. Looked for when they are needed: it takes the host a while."""
        wire = self._wire
        return links_of(self._slots_RS, len(self._homes[0]), wire.rank, wire.num_nodes) if self._takes_part else ()

    @property
    def _num_links(self) -> int:
        return int((self._slots_RS[:, len(self._homes[0]) :] != EMPTY).sum())


class _Use(torch.autograd.Function):
    """Puts the replicas' weights into the graph; its backward pass collects their gradients."""

    @staticmethod
    def forward(ctx: Any, used: ReplicasInUse, *homes: torch.nn.Parameter) -> tuple[torch.Tensor, ...]:
        ctx.used = used
        ctx.set_materialize_grads(not used.accumulates)
        return tuple(spare.detach() for spare in used.spares)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[None, ...]:
        ctx.used.collect(gradients)
        return (None,) * len(ctx.needs_input_grad)  # the home weights' share is in `totals`, in float32


class SpareSlots:
    """The K spare slots of a rank in one layer.

    Args:
        homes: The home weights, `[S, ...]` each.
        num_slots: K, the spare slots.
        wire: Sends weights and gradients within the expert-parallel group.
        totals: Returns the home gradients that the optimizer reads.
        keeps: Whether replicas stay for an iteration. If so, there is one set of buffers: K slots of weights and K of
            float32 gradients. Otherwise each micro-batch has K slots of weights from its forward to its backward pass.

        accumulates: Whether gradients of replicas that stay may be added to their float32 sums as they are computed:
            the weights get the sums as their `main_grad`. Otherwise autograd hands them over in the weights' type.
        packs: Whether matrices in bf16 travel to the replicas as fp8 with a scale per block; see `fp8_blocks`.

    A fetch that has been started and whose weights nobody asked for, in an iteration that was broken off, is waited for
    before other replicas are used, or none: `_in_use` changes in `_replace` alone.
    """

    def __init__(
        self,
        homes: Sequence[SlotWeight],
        num_slots: int,
        wire: ReplicaWire,
        totals: Totals,
        *,
        keeps: bool,
        accumulates: bool = False,
        packs: bool = False,
    ) -> None:
        self._accumulates, self._packs = accumulates, packs
        self._homes, self.num_slots, self.wire, self._totals = tuple(homes), num_slots, wire, totals
        self.home_slots = self._homes[0].shape[0]
        self._keeps = keeps
        self._weights = self._buffers() if keeps else None
        self._sums = self._buffers(torch.float32) if keeps else None
        self._in_use: ReplicasInUse | None = None
        self._once: ReplicasInUse | None = None  # those of one micro-batch, instead of the iteration's
        self._returns: list[Transfer] = []

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self._homes[0].device

    @property
    def in_use(self) -> ReplicasInUse | None:
        """The replicas in use, or None."""
        return self._in_use if self._once is None else self._once

    def _replace(self, used: ReplicasInUse | None) -> None:
        """Use other replicas, or none, once the fetch of those in use has ended."""
        for before in (self._in_use, self._once):
            if before is not None:
                before.finish()
        self._in_use, self._once = used, None

    def finish_returns(self) -> None:
        """Add the gradients that are under way to those of the home weights. A call of the whole group."""
        while self._returns:
            self._returns.pop(0).finish()

    def drop(self) -> None:
        """Use no replicas until the next call of `use`."""
        self._replace(None)

    def keep(self, keeps: bool) -> None:
        """Set whether replicas stay for an iteration from now on. To be called between iterations.

        Buffers stay allocated, so that the memory in use does not depend on the order of the modes.
        """
        self.drop()
        self._keeps = keeps
        if keeps and self._weights is None:
            self._weights, self._sums = self._buffers(), self._buffers(torch.float32)

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers that stay allocated."""
        return sum(buffer.nbytes for buffer in (*(self._weights or ()), *(self._sums or ())))

    @property
    def micro_batch_nbytes(self) -> int:
        """Bytes of the replicas' weights that one micro-batch holds where replicas do not stay for an iteration."""
        return sum(self.num_slots * home[0].nbytes for home in self._homes)

    def use(self, slots_RS: IntArray, *, num_passes: int, takes_part: bool = True) -> ReplicasInUse | None:
        """Use the replicas of a slot table from now on.

        Args:
            slots_RS: The slot table, experts numbered by their homes; equal on all ranks of the group.
            num_passes: Number of backward passes before the gradients are sent to their homes.
            takes_part: False where the caller knows that this rank holds none and has the home of none.

        Returns:
            The replicas in use; None if the table has none.
        """
        used = None
        if (slots_RS[:, self.home_slots :] != EMPTY).any():
            spares, sums = (self._weights, self._sums) if self._keeps else (None, None)
            used = self._replicas(slots_RS, takes_part, spares or self._buffers(), sums, num_passes)
        self._replace(used)
        return used

    def use_once(self, slots_RS: IntArray, *, takes_part: bool = True) -> ReplicasInUse:
        """Use other replicas for one micro-batch, in memory of its own, and then those of the iteration again.

        Args:
            slots_RS: The slot table, with some replicas; see `use`.
            takes_part: See `use`.
        """
        assert self._keeps, "where no replicas stay for an iteration, `use` is for one micro-batch"
        if self._once is not None:  # of a micro-batch that was broken off
            self._once.finish()
        self._once = self._replicas(slots_RS, takes_part, self._buffers(), None, 1, instead_of=self._in_use)
        return self._once

    def _replicas(
        self,
        slots_RS: IntArray,
        takes_part: bool,
        spares: Sequence[torch.Tensor],
        sums: Sequence[torch.Tensor] | None,
        num_passes: int,
        instead_of: ReplicasInUse | None = None,
    ) -> ReplicasInUse:
        return ReplicasInUse(
            slots_RS,
            self.wire,
            takes_part=takes_part,
            homes=self._homes,
            spares=spares,
            sums=sums,
            returns=self._returns,
            totals=self._totals,
            num_passes=num_passes,
            instead_of=instead_of,
            accumulates=self._accumulates,
            packs=self._packs,
        )

    def weights(self) -> tuple[torch.Tensor, ...]:
        """The replicas' weights for one micro-batch, `[K, ...]` each; see `ReplicasInUse.weights`.

        Replicas for one micro-batch belong to autograd from then on, which frees them after their backward pass.
        """
        used = self.in_use
        assert used is not None, "no replicas are in use"
        weights = used.weights()
        self._once = None
        if not self._keeps:
            self.drop()
        return weights

    def _buffers(self, dtype: torch.dtype | None = None) -> tuple[torch.Tensor, ...]:
        """Zeros: a slot without a replica gets no rows, but NaN in its weights could spread in the grouped GEMM."""
        sizes = [(self.num_slots, *home.shape[1:]) for home in self._homes]
        return tuple(
            torch.zeros(size, dtype=dtype or home.dtype, device=home.device)
            for size, home in zip(sizes, self._homes, strict=True)
        )
