"""One transfer of a layer's replicas: rounds of messages, each of which needs what the rounds before it have brought.

A rank posts a round, and at later points of its program the next ones (`advance`), until somebody needs the result
(`finish`). In between it computes. Why nothing waits for ever, on any backend:

- All ranks of the group pass the same points of the program in the same order: a transfer begins where a layer is
  dispatched or goes backward, and rounds are posted at fixed points of layers, never when something happens to have
  arrived. A rank without messages in a round posts nothing and goes on counting.
- So messages have one order on all ranks: by the point at which they are posted, then by transfer. At a point a rank
  first waits for messages of earlier points alone. Of all the messages that have not ended, the first in that order has
  been posted at both of its ends, or will be without waiting for a later one, and nothing is in front of it.

On gloo a wait is one of the host, and a round that was posted a layer ago has mostly arrived. On NCCL the host never
waits: a stream beside the computation waits for the arrival, adds, and holds back the next round, which NCCL runs
behind the former one; the computing stream waits in `finish` alone. There are two ways to launch. With a hardware queue
for each stream, all rounds are posted at once. With one (CUDA_DEVICE_MAX_CONNECTIONS=1) a round that waits for the one
before it would be in front of all kernels that are launched later, so rounds are posted one at a time, between kernels
that take as long as the former round travels (`tests/unit/runtime/test_relay_order.py` shows both).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from megatron_smartmoe.errors import one_line
from megatron_smartmoe.runtime.step_clock import STEP_CLOCK, Part


@dataclass(frozen=True, kw_only=True, eq=False)
class Round:
    """The messages of one rank in one round.

    Attributes:
        operations: Sends and receives, in the order of all ranks.
        sums: (sum, part) of what arrives in this round: added in this order, before the next round is posted.
    """

    operations: list[dist.P2POp] = field(default_factory=list)
    sums: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)


def posts_at_once(device: torch.device) -> bool:
    """Whether all rounds are posted at the start: on a GPU that has a hardware queue for each stream."""
    return device.type == "cuda" and os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS") != "1"


class Beside:
    """Where one transfer waits and adds: on the CPU in place, on a GPU on a stream of its own.

    What the current stream has written before this is constructed may be sent, and what it has read overwritten.

    Args:
        device: That the messages are on.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            self._stream.wait_stream(torch.cuda.current_stream())
        self.at_once = posts_at_once(device)

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Make this the current stream."""
        with nullcontext() if self._stream is None else torch.cuda.stream(self._stream):
            yield

    def use(self, tensors: Iterable[torch.Tensor]) -> None:
        """Keep the memory of tensors, once they are freed, until what is launched here by then has ended."""
        if self._stream is not None:
            for tensor in tensors:
                tensor.record_stream(self._stream)

    def join(self) -> None:
        """Make the current stream wait for what was launched here."""
        if self._stream is not None:
            torch.cuda.current_stream().wait_stream(self._stream)


class Transfer:
    """See the module. Its tensors must not be touched between its construction and `finish`.

    Args:
        what: Names it in errors.
        rounds: By number; without any messages in some, or in all.
        beside: Where it waits and adds.
        delivers: Called by `finish` when everything has arrived, on the current stream.
    """

    def __init__(
        self, what: str, rounds: Sequence[Round], beside: Beside, delivers: Callable[[], None] | None = None
    ) -> None:
        self._what, self._rounds, self._beside, self._delivers = what, tuple(rounds), beside, delivers
        self._num_posted = 0
        self._works: tuple[dist.Work, ...] = ()  # of the round that was posted last
        self.is_finished = False
        for each in self._rounds:
            beside.use(operation.tensor for operation in each.operations)
        self.advance()
        while beside.at_once and not self.is_posted:
            self.advance()

    @property
    def delivers(self) -> bool:
        """Whether `finish` has something to deliver."""
        return self._delivers is not None

    @property
    def is_posted(self) -> bool:
        """Whether all rounds are posted."""
        return self.is_finished or self._num_posted == len(self._rounds)

    def advance(self) -> None:
        """Post the next round, if there is one, when the one before it has arrived and is added up."""
        if self.is_posted:
            return
        with STEP_CLOCK.within(Part.REPLICAS), self._beside.entered():
            if self._num_posted:
                self._arrive()
            operations = self._rounds[self._num_posted].operations
            self._num_posted += 1
            self._works = tuple(dist.batch_isend_irecv(operations)) if operations else ()

    def finish(self) -> None:
        """Post what is left, and wait for it: on CUDA the current stream waits, and the host does not."""
        if self.is_finished:
            return
        while not self.is_posted:
            self.advance()
        self.is_finished = True  # first: a wait that fails is not tried again
        with STEP_CLOCK.within(Part.REPLICAS):
            if self._rounds:
                with self._beside.entered():
                    self._arrive()
                self._beside.join()
            if self._delivers is not None:
                self._delivers()
        self._rounds, self._delivers = (), None  # nobody needs the memory any more

    def drop(self) -> None:
        """Finish without delivering: the iteration was broken off, on all ranks."""
        self._delivers = None
        self.finish()

    @torch.no_grad()
    def _arrive(self) -> None:
        number = self._num_posted - 1
        works, self._works = self._works, ()
        try:
            for work in works:
                work.wait()
        except RuntimeError as error:  # gloo's; NCCL's watchdog ends the process
            peers = sorted({operation.peer for operation in self._rounds[number].operations})
            raise RuntimeError(
                f"{self._what}: round {number + 1} of {len(self._rounds)} with rank{'s' if len(peers) > 1 else ''} "
                f"{', '.join(map(str, peers))} did not end: {one_line(error)}"
            ) from error
        for total, part in self._rounds[number].sums:
            total.add_(part)
