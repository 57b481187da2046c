"""The medium loop as training and the simulator share it: which replicas the next iteration has, from history."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_smartmoe.errors import PlanError
from megatron_smartmoe.placement.decisions import Decision, digest_of
from megatron_smartmoe.placement.exact_replicas import exact_replicas
from megatron_smartmoe.placement.history import History, HistoryOptions
from megatron_smartmoe.placement.homes_planner import OnlineOptions
from megatron_smartmoe.placement.paying_replicas import paying_exact_replicas
from megatron_smartmoe.placement.plan_homes import drop_misplaced
from megatron_smartmoe.placement.plan_replicas import BestReplicas, best_replicas, plan_replicas, replicas_pay
from megatron_smartmoe.placement.split import binding_cuts, split_graph
from megatron_smartmoe.spec.arrays import FloatArray, IntArray
from megatron_smartmoe.spec.placement import BoolArray, Placement, hosts_of


class ReplicaPlanner:
    """The medium loop of one expert-parallel group.

    Args:
        placement: the present slots; their homes stay.
        group: number of the group, for the log.
        options: prices and effort, and how much history is kept.
        best: what finds the best replicas; training passes the compiled twin.
    """

    def __init__(
        self, placement: Placement, group: int, options: OnlineOptions, best: BestReplicas = best_replicas
    ) -> None:
        self.placement, self.group, self.options, self._best = placement, group, options, best
        remembered = options.history or HistoryOptions.for_ranks(placement.num_ranks)
        self.history = History(placement.num_layers, placement.num_experts, remembered)
        self._tokens_L = np.zeros(placement.num_layers)  # mean per rank in the last iteration

    def observe(self, counts_LME: IntArray) -> FloatArray:
        """Add this group's counts of one iteration; returns the forecast's error per layer."""
        self._tokens_L = counts_LME.sum(axis=(1, 2)) / self.placement.num_ranks
        return self.history.update(counts_LME)

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
        slots_RS, home_slots, options = self.placement.slots_LRS[layer], self.placement.home_slots, self.options
        if options.replicas == "history" or not self.placement.spare_slots:
            return None
        if options.replicas == "exact":
            return paying_exact_replicas(load_E, slots_RS, home_slots, options.replica, options.auto_limit)
        busiest, tokens = _busiest(self.placement.hosts_LER[layer], load_E), int(load_E.sum())
        if busiest * len(slots_RS) <= options.auto_limit * tokens:
            return None
        exact_RS = exact_replicas(load_E, slots_RS, home_slots, options.replica.num_nodes)
        saved_tokens = busiest - _busiest(hosts_of(exact_RS, len(load_E)), load_E)
        pays = replicas_pay(exact_RS, home_slots, saved_tokens, options.exact_price_tokens)
        return exact_RS if saved_tokens > 0 and pays else None

    def rehome(self, homes: Placement) -> None:
        """Adopt the homes of another placement; replicas stay where their homes still allow it."""
        slots_LRS, home_slots = self.placement.slots_LRS.copy(), self.placement.home_slots
        slots_LRS[:, :, :home_slots] = homes.homes_LRH
        num_ranks, num_nodes = self.placement.num_ranks, self.options.replica.num_nodes
        for slots_RS in slots_LRS:
            drop_misplaced(slots_RS, home_slots, np.arange(num_ranks) * num_nodes // num_ranks)
        self.placement = replace(self.placement, slots_LRS=slots_LRS)

    def plan(self, iteration: int) -> Decision | None:
        """Plan the replicas for `iteration` and make them the present placement; None when nothing changes."""
        if not self.history.num_records or not self.placement.spare_slots:
            return None
        before, rows = self.placement, [self.history.scenarios_KE(layer) for layer in range(self.placement.num_layers)]
        results = [
            plan_replicas(slots_RS, scenarios_KE, before.home_slots, self.options.replica, float(tokens), self._best)
            for slots_RS, scenarios_KE, tokens in zip(before.slots_LRS, rows, self._tokens_L, strict=True)
        ]
        after = replace(before, slots_LRS=np.stack([result.slots_RS for result in results]))
        if after == before:
            return None
        self.placement = after
        forecast = float(np.mean([result.imbalance_K[0] for result in results]))
        worst = float(max(result.imbalance_K.max() for result in results))
        return Decision(
            iteration=iteration,
            kind="replicas",
            group=self.group,
            inputs=digest_of(before.slots_LRS, *rows),
            before=before.digest,
            after=after.digest,
            taken=True,
            why=f"max/mean {forecast:.4f} on the forecast, {worst:.4f} in the worst scenario",
            changes=before.diff(after),
        )


def _busiest(hosts_ER: BoolArray, load_E: IntArray) -> int:
    """Tokens of the busiest rank with the best split."""
    return binding_cuts(split_graph(hosts_ER, load_E), load_E)[0]
