"""The planners that training and the simulator share: what the slow and the medium loop decide, from history.

`HomesPlanner` sees the counts of all ranks: homes are the same in every expert-parallel group, because the optimizer
state of an expert is shared by the groups. `online_replicas.ReplicaPlanner` sees one group's counts and micro-batches:
copies live and die within an iteration, so every group may have its own. Both are functions of what they observed;
neither knows a clock, a process group or a device.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from megatron_smartmoe.placement.decisions import Decision, digest_of
from megatron_smartmoe.placement.exact_replicas import exact_replicas
from megatron_smartmoe.placement.history import History, HistoryOptions
from megatron_smartmoe.placement.plan_homes import HomesOptions, plan_homes
from megatron_smartmoe.placement.plan_replicas import ReplicaOptions, plan_replicas, search_space
from megatron_smartmoe.placement.policy import Policy, PolicyOptions
from megatron_smartmoe.placement.review import LayerSeconds, MoveReview
from megatron_smartmoe.placement.search.improve import improve
from megatron_smartmoe.spec.arrays import IntArray
from megatron_smartmoe.spec.placement import Placement

ReplicaMode = Literal["history", "exact", "auto"]


@dataclass(frozen=True, kw_only=True)
class OnlineOptions:
    """Everything the online phase can be told.

    Attributes:
        homes_interval: iterations between two looks at the homes; 0 leaves them alone.
        replicas: `history`: copies are planned from earlier iterations, before this one begins; `exact`: from each
            micro-batch's own counts; `auto`: from history, and anew from the counts of a micro-batch for a layer that
            the copies from history leave too unbalanced.
        micro_batches: per iteration; what a gain per micro-batch is multiplied with.
        state_bytes: of one expert's weights, main weights and moments.
        migration_bytes_s: bandwidth of a rank while experts move.
        homes: prices of swaps.
        replica: prices and effort of copies.
        history: what is remembered; None chooses by the number of ranks.
        auto_limit: with `auto`, the max / mean above which a layer's copies are planned anew.
        policy: when a plan is worth it.
        review_records: observed iterations after a move of homes on which it is judged.
    """

    homes_interval: int = 100
    replicas: ReplicaMode = "auto"
    micro_batches: int = 1
    state_bytes: int = 0
    migration_bytes_s: float = 25e9
    homes: HomesOptions = field(default_factory=HomesOptions)
    replica: ReplicaOptions = field(default_factory=ReplicaOptions)
    history: HistoryOptions | None = None
    auto_limit: float = 1.01
    policy: PolicyOptions = field(default_factory=PolicyOptions)
    review_records: int = 8


@dataclass(frozen=True, kw_only=True, eq=False)
class LayerProposal:
    """What the homes loop found for one layer.

    Attributes:
        layer: its row in the placement.
        slots_RS: with better homes, or as they are.
        gain_s: seconds per iteration that they save.
        cost_s: one-time seconds of moving there.
        experts: that would move to another rank.
    """

    layer: int
    slots_RS: IntArray
    gain_s: float
    cost_s: float
    experts: int

    def pays(self, options: PolicyOptions) -> bool:
        """Whether moving this layer's experts alone is worth it."""
        return bool(self.experts) and self.gain_s * options.horizon_iterations > self.cost_s * options.margin


class HomesPlanner:
    """The slow loop: `observe` every iteration; when `due`, `propose`; after a move, `review` it once it can be judged.

    Args:
        num_layers: L.
        num_experts: E.
        options: see OnlineOptions.
        layer_seconds: cost model: seconds of a layer under a slot table and one micro-batch's counts.
    """

    def __init__(self, num_layers: int, num_experts: int, options: OnlineOptions, layer_seconds: LayerSeconds) -> None:
        self.options, self.layer_seconds = options, layer_seconds
        self.history = History(num_layers, num_experts, options.history)
        self.policy = Policy(options.policy)
        self._counts_LRE: IntArray | None = None
        self._last_look: int | None = None
        self._move: MoveReview | None = None

    def observe(self, counts_LRE: IntArray) -> None:
        """Take in what was routed in one iteration: counts by source rank of a group, mean over groups and
        micro-batches."""
        self._counts_LRE = counts_LRE
        self.history.update(counts_LRE.sum(axis=1)[:, None])
        if self._move is not None:
            self._move.observe(counts_LRE)

    def due(self, iteration: int) -> bool:
        """Whether it is time to look at the homes; never while a move is under review."""
        interval = self.options.homes_interval
        if not interval or self._counts_LRE is None or self._move is not None:
            return False
        return self._last_look is None or iteration - self._last_look >= interval

    def propose(self, iteration: int, placement: Placement) -> tuple[Placement, Decision] | None:
        """Look at the homes; the proposal with its verdict, or None when no layer has a better place for an expert.

        The proposal is made of the layers whose moves pay, each for itself. When none does, it is made of those that
        have better homes all the same, so that the verdict says why they are left alone.
        """
        assert self._counts_LRE is not None, "observe before you propose"
        self._last_look = iteration
        looks = [self._look(layer, placement) for layer in range(placement.num_layers)]
        found = [look for look in looks if look.pays(self.options.policy)] or [look for look in looks if look.experts]
        if not found:
            return None
        proposed_LRS = placement.slots_LRS.copy()
        for look in found:
            proposed_LRS[look.layer] = look.slots_RS
        proposal = replace(placement, slots_LRS=proposed_LRS)
        gain_s, cost_s = sum(look.gain_s for look in found), sum(look.cost_s for look in found)
        verdict = self.policy.judge(iteration, gain_s, cost_s)
        if verdict.take:
            self._move = MoveReview(placement, proposal, gain_s, self.options.review_records)
        decision = Decision(
            iteration=iteration,
            kind="homes",
            group=-1,
            inputs=digest_of(placement.slots_LRS, self._counts_LRE, self.history.forecast_LE()),
            before=placement.digest,
            after=proposal.digest,
            taken=verdict.take,
            why=verdict.why,
            changes=placement.diff(proposal),
            predicted_gain_s=verdict.gain_s,
            cost_s=verdict.cost_s,
            moved_bytes=sum(look.experts for look in found) * self.options.state_bytes if verdict.take else 0,
        )
        return proposal, decision

    def abandon(self) -> None:
        """Forget the move that `propose` wanted: it could not be carried out."""
        self._move = None

    def review(
        self, iteration: int, placement: Placement, gain_s: float | None = None
    ) -> tuple[Placement, Decision] | None:
        """Judge the last move of homes once enough was seen of it: the placement to go on with, and the verdict.

        Args:
            iteration: before which the verdict takes effect.
            placement: as it is now.
            gain_s: seconds per iteration that the move really saves, from a stopwatch; None asks the cost model, which
                compares both homes on the counts that were observed since.
        """
        move = self._move
        if move is None or not move.ready:
            return None
        self._move = None
        modelled_s, layers_s = move.gain_s(self.layer_seconds, self.options.replica.num_nodes)
        gain_s = modelled_s * self.options.micro_batches if gain_s is None else gain_s
        iteration_s = layers_s * self.options.micro_batches
        proposal = move.reverted(placement, self.options.replica.num_nodes)
        cost_s, moved = self._migrations(placement, proposal)
        verdict = self.policy.realised(iteration_s, gain_s, cost_s, iteration)
        after = placement if verdict.take else proposal
        return after, Decision(
            iteration=iteration,
            kind="review",
            group=-1,
            inputs=digest_of(placement.slots_LRS, *move.counts),
            before=placement.digest,
            after=after.digest,
            taken=True,
            why=verdict.why,
            changes=placement.diff(after),
            predicted_gain_s=move.predicted_gain_s,
            realised_gain_s=gain_s,
            cost_s=0.0 if verdict.take else cost_s,
            moved_bytes=0 if verdict.take else moved * self.options.state_bytes,
        )

    def _look(self, layer: int, placement: Placement) -> LayerProposal:
        slots_RS, gain_s = self._layer(layer, placement)
        cost_s, experts = self._migration(placement.slots_LRS[layer], slots_RS, placement.home_slots)
        return LayerProposal(layer=layer, slots_RS=slots_RS, gain_s=gain_s, cost_s=cost_s, experts=experts)

    def _layer(self, layer: int, placement: Placement) -> tuple[IntArray, float]:
        """Slots with better homes for one layer, and the seconds per iteration that they save."""
        assert self._counts_LRE is not None
        slots_RS, home_slots, options = placement.slots_LRS[layer], placement.home_slots, self.options
        scenarios_KE, counts_RE = self.history.scenarios_KE(layer), self._counts_LRE[layer]
        plan = plan_homes(slots_RS, scenarios_KE[0], home_slots, options.homes)
        if options.replicas == "exact":
            kept_RS, found_RS = (
                exact_replicas(counts_RE.sum(axis=0), homes_RS, home_slots, options.replica.num_nodes)
                for homes_RS in (slots_RS, plan.slots_RS)
            )
        else:
            tokens = int(counts_RE.sum()) * options.micro_batches / placement.num_ranks
            kept = plan_replicas(slots_RS, scenarios_KE, home_slots, options.replica, tokens)
            kept_RS, found_RS = kept.slots_RS, kept.slots_RS
            if plan.swaps:
                found_RS = plan_replicas(plan.slots_RS, scenarios_KE, home_slots, options.replica, tokens).slots_RS
            elif placement.spare_slots and kept.excess > options.replica.good_enough:
                space = replace(search_space(placement.num_ranks, home_slots, options.replica), move_homes=True)
                prices = replace(options.replica.objective, home_price=options.homes.swap_price / 2)
                found_RS = improve(kept_RS, scenarios_KE, prices, space).slots_RS
        gain_s = self.layer_seconds(kept_RS, counts_RE) - self.layer_seconds(found_RS, counts_RE)
        return found_RS, gain_s * options.micro_batches

    def _migrations(self, before: Placement, after: Placement) -> tuple[float, int]:
        """`_migration` of all layers, one after another."""
        pairs = zip(before.slots_LRS, after.slots_LRS, strict=True)
        layers = [self._migration(*pair, before.home_slots) for pair in pairs]
        return sum(cost_s for cost_s, _ in layers), sum(moved for _, moved in layers)

    def _migration(self, before_RS: IntArray, after_RS: IntArray, home_slots: int) -> tuple[float, int]:
        """Seconds until the busiest rank has sent and received its experts' state, and how many experts move."""
        before_E = np.argsort(before_RS[:, :home_slots].ravel()) // home_slots
        after_E = np.argsort(after_RS[:, :home_slots].ravel()) // home_slots
        moves_E = before_E != after_E
        num_ranks = len(before_RS)
        sent_R = np.bincount(before_E[moves_E], minlength=num_ranks)
        received_R = np.bincount(after_E[moves_E], minlength=num_ranks)
        busiest = int(np.maximum(sent_R, received_R).max())
        return busiest * self.options.state_bytes / self.options.migration_bytes_s, int(moves_E.sum())
