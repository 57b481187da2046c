"""The spare slots of one layer, and the replicas of other ranks' experts that they hold for a while.

A replica is no parameter. Its weights enter the computation through `_Use`, an autograd function with the home weights
as inputs: the backward pass of every rank goes through it before it reaches the home weights, whether that rank holds a
replica or not. There the gradients of the replicas are summed and, in the last backward pass that uses them, sent to
their homes and added to the gradients that the optimizer will read. Autograd accumulates the home weights' own gradient
only after that, so its hooks (Megatron's DDP starts to reduce a bucket when its last gradient has arrived) find the sum
complete.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from megatron_smartmoe.runtime.replicas.per_slot import SlotWeight, tensors_of
from megatron_smartmoe.runtime.replicas.split import Replica, replicas_of
from megatron_smartmoe.runtime.replicas.wire import Pending, ReplicaWire
from megatron_smartmoe.spec.arrays import IntArray
from megatron_smartmoe.spec.placement import EMPTY

Totals = Callable[[], Sequence[SlotWeight]]


class ReplicasInUse:
    """One set of replicas, from the fetch of the weights to the return of the gradients.

    Args:
        replicas: Those that this rank holds or has the home of, out of one table on all ranks of the group.
        wire: Sends the weights and gradients.
        homes: The home weights, `[S, ...]` each.
        spares: Memory for the replicas' weights, `[K, ...]` each.
        sums: Memory for their gradients, float32, summed over several backward passes and shaped as `spares`; None for
            one pass.
        totals: Returns the home gradients that the optimizer reads, shaped as `homes`.
        num_passes: Number of backward passes before the gradients are sent to their homes.
    """

    def __init__(
        self,
        replicas: tuple[Replica, ...],
        wire: ReplicaWire,
        *,
        homes: Sequence[SlotWeight],
        spares: Sequence[torch.Tensor],
        sums: Sequence[torch.Tensor] | None,
        totals: Totals,
        num_passes: int,
    ) -> None:
        assert sums is not None or num_passes == 1, "gradients of several passes need memory to be summed in"
        self.replicas, self._wire, self._homes, self._totals = replicas, wire, tuple(homes), totals
        self.spares, self._sums = tuple(spares), sums
        self._num_passes, self._passes = num_passes, 0
        self._pending: Pending | None = None

    def start(self) -> None:
        """Start to fetch the weights unless that was done already. A call of the whole group."""
        if self._pending is None:
            self._pending = self._wire.start_fetch(self.replicas, self._homes, self.spares)

    def finish(self) -> None:
        """Wait for the fetch if one is under way: nobody else may use its memory or its group before it has ended."""
        if self._pending is not None:
            self._pending.wait()
            self._pending = Pending(works=())

    def weights(self) -> tuple[torch.Tensor, ...]:
        """Wait for the replicas' weights and return them as part of the autograd graph. A call of the whole group."""
        self.start()
        self.finish()
        used: tuple[torch.Tensor, ...] = _Use.apply(self, *tensors_of(self._homes))  # type: ignore[no-untyped-call]
        return used

    def collect(self, gradients: Sequence[torch.Tensor]) -> None:
        """Sum the replicas' gradients of one backward pass; after the last pass, send them to their homes."""
        if self._sums is None:
            self._wire.return_gradients(self.replicas, [g.contiguous() for g in gradients], self._totals())
            return
        for total, gradient in zip(self._sums, gradients, strict=True):
            if self._passes == 0:
                total.copy_(gradient)
            else:
                total.add_(gradient)
        self._passes += 1
        if self._passes == self._num_passes:
            self._wire.return_gradients(self.replicas, self._sums, self._totals())
            self._passes = 0  # Megatron may run an iteration again, from zeroed gradients


class _Use(torch.autograd.Function):
    """Puts the replicas' weights into the graph; its backward pass collects their gradients."""

    @staticmethod
    def forward(ctx: Any, used: ReplicasInUse, *homes: torch.nn.Parameter) -> tuple[torch.Tensor, ...]:
        ctx.used = used
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
    ) -> None:
        self._homes, self.num_slots, self.wire, self._totals = tuple(homes), num_slots, wire, totals
        self.home_slots = self._homes[0].shape[0]
        self._keeps = keeps
        self._weights = self._buffers() if keeps else None
        self._sums = self._buffers(torch.float32) if keeps else None
        self._in_use: ReplicasInUse | None = None

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self._homes[0].device

    @property
    def in_use(self) -> ReplicasInUse | None:
        """The replicas in use, or None."""
        return self._in_use

    def _replace(self, used: ReplicasInUse | None) -> None:
        """Use other replicas, or none, once the fetch of those in use has ended."""
        if self._in_use is not None:
            self._in_use.finish()
        self._in_use = used

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

    def use(
        self, slots_RS: IntArray, *, num_passes: int, own: tuple[Replica, ...] | None = None
    ) -> ReplicasInUse | None:
        """Use the replicas of a slot table from now on.

        Args:
            slots_RS: The slot table, experts numbered by their homes; equal on all ranks of the group.
            num_passes: Number of backward passes before the gradients are sent to their homes.
            own: The table's replicas that this rank holds or has the home of, where the caller has them.

        Returns:
            The replicas in use; None if the table has none.
        """
        used = None
        if (slots_RS[:, self.home_slots :] != EMPTY).any():
            used = ReplicasInUse(
                replicas_of(slots_RS, self.home_slots, self.wire.rank) if own is None else own,
                self.wire,
                homes=self._homes,
                spares=(self._weights if self._keeps else None) or self._buffers(),
                sums=self._sums if self._keeps else None,
                totals=self._totals,
                num_passes=num_passes,
            )
        self._replace(used)
        return used

    def weights(self) -> tuple[torch.Tensor, ...]:
        """The replicas' weights for one micro-batch, `[K, ...]` each; see `ReplicasInUse.weights`.

        Replicas for one micro-batch belong to autograd from then on, which frees them after their backward pass.
        """
        used = self._in_use
        assert used is not None, "no replicas are in use"
        weights = used.weights()
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
