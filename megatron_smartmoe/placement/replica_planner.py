"""The medium loop as training and the simulator share it: which replicas the next iteration has, from history."""

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
from megatron_smartmoe.placement.homes_planner import OnlineOptions
from megatron_smartmoe.placement.kernels import NUMPY, Kernels
from megatron_smartmoe.placement.plan_homes import drop_misplaced
from megatron_smartmoe.placement.replan import ReplanOptions, planned_anew
from megatron_smartmoe.placement.replica_scope import cheapest_exact_replicas, cheapest_replicas
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
class PlanAhead:
    """What the next iteration's replicas will be if neither homes nor slots change until it begins.

    Attributes:
        before: the placement that was planned from.
        history: with the last iteration's counts.
        tokens_L: mean tokens per rank in it.
        after: the placement with the new replicas.
        decision: None when nothing changes.
    """

    before: Placement
    history: History
    tokens_L: FloatArray
    after: Placement
    decision: Decision | None


class ReplicaPlanner:
    """The medium loop of one expert-parallel group.

    Args:
        placement: the present slots; their homes stay.
        group: number of the group, for the log.
        options: prices and effort, and how much history is kept.
        kernels: what plans the replicas; training passes the compiled twins.
        layer_numbers: of the layers, for messages; None counts from 0.
    """

    def __init__(
        self,
        placement: Placement,
        group: int,
        options: OnlineOptions,
        kernels: Kernels = NUMPY,
        layer_numbers: Sequence[int] | None = None,
    ) -> None:
        self._layer_numbers = range(placement.num_layers) if layer_numbers is None else layer_numbers
        self.placement, self.group, self.options = placement, group, options
        self._kernels = kernels
        remembered = options.history or HistoryOptions.for_ranks(placement.num_ranks)
        self.history = History(placement.num_layers, placement.num_experts, remembered)
        self._tokens_L = np.zeros(placement.num_layers)  # mean per rank in the last iteration

    def observe(self, counts_LME: IntArray) -> FloatArray:
        """Add this group's counts of one iteration; returns the forecast's error per layer."""
        self._tokens_L = self._rank_tokens_L(counts_LME)
        return self.history.update(counts_LME)

    def _rank_tokens_L(self, counts_LME: IntArray) -> FloatArray:
        """Mean tokens per rank of an iteration."""
        return np.asarray(counts_LME.sum(axis=(1, 2)) / self.placement.num_ranks)

    def state(self) -> dict[str, NDArray[Any]]:
        """All that the next plans depend on besides the options, as arrays whose first axis is the layer."""
        return {**self.history.state(), "tokens_L": self._tokens_L, "slots_LRS": self.placement.slots_LRS}

    def restore(self, state: Mapping[str, NDArray[Any]]) -> None:
        """Continue from what `state` gave, for the same layers, ranks, slots and options; the homes become its homes.

        Raises:
            PlanError: it is of another shape, or no placement.
        """
        for name, present in (("tokens_L", self._tokens_L), ("slots_LRS", self.placement.slots_LRS)):
            if name not in state or state[name].shape != present.shape:
                found = state[name].shape if name in state else "missing"
                raise PlanError(f"{name} of the saved plan is {found}: must be {present.shape}")
        placement = replace(self.placement, slots_LRS=state["slots_LRS"].astype(self.placement.slots_LRS.dtype))
        self.history.restore(state)
        self.placement, self._tokens_L = placement, state["tokens_L"].astype(np.float64)

    def forget(self, placement: Placement) -> None:
        """Start again, with an empty history and the slots of `placement`."""
        self.placement = placement
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
        return cheapest_exact_replicas(
            load_E,
            slots_RS,
            self.placement.home_slots,
            num_nodes=self.options.replica.num_nodes,
            or_group=self.options.replica.or_group,
            price=price,
            limit=self.options.auto_limit,
            kernels=self._kernels,
        )

    def _anew(self, load_E: IntArray, slots_RS: IntArray, before: int) -> Anew:
        """Replicas for exactly these counts, as `exact` makes them at their price for one micro-batch."""
        exact_RS = self._exact(load_E, slots_RS, self.options.exact_price)
        return Anew(
            slots_RS=exact_RS, busiest=self._kernels.busiest(hosts_of(exact_RS, len(load_E)), load_E), before=before
        )

    def rehome(self, homes: Placement) -> None:
        """Adopt the homes of another placement; replicas stay where their homes still allow it."""
        slots_LRS, home_slots = self.placement.slots_LRS.copy(), self.placement.home_slots
        slots_LRS[:, :, :home_slots] = homes.homes_LRH
        num_ranks, num_nodes = self.placement.num_ranks, self.options.replica.kept_nodes
        for slots_RS in slots_LRS:
            drop_misplaced(slots_RS, home_slots, np.arange(num_ranks) * num_nodes // num_ranks)
        self.placement = replace(self.placement, slots_LRS=slots_LRS)

    def plan(self, iteration: int) -> Decision | None:
        """Plan the replicas for `iteration` and make them the present placement; None when nothing changes.

        Raises:
            PlanError: a layer cannot be planned; the placement stays.
        """
        self.placement, decision = self._planned(iteration, self.placement, self.history, self._tokens_L)
        return decision

    def ahead(self, iteration: int, counts_LME: IntArray) -> PlanAhead:
        """What `observe` with these counts and `plan` would lead to; changes nothing, so a thread may call it.

        Raises:
            PlanError: a layer cannot be planned.
        """
        before, history, tokens_L = self.placement, self.history.copy(), self._rank_tokens_L(counts_LME)
        history.update(counts_LME)
        after, decision = self._planned(iteration, before, history, tokens_L)
        return PlanAhead(before=before, history=history, tokens_L=tokens_L, after=after, decision=decision)

    def adopt_history(self, ahead: PlanAhead) -> None:
        """Do what `observe` would have done with the counts that were planned from."""
        self.history, self._tokens_L = ahead.history, ahead.tokens_L

    def _planned(
        self, iteration: int, before: Placement, history: History, tokens_L: FloatArray
    ) -> tuple[Placement, Decision | None]:
        """The placement with the replicas that follow from a history, and the decision if it is another one."""
        if not history.num_records or not before.spare_slots:
            return before, None
        rows, results = list[FloatArray](), list[ImprovedPlacement]()
        for layer, (slots_RS, tokens) in enumerate(zip(before.slots_LRS, tokens_L.tolist(), strict=True)):
            try:
                rows.append(history.scenarios_KE(layer))
                replica, kernels = self.options.replica, self._kernels
                results.append(cheapest_replicas(slots_RS, rows[-1], before.home_slots, replica, tokens, kernels))
            except Exception as error:
                number = self._layer_numbers[layer]
                raise PlanError(f"layer {number} cannot be planned: {type(error).__name__}: {error}") from error
        after = replace(before, slots_LRS=np.stack([result.slots_RS for result in results]))
        if after == before:
            return before, None
        forecast = float(np.mean([result.imbalance_K[0] for result in results]))
        worst = float(max(result.imbalance_K.max() for result in results))
        layer = _most_unbalanced(before, after, [scenarios_KE[0] for scenarios_KE in rows])
        decision = Decision(
            iteration=iteration,
            kind="replicas",
            group=self.group,
            inputs=digest_of(before.slots_LRS, *rows),
            before=before.digest,
            after=after.digest,
            taken=True,
            why=f"max/mean {forecast:.4f} on the forecast, {worst:.4f} in the worst scenario",
            changes=before.diff(after),
            candidates=self._candidates(layer, before, after, rows[layer][0], float(tokens_L[layer])),
            forecast=(Forecast.of(layer, history.forecast_error_L[layer], rows[layer][0]),),
            price_tokens=self.options.replica.price.each_tokens,
        )
        return after, decision

    def _candidates(
        self, layer: int, before: Placement, after: Placement, forecast_E: FloatArray, rank_tokens: float
    ) -> tuple[Candidate, ...]:
        """The replicas of a layer as they are planned, as they were, and none, as they are logged.

        Args:
            layer: row of the layer.
            before: the placement before.
            after: the one that is planned.
            forecast_E: the layer's forecast.
            rank_tokens: mean tokens per rank in an iteration.
        """
        home_slots, kernels, price = before.home_slots, self._kernels, self.options.replica.price
        none_RS = before.slots_LRS[layer].copy()
        none_RS[:, home_slots:] = EMPTY
        tables = {
            "replicas as planned": after.slots_LRS[layer],
            "replicas as they were": before.slots_LRS[layer],
            "no replicas": none_RS,
        }
        load_E = scaled(forecast_E[None], before.num_ranks)[0].astype(np.int64)
        tokens_each = rank_tokens * before.num_ranks / max(int(load_E.sum()), 1)  # of a unit of the scaled load
        found: list[Candidate] = []
        for name, slots_RS in tables.items():
            if name != "no replicas" and np.array_equal(slots_RS, none_RS):
                continue  # the last of the three
            candidate = Candidate.in_tokens(
                f"layer {layer + 1}: {name}",
                chosen=np.array_equal(slots_RS, after.slots_LRS[layer]),
                layer=layer,
                busiest_tokens=round(kernels.busiest(hosts_of(slots_RS, len(load_E)), load_E) * tokens_each, 3),
                tree=kernels.relay(slots_RS, home_slots, price.num_nodes),
                price=price,
            )
            found.append(candidate)
        return tuple(found)


def _most_unbalanced(before: Placement, after: Placement, forecast_LE: Sequence[FloatArray]) -> int:
    """Of the layers whose replicas change, the one whose homes alone would be the most unbalanced."""
    changed_L = (before.slots_LRS != after.slots_LRS).any(axis=(1, 2))
    busiest_L = [
        share_E[homes_RH].sum(axis=1).max() for share_E, homes_RH in zip(forecast_LE, before.homes_LRH, strict=True)
    ]
    return int(np.argmax(np.where(changed_L, busiest_L, -1.0)))
