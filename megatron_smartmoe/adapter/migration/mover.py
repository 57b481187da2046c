"""Moving experts between the ranks of each pipeline stage: from placements to slots, plans and Megatron's modules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_smartmoe.adapter.migration.expert_state import ExpertStates
from megatron_smartmoe.adapter.moe.layer import SmartMoELayer
from megatron_smartmoe.errors import MigrationError
from megatron_smartmoe.placement.migration import MigrationStep, plan_migration
from megatron_smartmoe.runtime.controller import Moved
from megatron_smartmoe.runtime.migration.exchange import CommitUnknownError, ExpertExchange, MigrationReport
from megatron_smartmoe.runtime.migration.staging import is_out_of_memory
from megatron_smartmoe.runtime.migration.wire import PeerError
from megatron_smartmoe.runtime.step_clock import STEP_CLOCK, Part
from megatron_smartmoe.spec.arrays import IntArray
from megatron_smartmoe.spec.placement import EMPTY, Placement


def with_home_slots(placement: Placement, slot_LE: IntArray) -> Placement:
    """The placement with other homes and without replicas: those are planned again before the next iteration."""
    slots_LRS = placement.slots_LRS.copy()
    homes_LE = np.argsort(slot_LE, axis=1)
    slots_LRS[:, :, : placement.home_slots] = homes_LE.reshape(len(slot_LE), placement.num_ranks, -1)
    slots_LRS[:, :, placement.home_slots :] = EMPTY
    return replace(placement, slots_LRS=slots_LRS)


class ExpertMover:
    """Carries out changes of homes on this rank's layers.

    Args:
        layers: this rank's MoE layers, by their row in the placement.
        model_chunks: as Megatron's training loop has them, wrapped for data parallelism.
        optimizer: Megatron's optimizer.
        staging_bytes: memory for arriving experts, which are committed when all are there.
        timeout_s: how long to wait for a peer.
    """

    def __init__(
        self,
        layers: Mapping[int, SmartMoELayer],
        model_chunks: Sequence[Any],
        optimizer: Any,
        *,
        staging_bytes: int,
        timeout_s: float,
    ) -> None:
        self._layers = dict(layers)
        modules = [(row, layer.experts) for row, layer in self._layers.items()]
        self._states = ExpertStates(modules, model_chunks, optimizer, timeout_s=timeout_s)
        self._exchange = ExpertExchange(
            group=self._states.group,
            workers=self._states.workers,
            device=self._states.device,
            staging_bytes=staging_bytes,
            timeout_s=timeout_s,
        )

    @STEP_CLOCK.within(Part.MIGRATION)
    def move(self, before: Placement, after: Placement) -> Moved:
        """See `runtime.controller.Mover`; called between an optimizer step and the next forward pass."""
        slot_LE, failure, lost = before.home_slot_LE.copy(), None, False
        report = MigrationReport()
        try:
            report = self._execute(slot_LE, after.home_slot_LE)
        except CommitUnknownError:
            raise
        except MigrationError as error:
            failure, lost = str(error), isinstance(error, PeerError)
        return self._combine_stages(before, after, slot_LE, report, failure, lost=lost)

    def reserve(self, nbytes: int) -> None:
        """Allocate staging memory before training starts; see `ExpertExchange.reserve`."""
        self._exchange.reserve(nbytes)

    def _execute(self, slot_LE: IntArray, wanted_LE: IntArray) -> MigrationReport:
        """Move this stage's experts, step by step; each commit is written to `slot_LE`."""
        self._exchange.check_usable()
        self._states.prepare(gradients_spent=True)
        try:
            states = self._states.states()
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            self._exchange.refuse(f"out of memory ({str(error)[:200]})")
        rows = sorted(self._layers)
        plan = plan_migration(
            slot_LE[rows],
            wanted_LE[rows],
            [states[row].layout for row in rows],
            num_ranks=self._states.num_ranks,
            staging_bytes=self._exchange.staging_bytes,
        )

        def on_commit(step: MigrationStep) -> None:
            slot_LE[step.layer, list(step.experts)] = step.to_slot
            self._layers[step.layer].set_homes(torch.from_numpy(slot_LE[step.layer].copy()))

        return self._exchange.execute(plan, states, on_commit)

    def _combine_stages(
        self,
        before: Placement,
        after: Placement,
        slot_LE: IntArray,
        report: MigrationReport,
        failure: str | None,
        *,
        lost: bool,
    ) -> Moved:
        """The placement that all stages together have reached: a stage that failed keeps some or all of its old homes.

        A collective call of all ranks.

        Args:
            before: the placement before the migration.
            after: the placement that was wanted.
            slot_LE: the slots that this stage's experts have now.
            report: what this rank did.
            failure: why this stage did not move everything; None if it did.
            lost: whether this rank has lost the stage's process group. Then no rank tries again.
        """
        table_LE = torch.full(slot_LE.shape, -1, dtype=torch.int64)
        rows = sorted(self._layers)
        table_LE[rows] = torch.from_numpy(slot_LE[rows])
        table_LE = table_LE.to(self._states.device)
        dist.all_reduce(table_LE, op=dist.ReduceOp.MAX)
        totals = torch.tensor([report.sent_bytes, failure is not None, lost], dtype=torch.int64, device=table_LE.device)
        dist.all_reduce(totals)
        sent_bytes, failures, losses = totals.tolist()
        if losses:
            self._exchange.disable(failure or "a rank got no answer from another, as its log says")
        if failures and failure is None:
            ranks = "1 other rank" if failures == 1 else f"{failures} other ranks"
            failure = f"{ranks} could not move their experts; the reason is in their logs"
        reached_LE = table_LE.cpu().numpy()
        complete = np.array_equal(reached_LE, after.home_slot_LE)
        placement = after if complete else with_home_slots(before, reached_LE)
        return Moved(
            placement=placement,
            wire_bytes=sent_bytes,
            seconds=report.seconds,
            failure=failure,
            reached=before.diff(placement) if failure is not None else (),
        )
