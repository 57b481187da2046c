"""Other homes of one layer: where they are looked for, and what they are worth.

Method. Other homes of a layer are searched for on the history as it was before the last record, with replicas planned
from it as training would have planned them for the last record. They are worth what they would have saved on the last
record, which they were not found on, and no more than on the record before it, the last one that they were found on.
With `auto` either side has the cheaper of the replicas from history and those from exact counts alone, as in training.
So the first evaluation takes two records.

Why both. On a record that it was found on, a plan also saves what is that record's noise, and the layers that move are
those in which it seems to save most. A record that it was not found on has no such noise; but where the load has just
jumped, replicas from history suit neither homes, and which of the two they suit less is chance. A plan that is better
in earnest saves on both.

Where they pay, they are by now a record behind a load that drifts. So the search goes on from them with the last
record. What it swaps besides must pay on that record, and the layer must still pay with the gain that was judged.

Example. 256 experts on 64 ranks of 8 nodes, A100 with PCIe links, hot experts spread evenly over the ranks. Priced on
the record that they were found on, other homes seemed to save 3.8 ms an iteration; on the 8 records after it they lost
2.2 ms, and all 12 experts moved back. On the first record that they had not been found on they lose 2.8 ms, and stay.

Alternatives: pricing on the records that homes were found on (above). Searching anew with the last record where homes
pay: what is moved to was never judged, and the search, which is greedy, ends elsewhere, up to 4% slower (docs/log.md).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from megatron_smartmoe.cost.moe_layer import LayerTime
from megatron_smartmoe.cost.replicas import TransferPrice
from megatron_smartmoe.placement.decisions import Candidate
from megatron_smartmoe.placement.fewer_transfers import homes_for_fewer_transfers
from megatron_smartmoe.placement.history import History
from megatron_smartmoe.placement.kernels import Kernels
from megatron_smartmoe.placement.layer_cost import PricedLayer, migration_s
from megatron_smartmoe.placement.online_options import OnlineOptions
from megatron_smartmoe.placement.plan_homes import plan_homes
from megatron_smartmoe.placement.plan_replicas import search_space
from megatron_smartmoe.placement.policy import PolicyOptions
from megatron_smartmoe.placement.replica_scope import cheapest_replicas
from megatron_smartmoe.placement.review import LayerSeconds
from megatron_smartmoe.spec.arrays import FloatArray, IntArray
from megatron_smartmoe.spec.placement import Placement


@dataclass(frozen=True, kw_only=True, eq=False)
class Known:
    """What other homes are found on.

    Attributes:
        history: of the records up to one of them.
        counts_LRE: that one.
    """

    history: History
    counts_LRE: IntArray


@dataclass(frozen=True, kw_only=True)
class Saved:
    """Seconds per iteration that other homes of a layer save, by what takes them."""

    compute_s: float
    traffic_s: float
    replicas_s: float

    @classmethod
    def of(cls, kept: LayerTime, found: LayerTime, micro_batches: int) -> Saved:
        """From the seconds of a micro-batch with the present homes and with the other ones."""
        traffic_s = [one.all_to_all_intra_s + one.all_to_all_inter_s + one.hidden_s for one in (kept, found)]
        replicas_s = [one.replicas_s + one.replicas_hidden_s for one in (kept, found)]
        total_s = [one.total_s for one in (kept, found)]
        traffic, replicas, total = (micro_batches * (one[0] - one[1]) for one in (traffic_s, replicas_s, total_s))
        return cls(compute_s=total - traffic - replicas, traffic_s=traffic, replicas_s=replicas)


@dataclass(frozen=True, kw_only=True, eq=False)
class LayerProposal:
    """The best homes found for one layer, and what moving there is worth.

    Attributes:
        layer: row of the layer in the placement.
        slots_RS: slots with better homes, or the present ones.
        gain_s: predicted seconds per iteration that they save, as judged (`of_layer`).
        cost_s: one-time seconds of the migration.
        experts: number of experts that would move to another rank.
        saved: the parts of the gain, where the cost model has parts.
    """

    layer: int
    slots_RS: IntArray
    gain_s: float
    cost_s: float
    experts: int
    saved: Saved | None = None

    def pays(self, options: PolicyOptions) -> bool:
        """Whether moving this layer's experts alone is worth it."""
        return bool(self.experts) and self.worth_s(options) > 0

    def worth_s(self, options: PolicyOptions) -> float:
        """Seconds that it saves over the horizon, beyond what it must."""
        return self.gain_s * options.horizon_iterations - self.cost_s * options.margin

    def candidate(self, *, chosen: bool) -> Candidate:
        """As it is logged."""
        saved = self.saved
        return Candidate(
            name=f"move {self.experts} experts of layer {self.layer + 1}",
            chosen=chosen,
            layer=self.layer,
            gain_s=self.gain_s,
            compute_s=None if saved is None else saved.compute_s,
            traffic_s=None if saved is None else saved.traffic_s,
            replicas_s=None if saved is None else saved.replicas_s,
            cost_s=self.cost_s,
        )


@dataclass(frozen=True, kw_only=True)
class OtherHomes:
    """Finds and prices other homes.

    Attributes:
        options: prices of homes and replicas.
        layer_seconds: cost model.
        kernels: what plans the replicas that both sides of a comparison have.
    """

    options: OnlineOptions
    layer_seconds: LayerSeconds
    kernels: Kernels

    def of_layer(self, layer: int, placement: Placement, earlier: Known, latest: Known) -> LayerProposal:
        """Other homes of a layer, and what they save beside the present ones, both with the replicas that training
        would give them.

        Args:
            layer: row of the layer in the placement.
            placement: the present one.
            earlier: all but the last record.
            latest: with the last record.
        """
        slots_RS, options = placement.slots_LRS[layer], self.options
        records = (latest.counts_LRE[layer], earlier.counts_LRE[layer])
        # Step 1: find other homes on the earlier records.
        kept_RS, found_RS = self._searched(layer, slots_RS, placement.home_slots, earlier)
        cost_s, experts = migration_of(slots_RS, found_RS, placement.home_slots, options)
        # Step 2: price both on the last record and on the one before it; the smaller gain counts.
        gain_s, saved = 0.0, None
        if experts:
            priced = [self._priced(kept_RS, found_RS, counts_RE) for counts_RE in records]
            gain_s, saved = min(priced, key=lambda each: each[0])
        found = LayerProposal(
            layer=layer, slots_RS=found_RS, gain_s=gain_s, cost_s=cost_s, experts=experts, saved=saved
        )
        # Step 3: where they pay, go on from them with the last record.
        if found.pays(options.policy):
            found = self._brought_up_to_date(found, slots_RS, placement.home_slots, latest)
        return replace(found, slots_RS=self._as_trained(found.slots_RS, records[0]))

    def _brought_up_to_date(
        self, judged: LayerProposal, slots_RS: IntArray, home_slots: int, latest: Known
    ) -> LayerProposal:
        """The judged homes, and the swaps that the last record adds to them where those pay.

        Args:
            judged: homes that were found without the last record.
            slots_RS: present slots.
            home_slots: columns of homes, E / R.
            latest: with the last record.
        """
        options = self.options
        kept_RS, found_RS = self._searched(judged.layer, judged.slots_RS, home_slots, latest)
        cost_s, experts = migration_of(slots_RS, found_RS, home_slots, options)
        moved = replace(judged, slots_RS=found_RS, cost_s=cost_s, experts=experts)
        _, added_experts = migration_of(judged.slots_RS, found_RS, home_slots, options)
        added_s, _ = self._priced(kept_RS, found_RS, latest.counts_LRE[judged.layer])
        added = replace(moved, gain_s=added_s, cost_s=cost_s - judged.cost_s, experts=added_experts)
        return moved if added.pays(options.policy) and moved.pays(options.policy) else judged

    def _searched(self, layer: int, slots_RS: IntArray, home_slots: int, known: Known) -> tuple[IntArray, IntArray]:
        """Slots with the given homes and with better ones, or the given ones again; their replicas from history, or
        none yet where they are planned for the exact counts of a record."""
        if self.options.replicas == "exact":
            forecast_E = known.history.forecast_LE()[layer]
            return slots_RS, plan_homes(slots_RS, forecast_E, home_slots, self.options.homes).slots_RS
        tokens = int(known.counts_LRE[layer].sum()) * self.options.micro_batches / len(slots_RS)
        return self._from_history(slots_RS, known.history.scenarios_KE(layer), home_slots, tokens)

    def _as_trained(self, slots_RS: IntArray, counts_RE: IntArray) -> IntArray:
        """Slots that `_searched` found, with the replicas of a record that are planned for its exact counts, if any."""
        if self.options.replicas != "exact":
            return slots_RS
        return self._exact(slots_RS, counts_RE, self.options.replica.price)

    def _exact(self, slots_RS: IntArray, counts_RE: IntArray, price: TransferPrice) -> IntArray:
        """Slots with the same homes and replicas for exactly these counts."""
        load_E, home_slots = counts_RE.sum(axis=0), counts_RE.shape[1] // len(slots_RS)
        return self.kernels.exact_plan(load_E, slots_RS, home_slots, self.options.exact_plan(price)).slots_RS

    def _from_history(
        self, slots_RS: IntArray, scenarios_KE: FloatArray, home_slots: int, tokens: float
    ) -> tuple[IntArray, IntArray]:
        """Slots with the given homes and with better ones, or the given ones again; replicas from history.

        Args:
            slots_RS: slots to start from.
            scenarios_KE: loads to plan for.
            home_slots: columns of homes, E / R.
            tokens: of a rank in an iteration, mean.
        """
        options, kernels, spare_slots = self.options, self.kernels, slots_RS.shape[1] - home_slots
        given = (scenarios_KE, home_slots, options.replica, tokens, kernels)
        # Step 1: swap homes on the forecast.
        plan = plan_homes(slots_RS, scenarios_KE[0], home_slots, options.homes)
        kept = cheapest_replicas(slots_RS, *given)
        if plan.swaps:
            return kept.slots_RS, cheapest_replicas(plan.slots_RS, *given).slots_RS
        if not self._may_swap_anywhere:
            return kept.slots_RS, kept.slots_RS
        if spare_slots and kept.excess > options.replica.good_enough:
            # Step 2: no swap between units pays, and replicas alone do not balance: also search for swaps within nodes.
            space = replace(search_space(len(slots_RS), home_slots, options.replica), move_homes=True)
            prices = replace(options.replica.objective, home_price=options.homes.swap_price / 2)
            return kept.slots_RS, kernels.improve(kept.slots_RS, scenarios_KE, prices, space).slots_RS
        # Step 3: replicas balance the layer: other homes may need fewer transfers for it.
        load_E = np.rint(scenarios_KE[0] * tokens * len(slots_RS)).astype(np.int64)
        fewer_RS = homes_for_fewer_transfers(kept.slots_RS, load_E, home_slots, options.replica, kernels)
        found_RS = kept.slots_RS if fewer_RS is None else cheapest_replicas(fewer_RS, *given).slots_RS
        return kept.slots_RS, found_RS

    def _priced(self, kept_RS: IntArray, found_RS: IntArray, counts_RE: IntArray) -> tuple[float, Saved | None]:
        """Seconds per iteration that other slots save on a record, and their parts where the cost model has parts."""
        micro_batches = self.options.micro_batches
        kept_RS, found_RS = self._as_trained(kept_RS, counts_RE), self._as_trained(found_RS, counts_RE)
        if not isinstance(self.layer_seconds, PricedLayer):
            gain_s = self.layer_seconds(kept_RS, counts_RE) - self.layer_seconds(found_RS, counts_RE)
            return gain_s * micro_batches, None
        kept, found = (self._terms(each_RS, counts_RE, self.layer_seconds) for each_RS in (kept_RS, found_RS))
        return (kept.total_s - found.total_s) * micro_batches, Saved.of(kept, found, micro_batches)

    def _terms(self, slots_RS: IntArray, counts_RE: IntArray, layer: PricedLayer) -> LayerTime:
        """Time of a micro-batch; with `auto` with replicas from exact counts alone where that is less."""
        terms = layer.terms(slots_RS, counts_RE)
        if layer.alone is None:
            return terms
        exact_RS = self._exact(slots_RS, counts_RE, self.options.exact_price)
        return min(terms, PricedLayer(pricing=layer.alone).terms(exact_RS, counts_RE), key=lambda each: each.total_s)

    @property
    def _may_swap_anywhere(self) -> bool:
        """Whether a swap within the part of the group that replicas stay in keeps the routing's groups whole."""
        homes, replica = self.options.homes, self.options.replica
        return homes.num_groups == 1 or replica.num_nodes == homes.num_nodes


def migration_of(before_RS: IntArray, after_RS: IntArray, home_slots: int, options: OnlineOptions) -> tuple[float, int]:
    """Seconds until the busiest rank has sent and received its experts' state, and how many experts move.

    Args:
        before_RS: slots of a layer.
        after_RS: the same after the move.
        home_slots: columns of homes, E / R.
        options: what a move costs.
    """
    before_E = np.argsort(before_RS[:, :home_slots].ravel()) // home_slots
    after_E = np.argsort(after_RS[:, :home_slots].ravel()) // home_slots
    cost_s = migration_s(before_E, after_E, len(before_RS), options.state_bytes, options.migration_bytes_s)
    return cost_s, int((before_E != after_E).sum())
