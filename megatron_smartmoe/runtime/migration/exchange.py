"""Execute a migration plan: every step arrives whole and verified on all ranks, and is committed then, or not at all.

A step goes like this. Experts that change slots within a rank are copied to staging memory. What leaves is packed,
chunk by chunk, and sent while the next chunk is packed; what arrives is staged, and its checksum is taken while the
next chunk is on its way. Then the ranks of the pipeline stage compare checksums: sender and receiver add and subtract
the checksum of each message in one small all-reduce, which must come out as zero. A second one confirms that every rank
has got this result. Only then is the staged state written.

What is guaranteed:
- A wrong checksum, a peer that does not answer, a message that fails: `MigrationError`, nothing of that step is written
  on any rank, steps before it are complete on all. The caller's homes are right, because they change in `on_commit`,
  step by step.
- A failure between the comparison and its confirmation, an all-reduce of 8 bytes: `CommitUnknownError`. Other ranks may
  have written, so training must stop and restart from its last checkpoint. (A rank that was itself too slow for the
  others may end here too, although they have given up and written nothing: both cases look alike from there.)
- A process that dies at any instant: the others get one of the two errors, the job restarts from its last checkpoint.
  Nothing on disk is touched here.

- A rank that runs out of memory, whenever: it continues with the messages, so that nobody waits for it, and the
  comparison refuses the step on every rank. The memory of a step is allocated before its first message.

Plain torch.distributed: gloo with CPU tensors, NCCL with CUDA tensors. It needs a process group of its own, because a
timeout closes a gloo group's connections and aborts an NCCL communicator, and training's groups must survive it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NoReturn

import torch
import torch.distributed as dist

from megatron_smartmoe.errors import MigrationError
from megatron_smartmoe.placement.migration import MigrationPlan, MigrationStep
from megatron_smartmoe.runtime.digest import digest_bounds, is_one_digest
from megatron_smartmoe.runtime.migration.expert_tensors import LayerState
from megatron_smartmoe.runtime.migration.staging import (
    Arena,
    Staging,
    chunk_checksum,
    is_out_of_memory,
    needed_bytes,
)
from megatron_smartmoe.runtime.migration.wire import Batch, Chunk, PeerError, Wire, turns

Probe = Callable[[str, MigrationStep, torch.Tensor | None], None]


class CommitUnknownError(MigrationError):
    """Other ranks may have committed a step or not: end the training and restart it from its last checkpoint."""


@dataclass(kw_only=True)
class MigrationReport:
    """What a migration did on this rank.

    Bytes are those of the experts' state, without checksums and comparisons. `local_bytes` were copied between slots of
    this rank; `peak_staging_bytes` is the largest staging memory of any migration so far.
    """

    steps: int = 0
    sent_bytes: int = 0
    received_bytes: int = 0
    local_bytes: int = 0
    peak_staging_bytes: int = 0
    seconds: float = 0.0


class ExpertExchange:
    """Moves experts between the ranks of one pipeline stage.

    Args:
        group: All ranks of the pipeline stage; used for nothing else and made with the same timeout. All of its ranks
            call `execute` together.
        workers: Global rank of each worker of this rank's grid, w = ep_rank * D + edp_rank.
        device: The device of the experts' tensors.
        staging_bytes: Bound of the staging memory, as given to the plan.
        timeout_s: Longest wait for a peer.
        probe: For tests; called at `received` (with a staged chunk, before its checksum), `staged` (after the last
            chunk), `agreed` (before the commit) and `committed`.
    """

    def __init__(
        self,
        *,
        group: dist.ProcessGroup,
        workers: Sequence[int],
        device: torch.device | str,
        staging_bytes: int,
        timeout_s: float,
        probe: Probe | None = None,
    ) -> None:
        self.staging_bytes = staging_bytes
        self.worker = list(workers).index(dist.get_rank())
        self._wire = Wire(group, workers, timeout_s)
        self._device = torch.device(device)
        self._probe = probe or (lambda point, step, chunk: None)
        self._broken: str | None = None
        self._arena = Arena(staging_bytes, self._device)
        self._words = torch.zeros(3, dtype=torch.int64, device=self._device)  # reduced before and after a step
        self._checksum_M = torch.zeros(1, dtype=torch.int64, device=self._device)  # one more than there are messages
        self._problem: str | None = None  # why this rank cannot complete the step that is under way

    def reserve(self, nbytes: int) -> None:
        """Allocate staging memory, and connect the group, before anything depends on them. A collective call.

        Args:
            nbytes: No more than the bound is allocated.

        Raises:
            MigrationError: A rank of the stage has no memory for it; on all of them alike.
        """
        self._compare("0", self._out_of_memory(lambda: self._arena.take(min(nbytes, self.staging_bytes))))

    def refuse(self, problem: str) -> NoReturn:
        """Take part in a migration for which this rank has no plan, so that the others do not wait for it.

        Raises:
            MigrationError: Always, on all ranks alike.
        """
        self._compare("0", problem)
        raise AssertionError("a comparison with a problem raises")

    def disable(self, reason: str) -> None:
        """Refuse all later migrations, because another rank has lost the process group."""
        self._broken = self._broken or reason

    def check_usable(self) -> None:
        """Raise if an earlier migration has lost the process group.

        Raises:
            MigrationError: It has.
        """
        if self._broken:
            raise MigrationError(f"expert migration is disabled: an earlier one lost its process group: {self._broken}")

    def execute(
        self, plan: MigrationPlan, states: Mapping[int, LayerState], on_commit: Callable[[MigrationStep], None]
    ) -> MigrationReport:
        """Carry out a plan, step by step. A collective call of the whole pipeline stage.

        Args:
            plan: Equal on all ranks (its digest is compared first).
            states: The live tensors by layer, with complete weights and without gradients that wait for the optimizer.
            on_commit: Called on every rank right after a step is written: set the homes of `step.experts` to
                `step.to_slot`.

        Raises:
            MigrationError: This step and those after it were not carried out; see the module for what is guaranteed.
            CommitUnknownError: Training must stop.
        """
        self.check_usable()
        begin = time.perf_counter()
        report = MigrationReport()
        try:
            self._compare(plan.digest, self._reserve(plan))
            for step in plan.steps:
                self._step(step, states[step.layer], report)
                on_commit(step)
        except (PeerError, CommitUnknownError) as error:
            self._broken = str(error)
            raise
        report.peak_staging_bytes = self._arena.peak_bytes
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        report.seconds = time.perf_counter() - begin
        return report

    def _reserve(self, plan: MigrationPlan) -> str | None:
        """Allocate the memory of all steps; None, or why that failed.

        Before anything is sent: a rank that found out later would leave the others waiting for its messages.
        """
        num_messages = max((len(step.messages) for step in plan.steps), default=0)

        def allocate() -> None:
            self._arena.take(max((needed_bytes(step, self.worker) for step in plan.steps), default=0))
            if len(self._checksum_M) <= num_messages:
                self._checksum_M = torch.zeros(num_messages + 1, dtype=torch.int64, device=self._device)

        return self._out_of_memory(allocate)

    @staticmethod
    def _out_of_memory(call: Callable[[], object]) -> str | None:
        """Call something that allocates; None, or why there was no memory."""
        try:
            call()
        except MigrationError as error:
            return str(error)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            return f"out of memory ({str(error).partition(chr(10))[0][:200]})"
        return None

    def _compare(self, digest: str, problem: str | None) -> None:
        """Check that all ranks have the same plan, and memory for it: otherwise they would hang or corrupt experts."""
        self._words[:2].copy_(digest_bounds(digest, "cpu"))
        self._words[2] = problem is not None
        self._wire.all_reduce(self._words, "comparing plans", dist.ReduceOp.MAX)
        *digests, problems = self._words.tolist()
        if problem is not None:
            raise MigrationError(f"rank {dist.get_rank()}: {problem}; nothing was moved.")
        if problems:
            raise MigrationError("another rank has no memory for staging, as its log says; nothing was moved.")
        if not is_one_digest(digests):
            raise MigrationError(
                f"the ranks have different migration plans (digest {digest} on rank {dist.get_rank()}); "
                "nothing was moved. Their homes, their layouts or their flags differ."
            )

    @torch.no_grad()
    def _step(self, step: MigrationStep, state: LayerState, report: MigrationReport) -> None:
        """Stage, compare, commit."""
        self._problem = None
        staging = Staging(step, self.worker, state, self._arena)
        report.local_bytes += staging.stage_local()
        checksum_M = self._transfer(step, staging, report)
        self._probe("staged", step, None)
        self._verify(step, checksum_M)
        self._probe("agreed", step, None)
        staging.commit()
        report.steps += 1
        self._probe("committed", step, None)

    def _transfer(self, step: MigrationStep, staging: Staging, report: MigrationReport) -> torch.Tensor:
        """Send and receive all messages of this worker; the chunks of two turns are on their way at a time.

        Returns:
            The checksum of each message of the step, int64: plus where it was sent, minus where it was received. And
            one element more, for the number of ranks that cannot complete the step.
        """
        checksum_M = self._checksum_M[: len(step.messages) + 1].zero_()
        previous: Batch | None = None
        for turn, chunks in enumerate(turns(step, self.worker)):
            data = [staging.memory_of(chunk, turn) for chunk in chunks]
            batch = self._wire.start(step, chunks, data)
            if previous is not None:
                self._finish(step, previous, checksum_M, report)
            previous = batch
        if previous is not None:
            self._finish(step, previous, checksum_M, report)
        self._wire.settle(self._device, f"layer {step.layer}: waiting for its messages")
        return checksum_M

    def _finish(self, step: MigrationStep, batch: Batch, checksum_M: torch.Tensor, report: MigrationReport) -> None:
        """Wait for a batch and add its checksums; sent chunks are still in their buffers."""
        self._wire.finish(step, batch)
        for chunk, data in zip(batch.chunks, batch.data, strict=True):
            if chunk.outgoing:
                report.sent_bytes += len(data)
            else:
                report.received_bytes += len(data)
                self._probe("received", step, data)
            self._problem = self._problem or self._out_of_memory(partial(self._add_checksum, chunk, data, checksum_M))

    @staticmethod
    def _add_checksum(chunk: Chunk, data: torch.Tensor, checksum_M: torch.Tensor) -> None:
        checksum = chunk_checksum(data, chunk.number)
        checksum_M[chunk.message] += checksum if chunk.outgoing else checksum.neg_()

    def _verify(self, step: MigrationStep, checksum_M: torch.Tensor) -> None:
        """Check that all messages arrived unchanged on all ranks, and that all ranks have got this result."""
        what = f"layer {step.layer}: comparing checksums"
        if self._problem is not None:
            checksum_M[-1] = 1
        self._wire.all_reduce(checksum_M, what)
        *checksums, problems = checksum_M.tolist()
        uncommitted = "nothing of this step is committed, its experts stay where they are."
        if self._problem is not None:
            raise MigrationError(f"layer {step.layer}: rank {dist.get_rank()}: {self._problem}; {uncommitted}")
        if problems:
            raise MigrationError(f"layer {step.layer}: another rank ran out of memory, as its log says; {uncommitted}")
        wrong = [index for index, checksum in enumerate(checksums) if checksum]
        if wrong:
            message = step.messages[wrong[0]]
            raise MigrationError(
                f"layer {step.layer}: {len(wrong)} of {len(step.messages)} messages arrived with another checksum, the "
                f"first from {self._wire.name(message.source)} to {self._wire.name(message.target)}; {uncommitted}"
            )
        try:
            self._wire.all_reduce(self._words.zero_(), what)
        except PeerError as error:
            raise CommitUnknownError(
                f"layer {step.layer}: lost a rank between the comparison of checksums and its confirmation, some "
                f"ranks may have committed. Restart the training from its last checkpoint. ({error.__cause__})"
            ) from error
