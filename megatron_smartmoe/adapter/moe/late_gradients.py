"""When data-parallel reductions may start: after the gradients of the replicas are added to those of the homes.

Replicas' gradients are under way while the backward pass goes on (`runtime.replicas.slots`). Megatron reduces a bucket
of gradients, over the data-parallel ranks that share its parameters, at one of two moments. Without
`--overlap-grad-reduce`, and in the first iteration, all buckets are reduced behind the last backward pass: what is
still under way is finished first. With it, a bucket starts as soon as the last of its gradients is there, in the middle
of the pass, which is right behind the experts of its layer when it holds one layer's. So a bucket that holds experts is
held back until the next such bucket is ready, a layer or more later, or until Megatron waits for the reductions.

What is held back, and until when, depends on the buckets alone, never on what replicas there are: ranks that share
experts (expert data parallelism) have replicas of their own, and must start the same reductions in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from megatron_smartmoe.runtime.replicas.slots import SpareSlots

Call = Callable[[], object]


class LateGradients:
    """Stands around the methods of Megatron's bucket groups; see `hooks.reduce_through`.

    Args:
        layers: The expert parameters of every layer that has spare slots, and those slots, from first to last.
    """

    def __init__(self, layers: Sequence[tuple[Sequence[Any], SpareSlots]]) -> None:
        self._layers = tuple(layers)
        self._held: list[tuple[Call, Any]] = []  # what starts a reduction, and its bucket group
        self._is_registering = self._is_releasing = False

    def forget(self) -> None:
        """Start nothing that is still held back: the iteration was broken off, and its gradients are zeroed."""
        self._held.clear()

    def register_grad_ready(self, call: Call, group: Any) -> None:
        """A gradient is there; if it was the last one, `call` starts the reduction, which may be held back."""
        self._is_registering = True
        try:
            call()
        finally:
            self._is_registering = False

    def start_grad_sync(self, call: Call, group: Any) -> None:
        """Start a reduction, now or when the next one with experts is ready."""
        spares = self._spares_in(group)
        if spares and self._is_registering and not self._is_releasing:
            self._release()
            self._held.append((call, group))
            return
        for spare in spares:
            spare.finish_returns()
        call()

    def finish_grad_sync(self, call: Call, group: Any) -> None:
        """Wait for a reduction: by then all have to be started."""
        self._release()
        call()

    def _release(self) -> None:
        """Start what is held back, first come first served."""
        if self._is_releasing:  # a start may wait for the bucket before it
            return
        self._is_releasing = True
        try:
            while self._held:
                call, group = self._held.pop(0)
                for spare in self._spares_in(group):
                    spare.finish_returns()
                call()
        finally:
            self._is_releasing = False

    def _spares_in(self, group: Any) -> list[SpareSlots]:
        """The spare slots whose homes a bucket group holds, in the order of the backward pass."""
        return [
            spare
            for parameters, spare in reversed(self._layers)
            if any(parameter in group.params for parameter in parameters)
        ]
