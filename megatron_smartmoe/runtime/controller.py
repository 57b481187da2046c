"""The main path: what happens to the placement after each training step.

`Controller.step` reads as the slow loop of the design does, a call a line: collect counts, look at the last move, look
for better homes, and carry out what was decided. Every rank runs it on the same reduced numbers, so every rank decides
the same; before anything moves the ranks compare what they decided. An error in deciding never stops the training: the
placement stays as it is, and one line says so.

It knows no Megatron: a `Mover` moves experts and a `Reporter` tells people.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from megatron_smartmoe.errors import MigrationError
from megatron_smartmoe.placement.decisions import Decision, digest_of
from megatron_smartmoe.placement.homes_planner import HomesPlanner
from megatron_smartmoe.runtime.counts import IntervalCounts
from megatron_smartmoe.runtime.digest import digest_bounds, is_one_digest
from megatron_smartmoe.spec.placement import Placement

HomesMode = Literal["on", "dry", "shuffle"]


@dataclass(frozen=True, kw_only=True)
class Moved:
    """What a migration did on this rank, or that it failed."""

    placement: Placement  # in force now
    wire_bytes: int = 0
    seconds: float = 0.0
    failure: str | None = None


class Mover(Protocol):
    """Moves experts so that a placement comes into force."""

    def move(self, before: Placement, after: Placement) -> Moved:
        """A collective call. What cannot be moved stays; the placement that is returned is true on every rank.

        Raises:
            CommitUnknownError: training must stop.
        """


class Reporter(Protocol):
    """Tells people and programs what was decided."""

    def decided(self, decision: Decision, before: float, after: float, moved: Moved | None) -> None:
        """A decision, max / mean tokens per rank under the homes before and after it, and how it was carried out."""

    def trouble(self, iteration: int, text: str) -> None:
        """Something went wrong and the placement stays as it was."""


@dataclass(frozen=True, kw_only=True)
class ControllerOptions:
    """When the homes are looked at, and what becomes of a decision.

    Attributes:
        mode: `on`; `dry`: decide and report, move nothing; `shuffle`: random homes at every interval, to show that
            moving experts does not change the training.
        interval: iterations between two looks.
        first: no look before this iteration.
        last: no look after this iteration; None for never.
        windows: pieces that an interval is observed in.
        seed: of `shuffle`.
        micro_batches: of a rank in an iteration.
        groups: expert-parallel groups that a layer's counts are added up over.
    """

    mode: HomesMode
    interval: int
    first: int = 0
    last: int | None = None
    windows: int = 1
    seed: int = 0
    micro_batches: int = 1
    groups: int = 1


class Controller:
    """Keeps a placement and changes it when that pays.

    Args:
        options: see ControllerOptions.
        planner: decides.
        counts: of this interval.
        mover: moves.
        reporter: tells.
        placement: in force at the start; of all MoE layers of the model.

    Attributes:
        paused: whether homes are left alone for now; what is routed is observed all the same.
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
        self._load_LR: NDArray[np.float64] | None = None
        self._counts_LRE: NDArray[np.int64] | None = None

    def step(self, iteration: int) -> None:
        """After training step `iteration` (counted from 1), between its optimizer step and the next forward pass."""
        if not self._observe(iteration) or self.paused or not self._is_on(iteration):
            return
        found = self._decide(iteration)
        if found is None:
            return
        proposal, decision = found
        before, after = self._imbalance(self.placement), self._imbalance(proposal)
        moved = None
        if decision.taken and proposal != self.placement and self.options.mode != "dry":
            moved = self._carry_out(iteration, proposal)
        self._reporter.decided(decision, before, after, moved)

    def _observe(self, iteration: int) -> bool:
        """Collect this iteration's counts. Whether an interval has ended whose counts are now known on all ranks."""
        interval, position = self.options.interval, (iteration - 1) % self.options.interval
        records = self._counts.reduced()
        self._counts.end_iteration(position * self.options.windows // interval)
        if position == interval - 1:
            self._counts.start_reduction()
        if records is None:
            return False
        shares = self.options.micro_batches * self.options.groups
        for record_LRE in records:
            self._counts_LRE = np.rint(record_LRE / shares).astype(np.int64)
            self.planner.observe(self._counts_LRE)
        return True

    def _is_on(self, iteration: int) -> bool:
        return iteration > self.options.first and (self.options.last is None or iteration <= self.options.last)

    def _decide(self, iteration: int) -> tuple[Placement, Decision] | None:
        """Judge the last move, or look for a better one; None when there is nothing to say or the ranks disagree."""
        found: tuple[Placement, Decision] | None = None
        problem = None
        try:
            found = self._shuffled(iteration) if self.options.mode == "shuffle" else self._planned(iteration)
        except Exception as error:  # whatever it is, the training goes on where it was
            problem = f"{type(error).__name__}: {error}"
        if not self._all_agree(found, problem):
            self.planner.abandon()
            self._reporter.trouble(iteration, problem or "the ranks decided differently; the placement stays")
            return None
        return found

    def _planned(self, iteration: int) -> tuple[Placement, Decision] | None:
        found = self.planner.review(iteration, self.placement)
        if found is None and self.planner.due(iteration):
            found = self.planner.propose(iteration, self.placement)
            if found is not None and self.options.mode == "dry":
                self.planner.abandon()  # nothing moves, so there will be nothing to review
        return found

    def _shuffled(self, iteration: int) -> tuple[Placement, Decision]:
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
        return after, decision

    def _all_agree(self, found: tuple[Placement, Decision] | None, problem: str | None) -> bool:
        """Compare what the ranks decided: one all-reduce."""
        text = "nothing" if found is None else found[1].inputs + found[1].after + str(found[1].taken)
        bounds = digest_bounds(hashlib.sha256(text.encode()).hexdigest(), self._counts.device)
        told = torch.cat([bounds, bounds.new_tensor([problem is not None])])
        dist.all_reduce(told, op=dist.ReduceOp.MAX)
        *digests, problems = told.tolist()
        return is_one_digest(digests) and not problems

    def _carry_out(self, iteration: int, proposal: Placement) -> Moved:
        """Move the experts; what could not be moved is where it was."""
        moved = self._mover.move(self.placement, proposal)
        self.placement = moved.placement
        if moved.failure is not None:
            self.planner.abandon()
            self._reporter.trouble(iteration, moved.failure)
        return moved

    def _imbalance(self, placement: Placement) -> float:
        """Max / mean tokens per rank, averaged over the layers, of the last window under these homes."""
        assert self._counts_LRE is not None
        load_LE = self._counts_LRE.sum(axis=1)
        ratios = []
        for load_E, home_rank_E in zip(load_LE, placement.home_rank_LE, strict=True):
            load_R = np.bincount(home_rank_E, weights=load_E, minlength=placement.num_ranks)
            ratios.append(load_R.max() / max(load_R.mean(), 1e-300))
        return float(np.mean(ratios))

    def at_home(self) -> AtHome:
        """A context in which every expert is at its logical home: for checkpoints whose bytes follow the slots."""
        return AtHome(self)


class AtHome:
    """Moves all experts to their logical homes, and back.

    Attributes:
        wire_bytes: moved by both moves together, of all ranks.
        seconds: that both took on this rank: how long a checkpoint is held up.

    Raises:
        MigrationError: they cannot be moved; a checkpoint written now would be in the wrong order.
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

    def _move(self, target: Placement, complaint: str) -> None:
        controller = self._controller
        if controller.placement == target:
            return
        moved = controller._mover.move(controller.placement, target)
        controller.placement = moved.placement
        self.wire_bytes += moved.wire_bytes
        self.seconds += moved.seconds
        if moved.failure is not None:
            raise MigrationError(f"{complaint}: {moved.failure}")
