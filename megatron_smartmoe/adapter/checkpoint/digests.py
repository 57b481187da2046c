"""Digests of the model and the optimizer, over all ranks: each digests what it holds, one reduction adds them up.

On a GPU the digests are computed there, in a small part of the time that the copy to the host takes. On CPU ranks they
are computed beside the save: by a thread where training waits for the save, and for a save in the background by a
forked process, which sees the memory as it was when it was forked. Both call one op that needs no thread of torch, none
of which survives a fork, and that lets other threads run.
"""

from __future__ import annotations

import multiprocessing
import pickle
import threading
import warnings
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu

from megatron_smartmoe.adapter.checkpoint.held import Held
from megatron_smartmoe.adapter.orphans import forked_beside_rank
from megatron_smartmoe.checkpoint.digest import MODULUS
from megatron_smartmoe.checkpoint.manifest import ParameterDigest
from megatron_smartmoe.runtime.tensor_digest import digest_of_tensor


@dataclass(frozen=True, kw_only=True, order=True)
class _Entry:
    """One parameter of one layer, all of its experts."""

    name: str
    kind: str
    dtype: str
    shape: tuple[int, ...]
    num_experts: int  # 0 for a parameter of no expert


class LocalDigests:
    """What this rank adds to each digest; started here, ready when `sums` returns.

    Args:
        held: what this rank holds.
        num_experts: E, the logical experts of a layer.
        beside: what computes them where the tensors are in this host's memory: a thread if they stay as they are until
            `sums` returns, else a process; None for this call itself.

    Attributes:
        entries: the parameters, by their order in `sums`; the same on all ranks of a pipeline stage.
    """

    def __init__(self, held: Sequence[Held], num_experts: int, *, beside: Literal["thread", "process"] | None) -> None:
        found = {
            _Entry(
                name=part.name,
                kind=part.kind,
                dtype=part.dtype,
                shape=part.piece.shape,
                num_experts=0 if part.expert is None else num_experts,
            )
            for part in held
        }
        self.entries = sorted(found)
        self._child: Any = None
        self._thread: Future[list[int]] | None = None
        self._values: list[int] | None = None
        places = _places(self.entries)
        parts = [(places[part.name, part.kind] + (part.expert or 0), part) for part in held if part.tensor is not None]
        self._size = sum(max(entry.num_experts, 1) for entry in self.entries)
        on_device = any(part.tensor is not None and part.tensor.is_cuda for _, part in parts)
        if beside is None or on_device:
            self._values = self._compute(parts)
        elif beside == "process":
            self._fork(parts)
        else:
            self._thread = Future()
            threading.Thread(target=self._fulfil, args=(self._thread, parts), daemon=True).start()

    def wait(self) -> None:
        """Return when a thread that computes them is done, whatever has come of it: tensors may change then."""
        if self._thread is not None:
            self._thread.exception()

    def sums(self) -> list[int]:
        """The sums of this rank, by entry and expert.

        Raises:
            OSError: the process that computes them has ended without a result.
        """
        if self._thread is not None:
            self._values, self._thread = self._thread.result(), None
        if self._values is None:
            process, receiver = self._child
            try:
                self._values = pickle.loads(receiver.recv_bytes())
            except EOFError:
                raise OSError("the process that computes the digests was ended") from None
            finally:
                receiver.close()
                process.join()
        assert self._values is not None
        return self._values

    def _compute(self, parts: Sequence[tuple[int, Held]]) -> list[int]:
        values = [0] * self._size
        for place, part in parts:
            assert part.tensor is not None
            values[place] = (values[place] + digest_of_tensor(part.tensor, part.piece)) % MODULUS
        return values

    def _fulfil(self, future: Future[list[int]], parts: Sequence[tuple[int, Held]]) -> None:
        try:
            future.set_result(self._compute(parts))
        except BaseException as error:  # raised where the result is asked for
            future.set_exception(error)

    def _fork(self, parts: Sequence[tuple[int, Held]]) -> None:
        context = multiprocessing.get_context("fork")
        receiver, sender = context.Pipe(duplex=False)

        def work() -> None:
            forked_beside_rank()
            torch.set_num_threads(1)
            sender.send_bytes(pickle.dumps(self._compute(parts)))

        process = context.Process(target=work, daemon=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of forking beside threads, none of which it needs
            process.start()
        sender.close()
        self._child = process, receiver


def _places(entries: Sequence[_Entry]) -> dict[tuple[str, str], int]:
    """Index of the first sum of each entry."""
    places, index = {}, 0
    for entry in entries:
        places[entry.name, entry.kind] = index
        index += max(entry.num_experts, 1)
    return places


class DigestReduction:
    """Adds up the sums of all ranks. What each stage holds is gathered once, since it does not change during a run."""

    def __init__(self) -> None:
        self._own: list[_Entry] | None = None
        self._all: list[_Entry] = []

    def is_new(self, local: LocalDigests) -> bool:
        """Whether this rank holds other parameters than in the last reduction."""
        return self._own != local.entries

    def reduce(self, local: LocalDigests, *, any_is_new: bool) -> tuple[ParameterDigest, ...]:
        """The digests of all parameters. A collective call of all ranks; one reduction of a number per digest.

        Args:
            local: of this rank, whose `sums` are ready.
            any_is_new: whether `is_new` on any rank.
        """
        if any_is_new:
            group = mpu.get_pipeline_model_parallel_group()
            of_stages: list[list[_Entry]] = [[]] * group.size()
            dist.all_gather_object(of_stages, local.entries, group=group)
            self._own, self._all = local.entries, sorted({entry for of_stage in of_stages for entry in of_stage})
        values = torch.zeros(sum(max(entry.num_experts, 1) for entry in self._all), dtype=torch.int64)
        places, index, sums = _places(self._all), 0, local.sums()
        for entry in local.entries:
            count, place = max(entry.num_experts, 1), places[entry.name, entry.kind]
            values[place : place + count] = torch.tensor([_signed(value) for value in sums[index : index + count]])
            index += count
        total = values.to(torch.cuda.current_device())
        dist.all_reduce(total)  # int64 wraps, as the sum of the digests does
        numbers = [value % MODULUS for value in total.tolist()]
        return tuple(
            ParameterDigest(
                name=entry.name,
                kind=entry.kind,
                dtype=entry.dtype,
                shape=entry.shape,
                digests=tuple(numbers[place : place + max(entry.num_experts, 1)]),
            )
            for entry, place in ((entry, places[entry.name, entry.kind]) for entry in self._all)
        )


def _signed(number: int) -> int:
    return number - MODULUS if number >= MODULUS // 2 else number
