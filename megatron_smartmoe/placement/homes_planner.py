"""The slow loop as training and the simulator share it: whether homes move, decided from history.

`HomesPlanner` sees the counts of all ranks: homes are the same in every expert-parallel group, because the optimizer
state of an expert is shared by the groups. `replica_planner.ReplicaPlanner` sees one group's counts and micro-batches:
replicas are filled anew in every iteration, so every group may have its own. Both are functions of the counts they were
given; neither uses a clock, a process group or a device.

Method. Other homes of a layer are searched for on the history as it was before the last record, with replicas planned
from it as training would have planned them for the last record. They are worth what they would have saved on the last
record, which they were not found on, and no more than on the record before it, the last one that they were found on.
With `auto` either side has the cheaper of the replicas from history and those from exact counts alone, as in training.
So the first evaluation takes two records.

Why both. On a record that it was found on, a plan also saves what is that record's noise, and the layers that move are
those in which it seems to save most. A record that it was not found on has no such noise; but where the load has just
jumped, replicas from history suit neither homes, and which of the two they suit less is chance. A plan that is better
in earnest saves on both.

Example. 256 experts on 64 ranks of 8 nodes, A100 with PCIe links, hot experts spread evenly over the ranks. Priced on
the record that they were found on, other homes seemed to save 3.8 ms an iteration; on the 8 records after it they lost
2.2 ms, and all 12 experts moved back. On the first record that they had not been found on they lose 2.8 ms, and stay.

Alternatives: pricing on the records that homes were found on (above). Searching once more with the last record where
homes pay, and moving to those: 0.4% faster where loads drift, but what is moved to was never judged, and the search,
which is greedy, ends elsewhere (docs/log.md).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from megatron_smartmoe.cost.moe_layer import LayerTime
from megatron_smartmoe.cost.replicas import FREE_TRANSFERS, TransferPrice
from megatron_smartmoe.errors import PlanError
from megatron_smartmoe.placement.decisions import (
    MOST_CANDIDATES,
    MOST_FORECASTS,
    Candidate,
    Decision,
    Forecast,
    digest_of,
)
from megatron_smartmoe.placement.fewer_transfers import homes_for_fewer_transfers
from megatron_smartmoe.placement.history import History, HistoryOptions
from megatron_smartmoe.placement.kernels import NUMPY, Kernels
from megatron_smartmoe.placement.layer_cost import PricedLayer, migration_s
from megatron_smartmoe.placement.plan_homes import HomesOptions, plan_homes
from megatron_smartmoe.placement.plan_replicas import ReplicaOptions, search_space
from megatron_smartmoe.placement.policy import Policy, PolicyOptions
from megatron_smartmoe.placement.replica_scope import cheapest_exact_replicas, cheapest_replicas
from megatron_smartmoe.placement.review import LayerSeconds, MoveReview
from megatron_smartmoe.spec.arrays import FloatArray, IntArray
from megatron_smartmoe.spec.placement import Placement

ReplicaMode = Literal["history", "exact", "auto"]
NEVER = -1  # in a saved state: the iteration of what has not happened yet


@dataclass(frozen=True, kw_only=True)
class OnlineOptions:
    """All options of the online phase.

    Attributes:
        homes_interval: homes are re-evaluated every so many iterations; 0 never moves them.
        first_evaluation: iteration before which homes are left alone.
        replicas: `history`: replicas are planned from earlier iterations, before this one begins; `exact`: from each
            micro-batch's own counts; `auto`: from history, and again from the counts of a micro-batch for a layer that
            the replicas from history leave too unbalanced.
        micro_batches: per iteration; what a gain per micro-batch is multiplied with.
        state_bytes: bytes of one expert's weights, main weights and moments.
        migration_bytes_s: bandwidth of a rank while experts move.
        homes: prices of swaps.
        replica: prices and effort of replicas.
        history: how much is remembered; None chooses by the number of ranks.
        auto_limit: the max / mean above which a layer's replicas are planned from a micro-batch's counts: with `exact`
            that of the homes alone, with `auto` that of the replicas from history.
        exact_price: with `auto`, the price of replicas that are planned anew for one micro-batch; that of `replica` is
            for the iteration.
        policy: when a plan is worth its cost.
        review_records: iterations after a move of homes on whose counts it is reviewed.
    """

    homes_interval: int = 100
    first_evaluation: int = 0
    replicas: ReplicaMode = "auto"
    micro_batches: int = 1
    state_bytes: int = 0
    migration_bytes_s: float = 25e9
    homes: HomesOptions = field(default_factory=HomesOptions)
    replica: ReplicaOptions = field(default_factory=ReplicaOptions)
    history: HistoryOptions | None = None
    auto_limit: float = 1.01
    exact_price: TransferPrice = FREE_TRANSFERS
    policy: PolicyOptions = field(default_factory=PolicyOptions)
    review_records: int = 8


@dataclass(frozen=True, kw_only=True, eq=False)
class _Seen:
    """What homes are found on.

    Attributes:
        history: of all records before the last one.
        counts_LRE: the latest of them.
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
        gain_s: predicted seconds per iteration that they save.
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


class HomesPlanner:
    """The slow loop: `observe` every iteration; when `due`, `propose`; after a move, `review` it.

    Args:
        num_layers: L.
        num_experts: E.
        options: intervals, prices and policy.
        layer_seconds: cost model: seconds of a layer with given slots and one micro-batch's counts.
        kernels: what plans the replicas that both sides of a comparison have.
    """

    def __init__(
        self,
        num_layers: int,
        num_experts: int,
        options: OnlineOptions,
        layer_seconds: LayerSeconds,
        kernels: Kernels = NUMPY,
    ) -> None:
        self.options, self.layer_seconds, self._kernels = options, layer_seconds, kernels
        self.history = History(num_layers, num_experts, options.history)
        self.policy = Policy(options.policy)
        self._earlier: _Seen | None = None  # None until there are two records
        self._counts_LRE: IntArray | None = None
        self._last_evaluation: int | None = None
        self._move: MoveReview | None = None

    def observe(self, counts_LRE: IntArray) -> None:
        """Add the counts of one iteration: by source rank of a group, mean over groups and micro-batches."""
        if self._counts_LRE is not None:
            self._earlier = _Seen(history=self.history.copy(), counts_LRE=self._counts_LRE)
        self._counts_LRE = counts_LRE
        self.history.update(counts_LRE.sum(axis=1)[:, None])
        if self._move is not None:
            self._move.observe(counts_LRE)

    def state(self) -> dict[str, NDArray[Any]]:
        """All that the next decisions depend on besides the options."""
        state = {f"history_{name}": array for name, array in self.history.state().items()}
        last = [self._last_evaluation, self.policy.last_taken]
        state["policy"] = np.array([self.policy.losses, *(NEVER if one is None else one for one in last)])
        if self._counts_LRE is not None:
            state["counts_LRE"] = self._counts_LRE
        if self._earlier is not None:
            state |= {f"earlier_{name}": array for name, array in self._earlier.history.state().items()}
            state["earlier_counts_LRE"] = self._earlier.counts_LRE
        if self._move is not None:
            move = self._move
            state["move_before_LRS"], state["move_after_LRS"] = move.before.slots_LRS, move.after.slots_LRS
            state["move_gain_s"] = np.array([move.predicted_gain_s])
            state |= {f"move_counts_{age}_LRE": counts_LRE for age, counts_LRE in enumerate(move.counts)}
        return state

    def restore(self, state: Mapping[str, NDArray[Any]], placement: Placement) -> None:
        """Continue from what `state` gave, for the same layers, ranks and options.

        Args:
            state: as `state` gave it. One that an older version saved says nothing of the history before the last
                record; then no evaluation is due before another record was observed.
            placement: the present one.

        Raises:
            PlanError: it is of another shape, or incomplete.
        """
        if "policy" not in state or state["policy"].shape != (3,):
            raise PlanError("the saved state of the homes has no policy")
        counts_LRE = _restored_counts(state, "counts_LRE", placement)
        move, earlier = self._restored_move(state, placement), self._restored_earlier(state, placement)
        self.history.restore(_part(state, "history_"))
        losses, last_evaluation, last_taken = (int(one) for one in state["policy"])
        self.policy.losses = losses
        self.policy.last_taken = None if last_taken == NEVER else last_taken
        self._last_evaluation = None if last_evaluation == NEVER else last_evaluation
        self._counts_LRE, self._earlier, self._move = counts_LRE, earlier, move

    def _restored_earlier(self, state: Mapping[str, NDArray[Any]], placement: Placement) -> _Seen | None:
        counts_LRE = _restored_counts(state, "earlier_counts_LRE", placement)
        if counts_LRE is None:
            return None
        history = History(self.history.num_layers, self.history.num_experts, self.history.options)
        history.restore(_part(state, "earlier_"))
        return _Seen(history=history, counts_LRE=counts_LRE)

    def _restored_move(self, state: Mapping[str, NDArray[Any]], placement: Placement) -> MoveReview | None:
        if "move_gain_s" not in state:
            return None
        slots = [state.get(f"move_{when}_LRS", np.zeros(0, np.int64)) for when in ("before", "after")]
        if any(one.shape != placement.slots_LRS.shape for one in slots):
            raise PlanError(f"the saved move has slots {slots[0].shape}: must be {placement.slots_LRS.shape}")
        before, after = (replace(placement, slots_LRS=one) for one in slots)
        move = MoveReview(before, after, float(state["move_gain_s"][0]), self.options.review_records)
        for age in range(self.options.review_records):
            if (counts_LRE := state.get(f"move_counts_{age}_LRE")) is not None:
                move.observe(counts_LRE.astype(np.int64))
        return move

    def due(self, iteration: int) -> bool:
        """Whether the homes are to be re-evaluated; never before the second record, or while a move is under review."""
        interval = self.options.homes_interval
        if not interval or self._earlier is None or self._move is not None:
            return False
        if iteration < self.options.first_evaluation:
            return False
        return self._last_evaluation is None or iteration - self._last_evaluation >= interval

    def propose(self, iteration: int, placement: Placement) -> tuple[Placement, Decision] | None:
        """Re-evaluate the homes; the proposal and its verdict, or None when no layer has better homes.

        The proposal consists of the layers whose move pays by itself. When none does, it consists of all layers with
        better homes, so that the verdict says why they stay as they are.
        """
        assert self._counts_LRE is not None, "observe two records before you propose"
        assert self._earlier is not None, "observe two records before you propose"
        self._last_evaluation = iteration
        # Step 1: better homes for each layer on its own, and what they are worth.
        found = [self._layer_proposal(layer, placement) for layer in range(placement.num_layers)]
        # Step 2: keep the layers that pay.
        paying = [each for each in found if each.pays(self.options.policy)]
        chosen = paying or [each for each in found if each.experts]
        if not chosen:
            return None
        proposed_LRS = placement.slots_LRS.copy()
        for each in chosen:
            proposed_LRS[each.layer] = each.slots_RS
        proposal = replace(placement, slots_LRS=proposed_LRS)
        # Step 3: judge them together.
        gain_s, cost_s = sum(each.gain_s for each in chosen), sum(each.cost_s for each in chosen)
        verdict = self.policy.judge(iteration, gain_s, cost_s)
        if verdict.take:
            self._move = MoveReview(placement, proposal, gain_s, self.options.review_records)
        decision = Decision(
            iteration=iteration,
            kind="homes",
            group=-1,
            inputs=digest_of(placement.slots_LRS, self._counts_LRE, self._earlier.history.forecast_LE()),
            before=placement.digest,
            after=proposal.digest,
            taken=verdict.take,
            why=verdict.why,
            changes=placement.diff(proposal),
            predicted_gain_s=verdict.gain_s,
            cost_s=verdict.cost_s,
            moved_bytes=sum(each.experts for each in chosen) * self.options.state_bytes if verdict.take else 0,
            candidates=self._candidates(found, chosen),
            forecast=_forecast(self._earlier.history, chosen),
            horizon_iterations=self.options.policy.horizon_iterations,
            margin=self.options.policy.margin,
        )
        return proposal, decision

    def _candidates(self, found: Sequence[LayerProposal], chosen: Sequence[LayerProposal]) -> tuple[Candidate, ...]:
        """The best of the proposals, those that were chosen first; the last place is the best other's, if any."""
        policy = self.options.policy
        best = sorted((each for each in found if each.experts), key=lambda each: each.worth_s(policy), reverse=True)
        taken = [each for each in best if each in chosen]
        others = [each for each in best if each not in chosen]
        first = taken[: MOST_CANDIDATES - bool(others)]
        shown = [*first, *others[: MOST_CANDIDATES - len(first)]]
        return tuple(each.candidate(chosen=each in chosen) for each in shown)

    def abandon(self) -> None:
        """Forget the move that `propose` wanted: it could not be carried out."""
        self._move = None

    def review(
        self, iteration: int, placement: Placement, gain_s: float | None = None
    ) -> tuple[Placement, Decision] | None:
        """Review the last move of homes when enough records have followed it; returns the placement and the verdict.

        Args:
            iteration: before which the verdict takes effect.
            placement: the present slots.
            gain_s: measured seconds per iteration that the move saves; with None the cost model compares both homes on
                the counts that were observed since.
        """
        move = self._move
        if move is None or not move.ready:
            return None
        self._move = None
        modelled_s, layers_s = move.gain_s(self.layer_seconds, self.options.replica.num_nodes, self._kernels)
        gain_s = modelled_s * self.options.micro_batches if gain_s is None else gain_s
        iteration_s = layers_s * self.options.micro_batches
        proposal = move.reverted(placement, self.options.replica.kept_nodes)
        pairs = zip(placement.slots_LRS, proposal.slots_LRS, strict=True)
        layers = [self._migration(*pair, placement.home_slots) for pair in pairs]
        cost_s, moved = sum(cost_s for cost_s, _ in layers), sum(experts for _, experts in layers)
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
            candidates=(
                Candidate(name="keep the new homes", chosen=verdict.take, gain_s=0.0, cost_s=0.0),
                Candidate(name="move the experts back", chosen=not verdict.take, gain_s=-gain_s, cost_s=cost_s),
            ),
            horizon_iterations=self.options.policy.horizon_iterations,
            margin=self.options.policy.margin,
        )

    def _layer_proposal(self, layer: int, placement: Placement) -> LayerProposal:
        """Better homes for one layer, and what they save beside the present ones, both with the replicas that training
        would give them."""
        assert self._counts_LRE is not None
        assert self._earlier is not None
        slots_RS, home_slots, options = placement.slots_LRS[layer], placement.home_slots, self.options
        records = (self._counts_LRE[layer], self._earlier.counts_LRE[layer])
        # Step 1: find other homes on the earlier records, and plan replicas for both: exact ones for each record.
        if options.replicas == "exact":
            forecast_E = self._earlier.history.forecast_LE()[layer]
            homes_RS = plan_homes(slots_RS, forecast_E, home_slots, options.homes).slots_RS
            price = options.replica.price
            pairs = [
                (self._exact(slots_RS, counts_RE, price), self._exact(homes_RS, counts_RE, price))
                for counts_RE in records
            ]
        else:
            scenarios_KE = self._earlier.history.scenarios_KE(layer)
            tokens = int(records[1].sum()) * options.micro_batches / placement.num_ranks
            pairs = [self._from_history(slots_RS, scenarios_KE, home_slots, tokens)] * len(records)
        found_RS = pairs[0][1]
        cost_s, experts = self._migration(slots_RS, found_RS, home_slots)
        # Step 2: price both on the last record and on the one before it; the smaller gain counts.
        gain_s, saved = 0.0, None
        if experts:
            priced = [self._priced(*pair, counts_RE) for pair, counts_RE in zip(pairs, records, strict=True)]
            gain_s, saved = min(priced, key=lambda each: each[0])
        return LayerProposal(layer=layer, slots_RS=found_RS, gain_s=gain_s, cost_s=cost_s, experts=experts, saved=saved)

    def _exact(self, slots_RS: IntArray, counts_RE: IntArray, price: TransferPrice) -> IntArray:
        """Slots with the same homes and replicas for exactly these counts."""
        replica = self.options.replica
        return cheapest_exact_replicas(
            counts_RE.sum(axis=0),
            slots_RS,
            counts_RE.shape[1] // len(slots_RS),
            num_nodes=replica.num_nodes,
            or_group=replica.or_group,
            price=price,
            limit=self.options.auto_limit,
            kernels=self._kernels,
        )

    def _from_history(
        self, slots_RS: IntArray, scenarios_KE: FloatArray, home_slots: int, tokens: float
    ) -> tuple[IntArray, IntArray]:
        """Slots with the present homes and with better ones, or the present ones again; replicas from history.

        Args:
            slots_RS: present slots.
            scenarios_KE: loads to plan for.
            home_slots: columns of homes, E / R.
            tokens: of a rank in an iteration, mean.
        """
        options, kernels, spare_slots = self.options, self._kernels, slots_RS.shape[1] - home_slots
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

    def _migration(self, before_RS: IntArray, after_RS: IntArray, home_slots: int) -> tuple[float, int]:
        """Seconds until the busiest rank has sent and received its experts' state, and how many experts move."""
        before_E = np.argsort(before_RS[:, :home_slots].ravel()) // home_slots
        after_E = np.argsort(after_RS[:, :home_slots].ravel()) // home_slots
        options = self.options
        cost_s = migration_s(before_E, after_E, len(before_RS), options.state_bytes, options.migration_bytes_s)
        return cost_s, int((before_E != after_E).sum())


def _forecast(history: History, chosen: Sequence[LayerProposal]) -> tuple[Forecast, ...]:
    """Of the layers that would save most, as they were planned for."""
    best = sorted(chosen, key=lambda each: each.gain_s, reverse=True)[:MOST_FORECASTS]
    share_LE, error_L = history.forecast_LE(), history.forecast_error_L
    return tuple(Forecast.of(each.layer, error_L[each.layer], share_LE[each.layer]) for each in best)


def _part(state: Mapping[str, NDArray[Any]], prefix: str) -> dict[str, NDArray[Any]]:
    """The arrays whose names begin with a prefix, without it."""
    return {name.removeprefix(prefix): array for name, array in state.items() if name.startswith(prefix)}


def _restored_counts(state: Mapping[str, NDArray[Any]], name: str, placement: Placement) -> IntArray | None:
    sizes = (placement.num_layers, placement.num_ranks, placement.num_experts)
    if name not in state:
        return None
    if state[name].shape != sizes:
        raise PlanError(f"{name} of the saved homes is {state[name].shape}: must be {sizes}")
    return state[name].astype(np.int64)
