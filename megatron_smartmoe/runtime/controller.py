"""The main path: what happens to the placement after each training step.

`Controller.step` is the homes loop, a call a line: collect counts, forecast, propose and judge, migrate, commit,
report. Every rank runs it on the same reduced numbers, so every rank computes the same decision; before anything moves
the ranks compare a digest of it. An error in deciding never stops the training: the placement stays as it is, and one
line says why.

No Megatron here: a `Mover` moves experts and a `Reporter` writes the logs. The replicas loop and the split run inside a
training step and are called from there (`adapter.loops.replicas`, `adapter.moe`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from megatron_smartmoe.errors import MigrationError
from megatron_smartmoe.placement.decisions import Decision, digest_of
from megatron_smartmoe.placement.homes_planner import HomesPlanner
from megatron_smartmoe.placement.online_options import ReplicaMode
from megatron_smartmoe.placement.review import LayerSeconds
from megatron_smartmoe.planner.pool import PoolSetting
from megatron_smartmoe.runtime.counts import IntervalCounts
from megatron_smartmoe.runtime.digest import digest_bounds, is_one_digest
from megatron_smartmoe.spec.placement import Placement, SlotChange, with_empty_slots

HomesMode = Literal["on", "dry", "shuffle"]


@dataclass(frozen=True, kw_only=True)
class Moved:
    """The result of a migration.

    Attributes:
        placement: The placement in force after it, equal on all ranks.
        wire_bytes: Bytes of experts' state that were sent, summed over all ranks.
        seconds: How long it took on this rank.
        failure: Why experts stayed where they were, or None.
        reached: With a failure, the slots that changed all the same.
    """

    placement: Placement
    wire_bytes: int = 0
    seconds: float = 0.0
    failure: str | None = None
    reached: tuple[SlotChange, ...] = ()


def with_outcome(decision: Decision, moved: Moved) -> Decision:
    """A decision to move, as it is logged after the migration."""
    if moved.failure is None:
        return replace(decision, moved_bytes=moved.wire_bytes)
    return replace(decision, failure=moved.failure, reached=moved.reached)


class Mover(Protocol):
    """Moves experts so that a placement comes into force."""

    def move(self, before: Placement, after: Placement) -> Moved:
        """Plan the migration, execute it and commit it, step by step. A collective call of all ranks.

        An expert that cannot be moved stays where it is; the returned placement says so on every rank.

        Raises:
            CommitUnknownError: Ranks may differ in what they committed, and training must stop.
        """


class Reporter(Protocol):
    """Writes decisions to the logs."""

    def decided(self, decision: Decision, before: float, after: float, moved: Moved | None) -> None:
        """Report a decision.

        Args:
            decision: What was decided and why.
            before: Max / mean tokens per rank under the homes before the decision.
            after: The same under the homes that were proposed.
            moved: The migration that carried it out, or None if nothing moved.
        """

    def warn(self, iteration: int, text: str) -> None:
        """Report that something went wrong and the placement stayed as it was."""


@dataclass(frozen=True, kw_only=True)
class ControllerOptions:
    """When the homes are re-evaluated, and what becomes of a decision.

    Attributes:
        mode: `on`; `dry`: decide and report, move nothing; `shuffle`: random homes after every interval, which shows
            that moving experts does not change the training.
        interval: Iterations between two re-evaluations.
        first: The homes are left alone up to this iteration.
        last: The last iteration at which they may be re-evaluated; None for no such limit.
        windows: Windows of iterations, of about equal length, whose counts are kept apart within an interval.
        seed: Seed of the random homes of `shuffle`.
        micro_batches: Micro-batches of one rank in an iteration.
        groups: Number of expert-parallel groups that the counts are summed over.
    """

    mode: HomesMode
    interval: int
    first: int = 0
    last: int | None = None
    windows: int = 1
    seed: int = 0
    micro_batches: int = 1
    groups: int = 1


@dataclass(frozen=True, kw_only=True)
class _Proposal:
    """Homes that the planner proposes instead of those in force, with the verdict on them."""

    before: Placement
    after: Placement
    decision: Decision


class Controller:
    """Keeps the placement of all MoE layers of the model, and changes it when that pays.

    Args:
        options: When to decide, and whether to move.
        planner: Forecasts the load, proposes homes and judges proposals and moves.
        counts: The routers' counts since the last decision.
        mover: Carries out changes of homes.
        reporter: Receives decisions and warnings.
        placement: The placement at the start of the run.

    Attributes:
        paused: While true, homes are left alone; counts are collected all the same.
    """

    paused = False

    def __init__(
        self,
        options: ControllerOptions,
        planner: HomesPlanner,
        counts: IntervalCounts,
        mover: Mover,
        reporter: Reporter,
        placement: Placement,
    ) -> None:
        self.options, self.planner, self.placement = options, planner, placement
        self._counts, self._mover, self._reporter = counts, mover, reporter
        self._counts_LRE: NDArray[np.int64] | None = None  # of the last window

    def step(self, iteration: int) -> None:
        """Run the homes loop after a training step, between its optimizer step and the next forward pass.

        Args:
            iteration: The training step that has just ended, counted from 1.
        """
        counts_WLRE = self._collect_counts(iteration)
        if counts_WLRE is None:  # no interval has ended
            return
        self._update_forecast(counts_WLRE)
        first, last = self.options.first, self.options.last
        if self.paused or iteration <= first or (last is not None and iteration > last):
            return
        proposal = self._propose_and_judge(iteration)
        if proposal is None:
            return
        moved = self._migrate(proposal)
        self._commit(iteration, moved)
        self._report(proposal, moved)

    def _collect_counts(self, iteration: int) -> list[NDArray[np.float64]] | None:
        """Add this iteration's counts to its window, and return the counts of an interval whose reduction is done.

        The reduction starts in the last iteration of an interval and is waited for in the one after it.
        """
        interval, position = self.options.interval, (iteration - 1) % self.options.interval
        counts_WLRE = self._counts.reduced()
        self._counts.end_iteration(position * self.options.windows // interval)
        if position == interval - 1:
            self._counts.start_reduction()
        return counts_WLRE

    def _update_forecast(self, counts_WLRE: list[NDArray[np.float64]]) -> None:
        """Add the windows of an interval to the load history, as the counts of one micro-batch of one group."""
        shares = self.options.micro_batches * self.options.groups
        for counts_LRE in counts_WLRE:
            self._counts_LRE = np.rint(counts_LRE / shares).astype(np.int64)
            self.planner.observe(self._counts_LRE)

    def _propose_and_judge(self, iteration: int) -> _Proposal | None:
        """Judge the last move, or propose a new one; None if there is nothing to decide or the ranks differ in it."""
        proposal, problem = None, None
        try:
            proposal = self._shuffled(iteration) if self.options.mode == "shuffle" else self._planned(iteration)
        except Exception as error:  # whatever it is, training continues under the homes in force
            problem = f"{type(error).__name__}: {error}"
        if not self._is_equal_on_all_ranks(proposal, problem):
            self.planner.abandon()
            self._reporter.warn(iteration, problem or "the ranks decided differently; the placement stays")
            return None
        return proposal

    def _planned(self, iteration: int) -> _Proposal | None:
        found = self.planner.review(iteration, self.placement)
        if found is None and self.planner.due(iteration):
            found = self.planner.propose(iteration, self.placement)
            if found is not None and self.options.mode == "dry":
                self.planner.abandon()  # nothing moves, so there will be nothing to review
        return None if found is None else _Proposal(before=self.placement, after=found[0], decision=found[1])

    def _shuffled(self, iteration: int) -> _Proposal:
        """Random homes, the same on every rank."""
        before, generator = self.placement, np.random.default_rng((self.options.seed, iteration))
        slots_LRS = before.slots_LRS.copy()
        homes_LRH = slots_LRS[:, :, : before.home_slots]
        for homes_RH in homes_LRH:
            homes_RH[:] = generator.permutation(before.num_experts).reshape(homes_RH.shape)
        after = replace(before, slots_LRS=slots_LRS)
        decision = Decision(
            iteration=iteration,
            kind="homes",
            group=-1,
            inputs=digest_of(before.slots_LRS),
            before=before.digest,
            after=after.digest,
            taken=True,
            why="--smartmoe-homes shuffle moves experts at random",
            changes=before.diff(after),
        )
        return _Proposal(before=before, after=after, decision=decision)

    def _is_equal_on_all_ranks(self, proposal: _Proposal | None, problem: str | None) -> bool:
        """Compare what the ranks decided, and whether one of them could not decide: one all-reduce."""
        text = "nothing"
        if proposal is not None:
            text = proposal.decision.inputs + proposal.decision.after + str(proposal.decision.taken)
        bounds = digest_bounds(hashlib.sha256(text.encode()).hexdigest(), self._counts.device)
        reduced = torch.cat([bounds, bounds.new_tensor([problem is not None])])
        dist.all_reduce(reduced, op=dist.ReduceOp.MAX)
        *digests, problems = reduced.tolist()
        return is_one_digest(digests) and not problems

    def _migrate(self, proposal: _Proposal) -> Moved | None:
        """Move experts to the proposed homes if that was decided; None if nothing is to move."""
        if not proposal.decision.taken or proposal.after == proposal.before or self.options.mode == "dry":
            return None
        return self._mover.move(proposal.before, proposal.after)

    def _commit(self, iteration: int, moved: Moved | None) -> None:
        """Put the placement in force that the migration has reached, which may not be all of the proposed one."""
        if moved is None:
            return
        self.placement = moved.placement
        if moved.failure is not None:
            self.planner.abandon()
            self._reporter.warn(iteration, moved.failure)

    def _report(self, proposal: _Proposal, moved: Moved | None) -> None:
        before, after = self._imbalance(proposal.before), self._imbalance(proposal.after)
        self._reporter.decided(proposal.decision, before, after, moved)

    def _imbalance(self, placement: Placement) -> float:
        """Max / mean tokens per rank under these homes in the last window, averaged over the layers."""
        assert self._counts_LRE is not None
        load_LE = self._counts_LRE.sum(axis=1)
        ratios = []  # a layer without tokens has none
        for load_E, home_rank_E in zip(load_LE, placement.home_rank_LE, strict=True):
            load_R = np.bincount(home_rank_E, weights=load_E, minlength=placement.num_ranks)
            ratios += [load_R.max() / load_R.mean()] if load_R.any() else []
        assert all(ratio >= 1 - 1e-9 for ratio in ratios), f"a maximum below the mean: {ratios}"
        return float(np.mean(ratios)) if ratios else 1.0

    def switch_to(self, setting: PoolSetting, layer_seconds: LayerSeconds) -> None:
        """Move homes or not, as a setting of the pool says, and plan them for its replicas from now on.

        Args:
            setting: the setting.
            layer_seconds: cost model of a layer with replicas planned in its way.
        """
        self.paused = setting.homes_interval == 0
        slots_LRS = with_empty_slots(self.placement.homes_LRH, setting.spare_slots)
        self.placement = replace(self.placement, slots_LRS=slots_LRS)
        mode: ReplicaMode = "exact" if setting.replicas == "exact" else "history"
        self.planner.options = replace(self.planner.options, replicas=mode)
        self.planner.layer_seconds = layer_seconds

    def state(self) -> dict[str, NDArray[Any]]:
        """All that the next decisions depend on besides the options and the placement. A collective call."""
        state = {f"planner_{name}": array for name, array in self.planner.state().items()}
        state |= {f"counts_{name}": array for name, array in self._counts.state().items()}
        if self._counts_LRE is not None:
            state["last_LRE"] = self._counts_LRE
        return state

    def restore(self, state: Mapping[str, NDArray[Any]], *, adds_sums: bool) -> None:
        """Continue from what `state` gave, which every rank has; the placement is restored apart.

        Args:
            state: as `state` gave it.
            adds_sums: true on one rank, see `IntervalCounts.restore`.

        Raises:
            PlanError: it is of another shape.
        """
        parts = {
            part: {name.removeprefix(f"{part}_"): array for name, array in state.items() if name.startswith(f"{part}_")}
            for part in ("planner", "counts")
        }
        self.planner.restore(parts["planner"], self.placement)
        self._counts.restore(parts["counts"], adds_sums=adds_sums)
        self._counts_LRE = state["last_LRE"].astype(np.int64) if "last_LRE" in state else None

    def at_home(self) -> AtHome:
        """A context in which every expert is at its logical home: for checkpoints whose bytes follow the slots."""
        return AtHome(self)


class AtHome:
    """Moves all experts to their logical homes, and back.

    Attributes:
        wire_bytes: Bytes that both moves sent together, summed over all ranks.
        seconds: How long both took on this rank, by which they delay the checkpoint.

    Raises:
        MigrationError: Experts cannot be moved; a checkpoint written now would be in the wrong order.
    """

    def __init__(self, controller: Controller) -> None:
        self._controller, self._before = controller, controller.placement
        self.wire_bytes, self.seconds = 0, 0.0

    def __enter__(self) -> AtHome:
        placement = self._before
        home = Placement.contiguous(
            num_layers=placement.num_layers,
            num_experts=placement.num_experts,
            num_ranks=placement.num_ranks,
            spare_slots=placement.spare_slots,
        )
        self._move(home, "experts could not be moved home for the checkpoint")
        return self

    def __exit__(self, *error: object) -> None:
        self._move(self._before, "experts could not be moved back after the checkpoint")

    def _move(self, target: Placement, problem: str) -> None:
        controller = self._controller
        if controller.placement == target:
            return
        moved = controller._mover.move(controller.placement, target)
        controller.placement = moved.placement
        self.wire_bytes += moved.wire_bytes
        self.seconds += moved.seconds
        if moved.failure is not None:
            raise MigrationError(f"{problem}: {moved.failure}")
