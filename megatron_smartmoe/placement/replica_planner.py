"""The medium loop as training and the simulator share it: which replicas the next iteration has, from history.

With `auto`, a layer in which plans from exact counts alone have been cheaper has none for the time being: they are
suspended (`history_pays.py`). The planner then has two slot tables for it: what it plans, from which the next plan
starts and by which history is judged, and `placement`, in which the layer's spare slots are empty.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_smartmoe.cost.replicas import TransferPrice
from megatron_smartmoe.errors import PlanError
from megatron_smartmoe.placement.decisions import Candidate, Decision, Forecast, digest_of
from megatron_smartmoe.placement.history import History, HistoryOptions
from megatron_smartmoe.placement.history_pays import JudgedPrices, Standing, saved_by_exact
from megatron_smartmoe.placement.kernels import NUMPY, Kernels
from megatron_smartmoe.placement.online_options import OnlineOptions, ReplicaMode
from megatron_smartmoe.placement.plan_homes import drop_misplaced
from megatron_smartmoe.placement.replan import ReplanOptions, planned_anew
from megatron_smartmoe.placement.replica_scope import cheapest_replicas
from megatron_smartmoe.placement.search.cuts import scaled
from megatron_smartmoe.placement.search.improve import ImprovedPlacement
from megatron_smartmoe.spec.arrays import FloatArray, IntArray
from megatron_smartmoe.spec.placement import EMPTY, Placement, hosts_of


@dataclass(frozen=True, kw_only=True, eq=False)
class Anew:
    """See `replan.PlannedAnew`; `before` are the tokens of the busiest rank with the replicas from history."""

    slots_RS: IntArray
    busiest: int
    before: int


@dataclass(frozen=True, kw_only=True, eq=False)
class Planned:
    """The replicas of an iteration.

    Attributes:
        planned: the placement with the replicas from history in every layer.
        after: the placement with those that are not suspended.
        standings: of the layers.
        decision: None when nothing changes.
    """

    planned: Placement
    after: Placement
    standings: tuple[Standing, ...]
    decision: Decision | None


@dataclass(frozen=True, kw_only=True, eq=False)
class PlanAhead:
    """What the next iteration's replicas will be if neither homes nor slots change until it begins.

    Attributes:
        before: the placement that was planned from.
        history: with the last iteration's counts.
        tokens_L: mean tokens per rank in it.
        plan: the new replicas.
    """

    before: Placement
    history: History
    tokens_L: FloatArray
    plan: Planned


def planners_mode(mode: str) -> ReplicaMode:
    """The mode of the planners in a run that may be switched from `off` to another one: they keep their history."""
    modes: Mapping[str, ReplicaMode] = {"auto": "auto", "exact": "exact"}
    return modes.get(mode, "history")


class ReplicaPlanner:
    """The medium loop of one expert-parallel group.

    Args:
        placement: the present slots; their homes stay.
        group: number of the group, for the log.
        options: prices and effort, and how much history is kept.
        kernels: what plans the replicas; training passes the compiled twins.
        layer_numbers: of the layers, for messages; None counts from 0.
        passes: how often a micro-batch passes each layer, its counts added up; None for once.
    """

    def __init__(
        self,
        placement: Placement,
        group: int,
        options: OnlineOptions,
        kernels: Kernels = NUMPY,
        layer_numbers: Sequence[int] | None = None,
        passes: Sequence[int] | None = None,
    ) -> None:
        self._layer_numbers = range(placement.num_layers) if layer_numbers is None else layer_numbers
        self._passes = (1,) * placement.num_layers if passes is None else tuple(passes)
        self.placement, self.group, self.options = placement, group, options
        self._standings = (Standing(),) * placement.num_layers
        self._kernels = kernels
        remembered = options.history or HistoryOptions.for_ranks(placement.num_ranks)
        self.history = History(placement.num_layers, placement.num_experts, remembered)
        self._tokens_L = np.zeros(placement.num_layers)  # mean per rank in the last iteration

    @property
    def placement(self) -> Placement:
        """The present slots. Set, they are also what the next plan starts from."""
        return self._placement

    @placement.setter
    def placement(self, placement: Placement) -> None:
        self._placement = self._planned = placement

    @property
    def num_suspended(self) -> int:
        """Layers whose replicas from history are suspended."""
        return sum(standing.suspended for standing in self._standings)

    def is_suspended(self, layer: int) -> bool:
        """Whether a layer's replicas from history are suspended."""
        return self._standings[layer].suspended

    def switch_to(self, mode: str, placement: Placement) -> None:
        """Go on with these slots, for replicas that are planned in another way.

        Args:
            mode: how; the history is kept up to date whatever it is.
            placement: homes, and slots of which there may be another number than before.
        """
        self.options = replace(self.options, replicas=planners_mode(mode))
        self.placement, self._standings = placement, (Standing(),) * placement.num_layers

    def observe(self, counts_LME: IntArray) -> FloatArray:
        """Add this group's counts of one iteration; returns the forecast's error per layer."""
        self._tokens_L = self._rank_tokens_L(counts_LME)
        return self.history.update(counts_LME)

    def _rank_tokens_L(self, counts_LME: IntArray) -> FloatArray:
        """Mean tokens per rank of an iteration."""
        return np.asarray(counts_LME.sum(axis=(1, 2)) / self.placement.num_ranks)

    def state(self) -> dict[str, NDArray[Any]]:
        """All that the next plans depend on besides the options, as arrays whose first axis is the layer."""
        return {
            **self.history.state(),
            "tokens_L": self._tokens_L,
            "slots_LRS": self.placement.slots_LRS,
            "planned_LRS": self._planned.slots_LRS,
            "credit_L": np.array([standing.credit for standing in self._standings]),
            "suspended_L": np.array([int(standing.suspended) for standing in self._standings]),
            "rest_L": np.array([standing.rest for standing in self._standings]),
        }

    def restore(self, state: Mapping[str, NDArray[Any]]) -> None:
        """Continue from what `state` gave, for the same layers, ranks, slots and options; the homes become its homes.

        A state that was saved before layers could be suspended has none that is.

        Raises:
            PlanError: it is of another shape, or no placement.
        """
        names = ("tokens_L", "slots_LRS", "planned_LRS", "credit_L", "suspended_L", "rest_L")
        present = self.state()
        if "slots_LRS" in state and "planned_LRS" not in state:
            state = {**state, **{name: np.zeros(len(self._tokens_L)) for name in names[3:]}}
            state["planned_LRS"] = state["slots_LRS"]
        for name in names:
            if name not in state or state[name].shape != present[name].shape:
                found = state[name].shape if name in state else "missing"
                raise PlanError(f"{name} of the saved plan is {found}: must be {present[name].shape}")
        placement, planned = (
            replace(self.placement, slots_LRS=state[name].astype(self.placement.slots_LRS.dtype))
            for name in ("slots_LRS", "planned_LRS")
        )
        self.history.restore(state)
        self._placement, self._planned, self._tokens_L = placement, planned, state["tokens_L"].astype(np.float64)
        rows = zip(*(state[name].tolist() for name in names[3:]), strict=True)
        self._standings = tuple(
            Standing(credit=float(credit), suspended=bool(suspended), rest=int(rest))
            for credit, suspended, rest in rows
        )

    def forget(self, placement: Placement) -> None:
        """Start again, with an empty history and the slots of `placement`."""
        self.placement, self._standings = placement, (Standing(),) * placement.num_layers
        self.history = History(placement.num_layers, placement.num_experts, self.history.options)
        self._tokens_L = np.zeros(placement.num_layers)

    def exact_slots(self, layer: int, load_E: IntArray) -> IntArray | None:
        """Slots with replicas for the counts of one micro-batch, or None to use the present replicas.

        With `auto` they are used when they balance well enough, and when new replicas would save less than they cost.
        """
        slots_RS, options = self.placement.slots_LRS[layer], self.options
        if options.replicas == "history" or not self.placement.spare_slots:
            return None
        if options.replicas == "exact":
            return self._exact(load_E, slots_RS, options.replica.price)
        anew = self.planned_anew(layer, load_E)
        return None if anew is None else anew.slots_RS

    def planned_anew(self, layer: int, load_E: IntArray) -> Anew | None:
        """The layer's plan for the counts of one micro-batch where the rule of `auto` makes one."""
        slots_RS, options = self.placement.slots_LRS[layer], self.options
        before = self._kernels.busiest(self.placement.hosts_LER[layer], load_E)
        rule = ReplanOptions(limit=options.auto_limit, price=options.exact_price)
        relay = self._kernels.relay
        return planned_anew(before, load_E, len(slots_RS), rule, lambda: self._anew(load_E, slots_RS, before), relay)

    def _exact(self, load_E: IntArray, slots_RS: IntArray, price: TransferPrice) -> IntArray:
        """Slots with replicas for exactly these counts, at this price."""
        options = self.options.exact_plan(price)
        return self._kernels.exact_plan(load_E, slots_RS, self.placement.home_slots, options).slots_RS

    def _anew(self, load_E: IntArray, slots_RS: IntArray, before: int) -> Anew:
        """Replicas for exactly these counts, as `exact` makes them at their price for one micro-batch."""
        exact_RS = self._exact(load_E, slots_RS, self.options.exact_price)
        return Anew(
            slots_RS=exact_RS, busiest=self._kernels.busiest(hosts_of(exact_RS, len(load_E)), load_E), before=before
        )

    def rehome(self, homes: Placement) -> None:
        """Adopt the homes of another placement; replicas stay where their homes still allow it."""
        moved_L = (self._placement.homes_LRH != homes.homes_LRH).any(axis=(1, 2)).tolist()
        self._placement, self._planned = self._rehomed(self._placement, homes), self._rehomed(self._planned, homes)
        # How history has done with other homes says little about these, for which it has planned nothing yet.
        pairs = zip(self._standings, moved_L, strict=True)
        self._standings = tuple(Standing(rest=1) if moved else standing for standing, moved in pairs)

    def _rehomed(self, placement: Placement, homes: Placement) -> Placement:
        slots_LRS, home_slots = placement.slots_LRS.copy(), placement.home_slots
        slots_LRS[:, :, :home_slots] = homes.homes_LRH
        num_ranks, num_nodes = placement.num_ranks, self.options.replica.kept_nodes
        for slots_RS in slots_LRS:
            drop_misplaced(slots_RS, home_slots, np.arange(num_ranks) * num_nodes // num_ranks)
        return replace(placement, slots_LRS=slots_LRS)

    def plan(self, iteration: int) -> Decision | None:
        """Plan the replicas for `iteration` and make them the present placement; None when nothing changes.

        Raises:
            PlanError: a layer cannot be planned; the placement stays.
        """
        return self._adopt(self._plan(iteration, self.history, self._tokens_L))

    def ahead(self, iteration: int, counts_LME: IntArray) -> PlanAhead:
        """What `observe` with these counts and `plan` would lead to; changes nothing, so a thread may call it.

        Raises:
            PlanError: a layer cannot be planned.
        """
        before, history, tokens_L = self.placement, self.history.copy(), self._rank_tokens_L(counts_LME)
        history.update(counts_LME)
        plan = self._plan(iteration, history, tokens_L)
        return PlanAhead(before=before, history=history, tokens_L=tokens_L, plan=plan)

    def adopt_history(self, ahead: PlanAhead) -> None:
        """Do what `observe` would have done with the counts that were planned from."""
        self.history, self._tokens_L = ahead.history, ahead.tokens_L

    def adopt_plan(self, ahead: PlanAhead, iteration: int) -> Decision | None:
        """Do what `plan` would do, once `adopt_history` has been called."""
        if ahead.before is not self.placement:  # homes have moved
            return self.plan(iteration)
        decision = self._adopt(ahead.plan)
        return None if decision is None else replace(decision, iteration=iteration)

    def _adopt(self, plan: Planned) -> Decision | None:
        self._placement, self._planned, self._standings = plan.after, plan.planned, plan.standings
        return plan.decision

    def _plan(self, iteration: int, history: History, tokens_L: FloatArray) -> Planned:
        """The replicas that follow from a history, and the decision if they are others."""
        before = self.placement
        if not history.num_records or not before.spare_slots:
            return Planned(planned=self._planned, after=before, standings=self._standings, decision=None)
        # Step 1: judge the replicas that history has planned last, and plan the next ones.
        rows, results, standings = list[FloatArray](), list[ImprovedPlacement](), list[Standing]()
        replica, kernels = self.options.replica, self._kernels
        for layer, (slots_RS, tokens) in enumerate(zip(self._planned.slots_LRS, tokens_L.tolist(), strict=True)):
            try:
                standings.append(self._standing(layer, history, tokens))
                rows.append(history.scenarios_KE(layer))
                results.append(cheapest_replicas(slots_RS, rows[-1], before.home_slots, replica, tokens, kernels))
            except Exception as error:
                number = self._layer_numbers[layer]
                raise PlanError(f"layer {number} cannot be planned: {type(error).__name__}: {error}") from error
        # Step 2: none where they are suspended.
        planned = replace(before, slots_LRS=np.stack([result.slots_RS for result in results]))
        after = _without_replicas(planned, [standing.suspended for standing in standings])
        found = Planned(planned=planned, after=after, standings=tuple(standings), decision=None)
        if after == before:
            return found
        return replace(found, decision=self._decision(iteration, found, history, tokens_L, rows, results))

    def _standing(self, layer: int, history: History, tokens: float) -> Standing:
        """How history has done in a layer up to the last iteration."""
        standing, options, planned = self._standings[layer], self.options, self._planned
        if not self._may_suspend or not tokens:
            return standing
        if standing.rest:
            return replace(standing, rest=standing.rest - 1)
        passes = self._passes[layer]
        prices = JudgedPrices(
            history=options.replica.price, exact=options.exact_price.scaled(passes), limit=options.auto_limit
        )
        slots_RS, load_ME = planned.slots_LRS[layer], history.last_micro_batches_ME(layer)
        saved = saved_by_exact(
            standing.credit,
            load_ME,
            tokens,
            slots_RS,
            planned.home_slots,
            prices,
            lambda load_E: self._exact(load_E, slots_RS, prices.exact),
            self._kernels,
        )
        return standing.after(saved, draw=int(load_ME.max(initial=0)))

    @property
    def _may_suspend(self) -> bool:
        return self.options.replicas == "auto" and self.options.replica.may_suspend

    def _decision(
        self,
        iteration: int,
        found: Planned,
        history: History,
        tokens_L: FloatArray,
        rows: Sequence[FloatArray],
        results: Sequence[ImprovedPlacement],
    ) -> Decision:
        """As it is logged.

        Args:
            iteration: that the replicas are planned for.
            found: the replicas.
            history: that they were planned from.
            tokens_L: mean tokens per rank in the last iteration.
            rows: the scenarios of each layer.
            results: the plan of each layer, whether it is suspended or not.
        """
        before, after = self.placement, found.after
        layer = _most_unbalanced(before, after, [scenarios_KE[0] for scenarios_KE in rows])
        inputs: list[FloatArray | IntArray] = [before.slots_LRS, *rows]
        if self._may_suspend:
            inputs += [self._planned.slots_LRS, np.array([standing.credit for standing in self._standings])]
        return Decision(
            iteration=iteration,
            kind="replicas",
            group=self.group,
            inputs=digest_of(*inputs),
            before=before.digest,
            after=after.digest,
            taken=True,
            why=_why(results, [standing.suspended for standing in found.standings]),
            changes=before.diff(after),
            candidates=self._candidates(layer, before, found, rows[layer][0], float(tokens_L[layer])),
            forecast=(Forecast.of(layer, history.forecast_error_L[layer], rows[layer][0]),),
            price_tokens=self.options.replica.price.each_tokens,
        )

    def _candidates(
        self, layer: int, before: Placement, found: Planned, forecast_E: FloatArray, rank_tokens: float
    ) -> tuple[Candidate, ...]:
        """The replicas of a layer as they are planned, as they were, and none, as they are logged.

        None is what is chosen where they are suspended.

        Args:
            layer: row of the layer.
            before: the placement before.
            found: the replicas that are planned.
            forecast_E: the layer's forecast.
            rank_tokens: mean tokens per rank in an iteration.
        """
        home_slots, kernels, price = before.home_slots, self._kernels, self.options.replica.price
        none_RS = before.slots_LRS[layer].copy()
        none_RS[:, home_slots:] = EMPTY
        tables = {
            "replicas as planned": found.planned.slots_LRS[layer],
            "replicas as they were": before.slots_LRS[layer],
            "no replicas": none_RS,
        }
        load_E = scaled(forecast_E[None], before.num_ranks)[0].astype(np.int64)
        tokens_each = rank_tokens * before.num_ranks / max(int(load_E.sum()), 1)  # of a unit of the scaled load
        candidates: list[Candidate] = []
        for name, slots_RS in tables.items():
            if name != "no replicas" and np.array_equal(slots_RS, none_RS):
                continue  # the last of the three
            candidate = Candidate.in_tokens(
                f"layer {layer + 1}: {name}",
                chosen=np.array_equal(slots_RS, found.after.slots_LRS[layer]),
                layer=layer,
                busiest_tokens=round(kernels.busiest(hosts_of(slots_RS, len(load_E)), load_E) * tokens_each, 3),
                tree=kernels.relay(slots_RS, home_slots, price.num_nodes),
                price=price,
            )
            candidates.append(candidate)
        return tuple(candidates)


def _without_replicas(placement: Placement, suspended_L: Sequence[bool]) -> Placement:
    """The placement with empty spare slots in the layers that are suspended."""
    if not any(suspended_L):
        return placement
    slots_LRS = placement.slots_LRS.copy()
    slots_LRS[np.array(suspended_L), :, placement.home_slots :] = EMPTY
    return replace(placement, slots_LRS=slots_LRS)


def _why(results: Sequence[ImprovedPlacement], suspended_L: Sequence[bool]) -> str:
    """What the replicas of the layers that have some do for them, and where they are suspended."""
    fetched = [result for result, suspended in zip(results, suspended_L, strict=True) if not suspended]
    parts = []
    if fetched:
        forecast = float(np.mean([result.imbalance_K[0] for result in fetched]))
        worst = float(max(result.imbalance_K.max() for result in fetched))
        parts.append(f"max/mean {forecast:.4f} on the forecast, {worst:.4f} in the worst scenario")
    if any(suspended_L):
        where = f"replicas from history suspended in {sum(suspended_L)} of {len(suspended_L)} layers"
        parts.append(f"{where}: planning micro-batches from their own counts alone has been cheaper there")
    return "; ".join(parts)


def _most_unbalanced(before: Placement, after: Placement, forecast_LE: Sequence[FloatArray]) -> int:
    """Of the layers whose replicas change, the one whose homes alone would be the most unbalanced."""
    changed_L = (before.slots_LRS != after.slots_LRS).any(axis=(1, 2))
    busiest_L = [
        share_E[homes_RH].sum(axis=1).max() for share_E, homes_RH in zip(forecast_LE, before.homes_LRH, strict=True)
    ]
    return int(np.argmax(np.where(changed_L, busiest_L, -1.0)))
