"""Physical slots: replicas for every dispatcher of Megatron's, which need not know what a replica is.

A replica is one more expert in one more place. Between the router and the dispatcher the router's choices [T, E], which
are logical, become choices of physical slots [T, R x (S + K)]: slot s of rank r is column r x (S + K) + s, home slots
first. Which copy of its expert a token goes to follows from the split of the micro-batch (`runtime.replicas.split`) and
the token's place among its rank's tokens for that expert. The dispatcher is Megatron's own, built for that many
experts: it permutes, sends and combines as it always does, and the experts of a rank get S + K groups of rows.

    router          probs, map [T, E]            logical experts: losses, bias, dropping and counts end here
    PhysicalSlots   probs, map [T, R x (S + K)]
    dispatcher      allgather, all-to-all, flex
    experts         rows sorted by slot, tokens of each: [S + K]; [S] where no rank has a replica (`with_slots`)

The router, its losses, its bias, checkpoints and homes keep their E logical experts. Our own all-to-all
(`replica_dispatcher`) does the same split inside its permutation, without these wide maps; it is used where it can be.

Dropping by capacity is the router's: it drops from logical experts, before the split, so the tokens that are dropped do
not depend on replicas. With padding to capacity every physical slot is padded to the capacity of an expert: a rank
computes (S + K) / S times the rows that it would compute without spare slots.
"""

from __future__ import annotations

import copy
import functools
import math
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.moe.moe_utils import get_capacity
from megatron.core.transformer.moe.token_dispatcher import MoETokenDispatcher
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_smartmoe.adapter.moe.replica_steps import LEFT_BY_GRAPH, ReplicaSteps
from megatron_smartmoe.adapter.moe.routers import without_padding
from megatron_smartmoe.ops import chosen_experts, dispatch_map
from megatron_smartmoe.runtime.replicas.dispatch_plan import DispatchPlan
from megatron_smartmoe.runtime.replicas.layer_planner import LayerPlanner, StartedPlan
from megatron_smartmoe.runtime.replicas.split import slot_of_device_rows, slot_of_rows


class PhysicalSlots:
    """Turns the router's choices of experts into choices of physical slots.

    Args:
        config: the transformer's configuration.
        planner: plans each micro-batch of the layer.
    """

    def __init__(self, config: TransformerConfig, planner: LayerPlanner) -> None:
        self._planner, self._top_k = planner, config.moe_router_topk
        self.num_slots = planner.view.num_ranks * planner.view.num_slots
        self.config = _config_of_slots(config, self.num_slots)

    def translate(
        self, probs_TE: torch.Tensor, routing_map_TE: torch.Tensor, slot_of_expert_E: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The router's choices as choices of slots. All ranks of the group call it; the host waits for their counts.

        Args:
            probs_TE: the router's probabilities.
            routing_map_TE: which experts each token chose, bool; with padding to capacity also what pads an expert,
                with probability 0.
            slot_of_expert_E: the home slot of each logical expert.

        Returns:
            Probabilities and map by physical slot, `[T, R x (S + K)]` each.
        """
        started, rows_TK, weights_TK = self.start(probs_TE, routing_map_TE, slot_of_expert_E)
        return self.maps(weights_TK, self.slots_of(rows_TK, self._planner.finish(started)))

    def start(
        self, probs_TE: torch.Tensor, routing_map_TE: torch.Tensor, slot_of_expert_E: torch.Tensor
    ) -> tuple[StartedPlan, torch.Tensor, torch.Tensor]:
        """The plan, of which the host has read nothing yet, and rows and weights of the choices, `[T, K_top]` each.

        Args:
            probs_TE: see `translate`.
            routing_map_TE: see `translate`.
            slot_of_expert_E: see `translate`.
        """
        if self.config.moe_pad_expert_input_to_capacity:
            routing_map_TE = without_padding(probs_TE, routing_map_TE)
        # the place of every choice among its rank's tokens, by home slot, then token
        ids_TK, weights_TK = chosen_experts(routing_map_TE, probs_TE, self._top_k)
        rows_TK, tokens_E = dispatch_map(ids_TK, slot_of_expert_E, slot_of_expert_E.numel())
        return self._planner.start(tokens_E), rows_TK, weights_TK

    def slots_of(self, rows_TK: torch.Tensor, plan: DispatchPlan) -> torch.Tensor:
        """The slot of every choice, from a plan that the host knows; see `slot_of_rows`."""
        return slot_of_rows(rows_TK, plan.segments_2N, plan.slots_RS, plan.num_rows)

    def maps(self, weights_TK: torch.Tensor, slot_TK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Probabilities and map by physical slot, `[T, R x (S + K)]` each.

        Args:
            weights_TK: the probability of every choice.
            slot_TK: its slot; the number of all slots where it was dropped.
        """
        wide = weights_TK.new_zeros(len(slot_TK), self.num_slots + 1)  # the last column takes what was dropped
        chosen = torch.zeros_like(wide, dtype=torch.bool).scatter(1, slot_TK, True)
        probs_TS = wide.scatter(1, slot_TK, weights_TK)[:, :-1].contiguous()
        return probs_TS, self._padded(chosen[:, :-1].contiguous())

    def _padded(self, routing_map_TS: torch.Tensor) -> torch.Tensor:
        """The map with every slot filled up to its capacity by tokens that did not choose it; their weight is 0."""
        config = self.config
        if not config.moe_pad_expert_input_to_capacity:
            return routing_map_TS
        choices = len(routing_map_TS) * self._top_k
        capacity = get_capacity(choices, self.num_slots, config.moe_expert_capacity_factor)
        _, token_CS = torch.topk(routing_map_TS.int(), k=capacity, dim=0, sorted=False)
        return torch.zeros_like(routing_map_TS).scatter(0, token_CS, True)

    def dispatcher(self, built: MoETokenDispatcher, groups: Any) -> MoETokenDispatcher:
        """A dispatcher of the same kind as `built`, for the physical slots.

        Args:
            built: what Megatron has built for logical experts.
            groups: the layer's process groups.
        """
        view = self._planner.view
        first = view.rank * view.num_slots
        indices = list(range(first, first + view.num_slots))
        kind = with_slots(type(built))  # type: ignore[arg-type]
        dispatcher: MoETokenDispatcher = kind(view.num_slots, indices, config=self.config, pg_collection=groups)
        dispatcher.planner, dispatcher.slots = self._planner, self
        dispatcher.cudagraph_attrs += LEFT_BY_GRAPH
        return dispatcher


def _config_of_slots(config: TransformerConfig, num_slots: int) -> TransformerConfig:
    """The configuration for a dispatcher of physical slots, and for nothing else."""
    view = copy.copy(config)
    view.num_moe_experts = num_slots
    if config.moe_expert_capacity_factor is not None:
        view.moe_expert_capacity_factor = _CapacityFactor(config, num_slots)
    return view


class _CapacityFactor(float):
    """A capacity factor that gives a slot the capacity of an expert, to the row.

    Megatron's `get_capacity` rounds (choices / slots) x factor up. With the factor scaled by slots / experts the two
    roundings of floats could differ from those of choices / experts, and a slot would have a row more than the router
    keeps for an expert, or a row less. So the product is made in the order in which the router makes it.

    Args:
        config: the transformer's configuration.
        num_slots: the physical slots.
    """

    def __new__(cls, config: TransformerConfig, num_slots: int) -> _CapacityFactor:
        factor = super().__new__(cls, config.moe_expert_capacity_factor * num_slots / config.num_moe_experts)
        factor._of_expert, factor._num_experts = config.moe_expert_capacity_factor, config.num_moe_experts
        factor._num_slots = num_slots
        return factor

    _of_expert: float
    _num_experts: int
    _num_slots: int

    def __rmul__(self, choices_per_slot: float) -> float:
        choices = choices_per_slot * self._num_slots
        whole = round(choices)
        choices = whole if math.isclose(choices, whole, rel_tol=1e-12) else choices
        return choices / self._num_experts * self._of_expert


class _ForSlots(ReplicaSteps):
    """What a dispatcher of physical slots does besides: it turns choices of experts into choices of slots, and hands no
    rows of empty slots to the experts.

    Attributes:
        slots: how.
        slot_of_expert_E: the home slot of each logical expert, on the device; the layer sets it before each dispatch.
    """

    slots: PhysicalSlots
    slot_of_expert_E: torch.Tensor
    _empty_rows = 0  # rows of spare slots without an expert, from `dispatch_postprocess` to `combine_preprocess`

    def dispatch_preprocess(self, hidden_states: torch.Tensor, routing_map: torch.Tensor, probs: torch.Tensor) -> Any:
        """Megatron's, on the columns of the slots.

        Args:
            hidden_states: `[..., H]`, T tokens.
            routing_map: which logical experts each token chose, bool `[T, E]`.
            probs: their weights, `[T, E]`.
        """
        if not self.is_graphed:
            probs, routing_map = self.slots.translate(probs, routing_map, self.slot_of_expert_E)
            return super().dispatch_preprocess(hidden_states, routing_map, probs)
        started, self.rows_TK, weights_TK = self.slots.start(probs, routing_map, self.slot_of_expert_E)
        self.keep_started(started)
        if started.segments_3C is None:  # the host plans, behind the graph
            return hidden_states, weights_TK
        slot_TK = slot_of_device_rows(self.rows_TK, started.segments_3C, self.slots.num_slots)
        return self._preprocessed(hidden_states, weights_TK, slot_TK)

    def _preprocessed(self, hidden_states: torch.Tensor, weights_TK: torch.Tensor, slot_TK: torch.Tensor) -> Any:
        """Megatron's, for these slots of the choices."""
        probs_TS, routing_map_TS = self.slots.maps(weights_TK, slot_TK)
        return super().dispatch_preprocess(hidden_states, routing_map_TS, probs_TS)

    def after_plan(
        self, plan: DispatchPlan, hidden_states: torch.Tensor, probs: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `ReplicaSteps`: Megatron's preprocessing where a graph does not hold it."""
        if self.segments_3C is not None:
            return hidden_states, probs
        rows_and_weights: tuple[torch.Tensor, torch.Tensor] = self._preprocessed(
            hidden_states, probs, self.slots.slots_of(self.rows_TK, plan)
        )
        return rows_and_weights

    def dispatch_postprocess(self, hidden_states: torch.Tensor, probs: torch.Tensor) -> Any:
        """Megatron's; where there are no replicas, the rows that pad spare slots to capacity are taken away."""
        rows_NH, tokens_S, weights_N = super().dispatch_postprocess(hidden_states, probs)
        self._empty_rows = 0
        if self.planner.uses_replicas:
            return rows_NH, tokens_S, weights_N
        home_slots = self.planner.view.home_slots
        self._empty_rows = int(tokens_S[home_slots:].sum())
        num_rows = len(rows_NH) - self._empty_rows
        return rows_NH[:num_rows], tokens_S[:home_slots], weights_N[:num_rows]

    def combine_preprocess(self, hidden_states: torch.Tensor) -> Any:
        """Megatron's, with zeros for the rows that were taken away."""
        if self._empty_rows:
            hidden_states = F.pad(hidden_states, (0, 0, 0, self._empty_rows))
        return super().combine_preprocess(hidden_states)  # type: ignore[misc]


@functools.cache
def with_slots(dispatcher: type) -> type[MoETokenDispatcher]:
    """One of Megatron's dispatchers, for physical slots."""
    return type(f"{dispatcher.__name__}ForSlots", (_ForSlots, dispatcher), {"__module__": __name__})
