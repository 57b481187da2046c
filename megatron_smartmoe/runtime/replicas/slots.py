"""The spare slots of one layer: copies of other ranks' experts, as long as they are in use.

A copy is no parameter. Its weights enter the computation through `_Use`, an autograd function with the home weights as
inputs: the backward pass of every rank goes through it before it reaches the home weights, whether that rank holds a
copy or not. There the gradients of the copies are added up and, in the last backward pass that uses the copies, sent
to their homes and added to what the optimizer will read. Autograd accumulates the home weights' own gradient only
after that, and whoever listens there (Megatron's DDP starts to reduce a bucket when its last gradient is there) finds
the sum complete.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from megatron_smartmoe.runtime.replicas.split import Copy, copies_of
from megatron_smartmoe.runtime.replicas.wire import Pending, ReplicaWire
from megatron_smartmoe.spec.arrays import IntArray

Totals = Callable[[], Sequence[torch.Tensor]]


class CopiesInUse:
    """One set of copies, from the fetching of the weights to the return of the gradients.

    Args:
        copies: equal on all ranks of the group, at least one.
        wire: of the group.
        homes: the home weights, `[S, ...]` each.
        spares: where the copies' weights go, `[K, ...]` each.
        sums: float32, where gradients are added up over several backward passes, shaped as `spares`; None for one pass.
        totals: gives the home gradients that the optimizer reads, shaped as `homes`.
        num_passes: backward passes until the gradients go home.
    """

    def __init__(
        self,
        copies: tuple[Copy, ...],
        wire: ReplicaWire,
        *,
        homes: Sequence[torch.nn.Parameter],
        spares: Sequence[torch.Tensor],
        sums: Sequence[torch.Tensor] | None,
        totals: Totals,
        num_passes: int,
    ) -> None:
        assert sums is not None or num_passes == 1, "several passes need somewhere to add up"
        self.copies, self._wire, self._homes, self._totals = copies, wire, tuple(homes), totals
        self.spares, self._sums = tuple(spares), sums
        self._num_passes, self._passes = num_passes, 0
        self._pending: Pending | None = None

    def start(self) -> None:
        """Start to fetch the weights, if that has not begun. A call of the whole group."""
        if self._pending is None:
            self._pending = self._wire.start_fetch(self.copies, self._homes, self.spares)

    def weights(self) -> tuple[torch.Tensor, ...]:
        """The copies' weights, there and part of the autograd graph. A call of the whole group."""
        self.start()
        assert self._pending is not None
        self._pending.wait()
        self._pending = Pending(works=())
        used: tuple[torch.Tensor, ...] = _Use.apply(self, *self._homes)
        return used

    def collect(self, gradients: Sequence[torch.Tensor]) -> None:
        """Take in the copies' gradients of one backward pass; the last pass sends them home."""
        if self._sums is None:
            self._wire.return_gradients(self.copies, [g.contiguous() for g in gradients], self._totals())
            return
        for total, gradient in zip(self._sums, gradients, strict=True):
            if self._passes == 0:
                total.copy_(gradient)
            else:
                total.add_(gradient)
        self._passes += 1
        if self._passes == self._num_passes:
            self._wire.return_gradients(self.copies, self._sums, self._totals())
            self._passes = 0  # Megatron may run an iteration again, from zeroed gradients


class _Use(torch.autograd.Function):
    """Passes the copies' weights into the graph; its backward pass collects their gradients."""

    @staticmethod
    def forward(ctx: Any, used: CopiesInUse, *homes: torch.nn.Parameter) -> tuple[torch.Tensor, ...]:
        ctx.used = used
        return tuple(spare.detach() for spare in used.spares)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[None, ...]:
        ctx.used.collect(gradients)
        return (None,) * (1 + len(gradients))  # the home weights get theirs in `totals`, with float32's precision


class SpareSlots:
    """K spare slots of a rank in one layer.

    Args:
        homes: the home weights, `[S, ...]` each.
        num_slots: K.
        wire: of the expert-parallel group.
        totals: gives the home gradients that the optimizer reads.
        keeps: whether copies stay for an iteration: then there is one set of buffers, K slots of weights and K of
            float32 gradients. Otherwise each micro-batch has K slots of weights from its forward to its backward pass.

    Attributes:
        in_use: copies that serve now, or None.
    """

    def __init__(
        self,
        homes: Sequence[torch.nn.Parameter],
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
        self.in_use: CopiesInUse | None = None

    def keep(self, keeps: bool) -> None:
        """Whether copies stay for an iteration from now on; between iterations only. Buffers once made are kept, so
        that memory does not come and go with the mode."""
        self._keeps, self.in_use = keeps, None
        if keeps and self._weights is None:
            self._weights, self._sums = self._buffers(), self._buffers(torch.float32)

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers that stay."""
        return sum(buffer.nbytes for buffer in (*(self._weights or ()), *(self._sums or ())))

    def use(self, slots_RS: IntArray, *, num_passes: int) -> CopiesInUse | None:
        """Let these copies serve from now on; None when there are none.

        Args:
            slots_RS: experts by their homes, equal on all ranks of the group.
            num_passes: backward passes until the gradients go home.
        """
        copies = copies_of(slots_RS, self.home_slots)
        self.in_use = None
        if copies:
            self.in_use = CopiesInUse(
                copies,
                self.wire,
                homes=self._homes,
                spares=(self._weights if self._keeps else None) or self._buffers(),
                sums=self._sums if self._keeps else None,
                totals=self._totals,
                num_passes=num_passes,
            )
        return self.in_use

    def weights(self) -> tuple[torch.Tensor, ...]:
        """The copies' weights for one micro-batch, `[K, ...]` each; see `CopiesInUse.weights`.

        Copies for one micro-batch are then left to autograd, which keeps them until their backward pass is done.
        """
        assert self.in_use is not None, "no copies serve"
        used = self.in_use
        if not self._keeps:
            self.in_use = None
        return used.weights()

    def _buffers(self, dtype: torch.dtype | None = None) -> tuple[torch.Tensor, ...]:
        """Zeros: a slot without a copy gets no rows, and must not turn them into NaN all the same."""
        sizes = [(self.num_slots, *home.shape[1:]) for home in self._homes]
        return tuple(
            torch.zeros(size, dtype=dtype or home.dtype, device=home.device)
            for size, home in zip(sizes, self._homes, strict=True)
        )
