"""The slow loop as training and the simulator share it: whether homes move, decided from history.

`HomesPlanner` sees the counts of all ranks: homes are the same in every expert-parallel group, because the optimizer
state of an expert is shared by the groups. `replica_planner.ReplicaPlanner` sees one group's counts and micro-batches:
replicas are filled anew in every iteration, so every group may have its own. Both are functions of the counts they were
given; neither uses a clock, a process group or a device.

When an evaluation is due, other homes of each layer are found and priced (`other_homes.py`). The layers in which a move
pays move together, if the policy allows it (`policy.py`), and the move is reviewed on the records that follow
(`review.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_smartmoe.errors import PlanError
from megatron_smartmoe.placement.decisions import (
    MOST_CANDIDATES,
    MOST_FORECASTS,
    Candidate,
    Decision,
    Forecast,
    digest_of,
)
from megatron_smartmoe.placement.history import History
from megatron_smartmoe.placement.kernels import NUMPY, Kernels
from megatron_smartmoe.placement.online_options import OnlineOptions
from megatron_smartmoe.placement.other_homes import Known, LayerProposal, OtherHomes, migration_of
from megatron_smartmoe.placement.policy import Policy
from megatron_smartmoe.placement.review import LayerSeconds, MoveReview
from megatron_smartmoe.spec.arrays import IntArray
from megatron_smartmoe.spec.placement import Placement

NEVER = -1  # in a saved state: the iteration of what has not happened yet


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
        self._earlier: Known | None = None  # None until there are two records
        self._counts_LRE: IntArray | None = None
        self._last_evaluation: int | None = None
        self._move: MoveReview | None = None

    def observe(self, counts_LRE: IntArray) -> None:
        """Add the counts of one iteration: by source rank of a group, mean over groups and micro-batches."""
        if self._counts_LRE is not None:
            self._earlier = Known(history=self.history.copy(), counts_LRE=self._counts_LRE)
        self._counts_LRE = counts_LRE
        self.history.update(counts_LRE.sum(axis=1)[:, None])
        if self._move is not None:
            self._move.observe(counts_LRE)

    def state(self) -> dict[str, NDArray[Any]]:
        """All that the next decisions depend on besides the options."""
        state = {f"history_{name}": array for name, array in self.history.state().items()}
        last = [self._last_evaluation, self.policy.last_taken]
        state["policy"] = np.array([self.policy.losses, *(NEVER if one is None else one for one in last)])
        state["policy_wrong_s"] = np.array([self.policy.wrong_s])
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
                record; then no evaluation is due before another record was observed. Nor does it say how wrong losing
                moves were; then the next one waits for its cooldown.
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
        self.policy.wrong_s = float(state["policy_wrong_s"][0]) if "policy_wrong_s" in state else np.inf
        self.policy.last_taken = None if last_taken == NEVER else last_taken
        self._last_evaluation = None if last_evaluation == NEVER else last_evaluation
        self._counts_LRE, self._earlier, self._move = counts_LRE, earlier, move

    def _restored_earlier(self, state: Mapping[str, NDArray[Any]], placement: Placement) -> Known | None:
        counts_LRE = _restored_counts(state, "earlier_counts_LRE", placement)
        if counts_LRE is None:
            return None
        history = History(self.history.num_layers, self.history.num_experts, self.history.options)
        history.restore(_part(state, "earlier_"))
        return Known(history=history, counts_LRE=counts_LRE)

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
        counts_LRE, earlier = self._counts_LRE, self._earlier
        assert counts_LRE is not None, "observe two records before you propose"
        assert earlier is not None, "observe two records before you propose"
        self._last_evaluation = iteration
        # Step 1: better homes for each layer on its own, and what they are worth.
        other = OtherHomes(options=self.options, layer_seconds=self.layer_seconds, kernels=self._kernels)
        latest = Known(history=self.history, counts_LRE=counts_LRE)
        found = [other.of_layer(layer, placement, earlier, latest) for layer in range(placement.num_layers)]
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
            inputs=digest_of(placement.slots_LRS, counts_LRE, earlier.history.forecast_LE()),
            before=placement.digest,
            after=proposal.digest,
            taken=verdict.take,
            why=verdict.why,
            changes=placement.diff(proposal),
            predicted_gain_s=verdict.gain_s,
            cost_s=verdict.cost_s,
            moved_bytes=sum(each.experts for each in chosen) * self.options.state_bytes if verdict.take else 0,
            candidates=self._candidates(found, chosen),
            forecast=_forecast(earlier.history, chosen),
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

    def review(self, iteration: int, placement: Placement) -> tuple[Placement, Decision] | None:
        """Review the last move of homes when enough records have followed it; returns the placement and the verdict.

        Args:
            iteration: before which the verdict takes effect.
            placement: the present slots.
        """
        move = self._move
        if move is None or not move.ready:
            return None
        self._move = None
        replicas = self.options.exact_plan(self.options.replica.price)
        per_micro_batch = move.gain_s(self.layer_seconds, replicas, self._kernels)
        gain_s, iteration_s = (seconds * self.options.micro_batches for seconds in per_micro_batch)
        proposal = move.reverted(placement, self.options.replica.kept_nodes)
        pairs = zip(placement.slots_LRS, proposal.slots_LRS, strict=True)
        layers = [migration_of(*pair, placement.home_slots, self.options) for pair in pairs]
        cost_s, moved = sum(cost_s for cost_s, _ in layers), sum(experts for _, experts in layers)
        verdict = self.policy.realised(iteration_s, gain_s, cost_s, iteration, move.predicted_gain_s)
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
