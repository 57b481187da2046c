"""Policies as the simulator drives them: each observes the counts and plans before each record or micro-batch.

`OnlinePolicy` is ours, the planners of `placement` exactly as training calls them. `RulePolicy` drives a peer's rule.
Both keep the same `Stats`: what moved, how many replicas were made, and how long planning took.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Protocol, TypeVar

import numpy as np

from megatron_smartmoe.placement.decisions import Decision
from megatron_smartmoe.placement.homes_planner import HomesPlanner
from megatron_smartmoe.placement.kernels import NUMPY, Kernels
from megatron_smartmoe.placement.layer_cost import Kept, Relay
from megatron_smartmoe.placement.layer_plan import LayerPlan, LayerProblem, Rule, Sees
from megatron_smartmoe.placement.online_options import OnlineOptions
from megatron_smartmoe.placement.replan import Replan, replans_decision
from megatron_smartmoe.placement.replica_planner import Anew, ReplicaPlanner
from megatron_smartmoe.placement.review import LayerSeconds
from megatron_smartmoe.spec.arrays import IntArray
from megatron_smartmoe.spec.placement import Placement, hosts_of

T = TypeVar("T")


@dataclass(kw_only=True)
class Stats:
    """What a policy did in the records that count.

    Attributes:
        experts_moved: experts whose home changed its rank, over layers; homes are the same in every group.
        replicas_made: replicas filled with weights: those from history once in a record, whether they are used or not,
            those from exact counts in every micro-batch.
        replicas_returned: likewise, those whose gradients go home.
        slots_changed: experts that a rank holds and did not hold in the micro-batch before, over layers and groups.
        plans: layers planned.
        plan_s: processor seconds of planning them, all threads together, so that a busy machine does not show in it.
        replans: layers and micro-batches whose replicas were planned from their own counts.
        suspended: layers and micro-batches without replicas from history, because these do not pay there.
        homes_s: processor seconds of re-evaluating homes, kept apart: that is rare and off the critical path.
        forecast_errors: total variation between each forecast and its record, for a policy that forecasts.
    """

    experts_moved: int = 0
    replicas_made: int = 0
    replicas_returned: int = 0
    slots_changed: int = 0
    plans: int = 0
    plan_s: float = 0.0
    replans: int = 0
    suspended: int = 0
    homes_s: float = 0.0
    forecast_errors: list[float] = field(default_factory=list)

    def plus(self, other: Stats) -> Stats:
        """Of both together."""
        return Stats(**{each.name: getattr(self, each.name) + getattr(other, each.name) for each in fields(self)})

    def timed(self, plans: int, function: Callable[[], T]) -> T:
        """Call a function that plans `plans` layers and add its time."""
        begin = time.process_time()
        result = function()
        self.plan_s += time.process_time() - begin
        self.plans += plans
        return result


class Holdings:
    """The experts on each rank, by layer and group, so that changes are counted alike for all policies."""

    def __init__(self, placement: Placement, num_groups: int) -> None:
        layers, groups = range(placement.num_layers), range(num_groups)
        self._hosts = {(layer, group): placement.hosts_LER[layer] for layer in layers for group in groups}

    def hold(self, stats: Stats, layer: int, group: int, slots_RS: IntArray, num_experts: int) -> None:
        """Count what changes when a micro-batch of this group and layer runs with these slots."""
        key, hosts_ER = (layer, group), hosts_of(slots_RS, num_experts)
        stats.slots_changed += int((hosts_ER & ~self._hosts[key]).sum())
        self._hosts[key] = hosts_ER


@dataclass(frozen=True, kw_only=True)
class Planned:
    """What a micro-batch of a layer runs with.

    Attributes:
        plan: slots and split.
        mode: whether the replicas travel as those from history do or as those from exact counts.
        kept: the replicas from history where others were planned anew; else None.
    """

    plan: LayerPlan
    mode: Sees
    kept: Kept | None = None


class SimulatedPolicy(Protocol):
    """The methods that the simulator calls, in this order for every record."""

    name: str
    stats: Stats
    decisions: list[Decision]
    relay: Relay | None
    has_trees: bool  # whether holders forward along `relay_tree`

    def before(self, iteration: int) -> None:
        """Plan for the next record from the records observed so far."""

    def plan(self, layer: int, group: int, counts_RE: IntArray) -> Planned:
        """The plan of a layer for a micro-batch of a group; only an exact rule may use its counts."""

    def homes(self, layer: int) -> IntArray:
        """Home rank of each expert."""

    def observe(self, counts_LGMRE: IntArray) -> None:
        """Add the counts of the record."""


class OnlinePolicy:
    """Homes, replicas and split as training runs them.

    Args:
        placement: at the start.
        num_groups: expert-parallel groups.
        options: options of the planners.
        layer_seconds: cost model, for the homes.
        kernels: what plans the replicas; training has the compiled ones.
    """

    def __init__(
        self,
        placement: Placement,
        num_groups: int,
        options: OnlineOptions,
        layer_seconds: LayerSeconds,
        kernels: Kernels = NUMPY,
    ) -> None:
        self.name, self.stats, self.decisions = "smartmoe", Stats(), list[Decision]()
        self.relay: Relay | None = None
        self.has_trees = True
        self.options = options
        self.homes_planner = HomesPlanner(placement.num_layers, placement.num_experts, options, layer_seconds, kernels)
        self.groups = [ReplicaPlanner(placement, group, options, kernels) for group in range(num_groups)]
        self._holdings = Holdings(placement, num_groups)
        self._iteration = -1
        self._judged = [[0] * placement.num_layers for _ in range(num_groups)]  # micro-batches so far in the record
        self._replans: list[list[Replan]] = [[] for _ in range(num_groups)]

    def before(self, iteration: int) -> None:
        """Review the last move of homes, re-evaluate the homes when due, then plan every group's replicas."""
        # Step 1: homes, the same for every group. A move that is taken gives every group new homes.
        self._iteration = iteration
        begin = time.process_time()
        placement = self.groups[0].placement
        found = self.homes_planner.review(iteration, placement)
        if found is None and self.homes_planner.due(iteration):
            found = self.homes_planner.propose(iteration, placement)
        self.stats.homes_s += time.process_time() - begin
        if found is not None:
            proposal, decision = found
            self.decisions.append(decision)
            if decision.taken:
                self.stats.experts_moved += int((placement.home_rank_LE != proposal.home_rank_LE).sum())
                for planner in self.groups:
                    planner.rehome(proposal)
        # Step 2: replicas from history, group by group.
        if self.options.replicas == "exact":
            return
        for planner in self.groups:
            plan = self.stats.timed(placement.num_layers, lambda planner=planner: planner.plan(iteration))  # type: ignore[misc]
            if plan is not None:
                self.decisions.append(plan)

    def plan(self, layer: int, group: int, counts_RE: IntArray) -> Planned:
        """The group's placement, or one with replicas for exactly these counts; always with the exact split."""
        planner, mode = self.groups[group], self.options.replicas
        history_RS = planner.placement.slots_LRS[layer]
        exact_RS, load_E = None, counts_RE.sum(axis=0)
        if mode == "exact":
            exact_RS = self.stats.timed(1, lambda: planner.exact_slots(layer, load_E))
        elif mode == "auto" and planner.placement.spare_slots:
            anew = self.stats.timed(0, lambda: planner.planned_anew(layer, load_E))  # that from history was counted
            self._note(layer, group, load_E, anew)
            self.stats.suspended += planner.is_suspended(layer)
            exact_RS = None if anew is None else anew.slots_RS
        self.stats.replans += exact_RS is not None
        slots_RS = history_RS if exact_RS is None else exact_RS
        self._holdings.hold(self.stats, layer, group, slots_RS, len(load_E))
        return Planned(
            plan=LayerPlan(slots_RS=slots_RS, split="exact"),
            mode="history" if exact_RS is None else "exact",
            kept=Kept(slots_RS=history_RS) if exact_RS is not None and mode == "auto" else None,
        )

    def _note(self, layer: int, group: int, load_E: IntArray, anew: Anew | None) -> None:
        """Remember what `auto` decided, for the log."""
        micro_batch = self._judged[group][layer]
        self._judged[group][layer] += 1
        if anew is not None:
            one = Replan(
                layer=layer,
                micro_batch=micro_batch,
                load_E=load_E,
                slots_RS=anew.slots_RS,
                before_tokens=anew.before,
                tokens=anew.busiest,
            )
            self._replans[group].append(one)

    def _log_replans(self) -> None:
        """Log which layers were planned anew in the record, by group."""
        for group, (planner, replans) in enumerate(zip(self.groups, self._replans, strict=True)):
            if replans:
                history, judged = planner.placement.digest, sum(self._judged[group])
                price = self.options.exact_price
                decision = replans_decision(self._iteration, group, history, replans, judged, price)
                self.decisions.append(decision)
            replans.clear()
            self._judged[group] = [0] * len(self._judged[group])

    def homes(self, layer: int) -> IntArray:
        """Home rank of each expert."""
        return np.asarray(self.groups[0].placement.home_rank_LE[layer])

    def observe(self, counts_LGMRE: IntArray) -> None:
        """Give every group's planner the counts of its group, and the homes' planner their mean."""
        self._log_replans()
        for group, planner in enumerate(self.groups):
            error_L = planner.observe(counts_LGMRE[:, group].sum(axis=2))
            self.stats.forecast_errors += error_L[np.isfinite(error_L)].tolist()
        num_parts = counts_LGMRE.shape[1] * counts_LGMRE.shape[2]
        self.homes_planner.observe(counts_LGMRE.sum(axis=(1, 2)) // num_parts)


class RulePolicy:
    """A peer's rule, from the last record's counts or from each micro-batch's.

    Args:
        rule: the rule, a pure function of one layer.
        placement: at the start; its spare slots are what the rule may fill.
        num_groups: expert-parallel groups; a rule that plans from history plans one placement for all of them.
        num_nodes: nodes that a group's ranks lie on.
        interval: iterations between two plans from history.
        relay: how the rule's system moves weights; None where homes send them.
        has_homes: whether a rank owns an expert's state, which moves when the rank no longer holds the expert.
    """

    def __init__(
        self,
        rule: Rule,
        placement: Placement,
        num_groups: int,
        num_nodes: int,
        interval: int,
        relay: Relay | None = None,
        *,
        has_homes: bool = True,
    ) -> None:
        self.rule, self.name, self.stats, self.decisions = rule, rule.name, Stats(), list[Decision]()
        self.relay, self.has_trees, self._has_homes = relay, False, has_homes
        self.num_groups, self.num_nodes, self.interval = num_groups, num_nodes, interval
        self.start, self.spare_slots, self.num_experts = placement, placement.spare_slots, placement.num_experts
        layers = range(placement.num_layers)
        self._plans = [LayerPlan(slots_RS=placement.slots_LRS[layer], split="equal") for layer in layers]
        self._homes = [placement.home_rank_LE[layer] for layer in layers]
        self._holdings = Holdings(placement, num_groups)
        self._counts_LRE: IntArray | None = None
        self._planned_at: int | None = None

    def before(self, iteration: int) -> None:
        """Plan every layer again when the interval has passed."""
        if self.rule.sees == "exact" or self._counts_LRE is None:
            return
        if self._planned_at is None or iteration - self._planned_at >= self.interval:
            self._planned_at = iteration
            for layer, counts_RE in enumerate(self._counts_LRE):
                problem = self._problem(layer, counts_RE)
                plan = self.stats.timed(1, lambda problem=problem: self.rule.plan(problem))  # type: ignore[misc]
                self._plans[layer] = plan
                self._move_homes(layer, plan)

    def plan(self, layer: int, group: int, counts_RE: IntArray) -> Planned:
        """The plan from history, or one for exactly these counts."""
        plan = self._plans[layer]
        if self.rule.sees == "exact":
            problem = self._problem(layer, counts_RE)
            plan = self.stats.timed(1, lambda: self.rule.plan(problem))
            self._move_homes(layer, plan)
        self._holdings.hold(self.stats, layer, group, plan.slots_RS, self.num_experts)
        return Planned(plan=plan, mode=self.rule.sees)

    def homes(self, layer: int) -> IntArray:
        """Home rank of each expert: where it was, as long as that rank holds the expert, else its lowest rank."""
        return np.asarray(self._homes[layer])

    def observe(self, counts_LGMRE: IntArray) -> None:
        """Remember the last record, all groups and micro-batches together."""
        self._counts_LRE = np.asarray(counts_LGMRE.sum(axis=(1, 2)))

    def _problem(self, layer: int, counts_RE: IntArray) -> LayerProblem:
        slots_RS = self._plans[layer].slots_RS if self.rule.sees == "history" else self.start.slots_LRS[layer]
        return LayerProblem(
            counts_RE=counts_RE, slots_RS=slots_RS, spare_slots=self.spare_slots, num_nodes=self.num_nodes
        )

    def _move_homes(self, layer: int, plan: LayerPlan) -> None:
        if not self._has_homes:
            return
        hosts_ER = hosts_of(plan.slots_RS, self.num_experts)
        home_E = self._homes[layer]
        stays_E = hosts_ER[np.arange(self.num_experts), home_E]
        self._homes[layer] = np.where(stays_E, home_E, hosts_ER.argmax(axis=1))
        self.stats.experts_moved += int((~stays_E).sum())
