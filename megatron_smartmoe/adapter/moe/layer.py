"""SmartMoELayer: Megatron's MoE layer with a table between logical experts and the slots where they live.

The router, its losses, its bias, dropping and every statistic use logical experts. Between routing and dispatch a
table on the device, `slot_of_expert_E`, gives the slot of each expert: slot s of the layer is home slot s % S of
expert-parallel rank s // S. With the all-to-all dispatcher the lookup is part of the counting sort that dispatch needs
anyway (see `SlotDispatcher`). Megatron's other dispatchers (allgather, flex, and all-to-all padded to capacity) get
the router's columns in the order of the slots instead, and those of spare slots with them (see `PhysicalSlots`).
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.cuda_graphs import is_graph_capturing
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_smartmoe.adapter.gates.zero_computation import ZeroComputationRouter
from megatron_smartmoe.adapter.moe.dispatcher import SlotDispatcher
from megatron_smartmoe.adapter.moe.experts import SlottedExperts
from megatron_smartmoe.adapter.moe.graphs import holds_preprocessing
from megatron_smartmoe.adapter.moe.hierarchical_dispatcher import HierarchicalDispatcher, HierarchicalReplicaDispatcher
from megatron_smartmoe.adapter.moe.physical_slots import PhysicalSlots
from megatron_smartmoe.adapter.moe.replica_dispatcher import ReplicaDispatcher
from megatron_smartmoe.adapter.moe.routers import tokens_of_experts
from megatron_smartmoe.errors import CompatError
from megatron_smartmoe.runtime.replicas.dispatch_plan import RankView
from megatron_smartmoe.runtime.replicas.layer_planner import LayerPlanner
from megatron_smartmoe.runtime.replicas.slots import SpareSlots


class SmartMoELayer(MoELayer):
    """A drop-in for Megatron's MoELayer; no parameter or buffer of it is saved that Megatron's does not have.

    Attributes:
        slot_of_expert_E: int64, the slot of each logical expert; change it only through `set_homes`.
        experts_by_slot: the logical expert of every home slot of the layer, on the host.
    """

    slot_of_expert_E: torch.Tensor
    expert_of_slot_E: torch.Tensor

    def __init__(
        self,
        config: TransformerConfig,
        *args: Any,
        pg_collection: ProcessGroupCollection | None = None,
        dispatch_nodes: int = 1,
        **kwargs: Any,
    ) -> None:
        """Build Megatron's layer, and put the slots in.

        Args:
            config: the transformer's configuration.
            args: Megatron's.
            pg_collection: the layer's process groups; None for Megatron's.
            dispatch_nodes: nodes of the expert-parallel group to each of which a token is sent once; 1: flat.
            kwargs: Megatron's.

        Raises:
            CompatError: a subclass has set a dispatcher that is not Megatron's.
        """
        super().__init__(config, *args, pg_collection=pg_collection, **kwargs)
        dispatcher: type = type(self.token_dispatcher)  # type: ignore[has-type]
        if not dispatcher.__module__.startswith("megatron.core."):
            raise CompatError(
                f"--smartmoe: the dispatcher of a MoE layer = {dispatcher.__module__}.{dispatcher.__qualname__}: was "
                "set by a subclass, and this project replaces it. Use one of Megatron's (--moe-token-dispatcher-type), "
                "or remove --smartmoe."
            )
        identity = torch.arange(self.config.num_moe_experts, device=self.router.weight.device)
        self.register_buffer("slot_of_expert_E", identity, persistent=False)
        self.register_buffer("expert_of_slot_E", identity.clone(), persistent=False)
        self.experts_by_slot = list(range(len(identity)))
        self._planner: LayerPlanner | None = None
        self._beside: torch.Tensor | None = None  # between routing and the end of the layer
        self._is_graphed = holds_preprocessing(config)
        self._groups = pg_collection or get_default_pg_collection()
        self._fused, self._dispatch_nodes = self._has_own_all_to_all(config), dispatch_nodes
        if self._fused:
            self.token_dispatcher = self._dispatcher_of_homes(config)
            self._overlap_shared_experts()
        self._count_behind_graphs()

    def _dispatcher_of_homes(self, config: TransformerConfig) -> SlotDispatcher:
        """This project's all-to-all, without spare slots."""
        slots = (self.num_local_experts, self.local_expert_indices, config, self._groups)
        if self._dispatch_nodes > 1:
            return HierarchicalDispatcher(*slots, num_nodes=self._dispatch_nodes)
        return SlotDispatcher(*slots, counts_on_device=isinstance(self.experts, SlottedExperts))

    @staticmethod
    def _has_own_all_to_all(config: TransformerConfig) -> bool:
        """Whether this project's all-to-all stands for Megatron's: it pads nothing."""
        pads = config.moe_pad_expert_input_to_capacity or config.moe_router_padding_for_quantization
        return config.moe_token_dispatcher_type == "alltoall" and not pads

    def _overlap_shared_experts(self) -> None:
        """Have the shared experts run beside the exchanges of a dispatcher that has just been built."""
        if self.shared_experts is not None and self.shared_expert_overlap:
            self.token_dispatcher.set_shared_experts(self.shared_experts)

    def _count_behind_graphs(self) -> None:
        """Have a CUDA graph of the preprocessing leave the tokens of each expert, which nobody sees routed."""
        self.token_dispatcher.cudagraph_attrs.append("chosen_E")

    @property
    def _looks_up(self) -> bool:
        """Whether the dispatcher knows slots, and gets the router's columns as they are."""
        return self._fused or self._planner is not None

    def add_replicas(self, spare: SpareSlots, *, num_nodes: int = 1, **options: Any) -> None:
        """Give the layer spare slots, a planner of its micro-batches, and a dispatcher that reaches all slots.

        From then on the experts get tokens of S + K slots where any rank has a replica, home slots first; weights of
        the K others come from `SpareSlots.weights`.

        Args:
            spare: this rank's spare slots.
            num_nodes: nodes that the expert-parallel group spans.
            options: see `LayerPlanner`.
        """
        built, self.experts.spare_slots = self.token_dispatcher, spare
        view = RankView(
            num_ranks=built.ep_size,
            tp_size=built.tp_size,
            num_experts=len(self.experts_by_slot),
            num_slots=self.num_local_experts + spare.num_slots,
            num_nodes=num_nodes,
            rank=self.ep_group.rank(),
            tp_rank=built.tp_rank,
        )
        self._planner = LayerPlanner(view, built.tp_ep_group, spare=spare, **options)
        if self._fused:
            kind = ReplicaDispatcher if self._dispatch_nodes == 1 else HierarchicalReplicaDispatcher
            self.token_dispatcher = kind(
                self.num_local_experts,
                self.local_expert_indices,
                self.config,
                self._groups,
                planner=self._planner,
                in_blocks=isinstance(self.experts, SlottedExperts),
            )
        else:
            self.token_dispatcher = PhysicalSlots(self.config, self._planner).dispatcher(built, self._groups)
        self._overlap_shared_experts()
        self._count_behind_graphs()

    @property
    def planner(self) -> LayerPlanner:
        """What plans the replicas of each micro-batch; only after `add_replicas`."""
        assert self._planner is not None, "the layer has no spare slots"
        return self._planner

    def set_homes(self, slot_of_expert_E: torch.Tensor) -> None:
        """Set where the layer's experts live. Moves no weights.

        Args:
            slot_of_expert_E: a permutation of the slots, int64 `[E]`, on the CPU.
        """
        expert_of_slot_E = torch.argsort(slot_of_expert_E)
        self.slot_of_expert_E.copy_(slot_of_expert_E)  # in place: captured graphs and the dispatcher hold the tensor
        self.expert_of_slot_E.copy_(expert_of_slot_E)
        self.experts_by_slot = expert_of_slot_E.tolist()
        first = self.local_expert_indices[0]
        self.experts.experts_in_slots = self.experts_by_slot[first : first + self.num_local_experts]

    def route(self, hidden_states: torch.Tensor, padding_mask: torch.Tensor | None = None) -> Any:
        """Megatron's routing; what chose an expert that costs nothing is computed here, and never dispatched."""
        routed = super().route(hidden_states, padding_mask)
        if isinstance(self.router, ZeroComputationRouter):
            self._beside = self.router.beside(hidden_states)
        return routed

    def dispatch(self, hidden_states: torch.Tensor, probs: torch.Tensor) -> Any:
        """Megatron's; before it the host continues where a CUDA graph has ended."""
        return super().dispatch(*self.resumed(hidden_states, probs))

    def resumed(self, hidden_states: torch.Tensor, probs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows and weights to exchange, once the host has read the plan that a CUDA graph has left."""
        if self._planner is None or not self._is_graphed:
            return hidden_states, probs
        rows_and_weights: tuple[torch.Tensor, torch.Tensor] = self.token_dispatcher.resume(hidden_states, probs)
        return rows_and_weights

    def postprocess(self, output: torch.Tensor, shared_expert_output: torch.Tensor | None) -> torch.Tensor:
        """Megatron's, and the experts that cost nothing."""
        output = super().postprocess(output, shared_expert_output)
        if self._beside is not None:
            output, self._beside = output + self._beside, None
        return output

    def preprocess(
        self, hidden_states: torch.Tensor, probs: torch.Tensor, routing_map: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Megatron's preprocess, on columns in the order of the slots where the dispatcher does not look them up."""
        if self._planner is not None:
            self._planner.training = self.training  # here: overlapping micro-batches skip `forward`
            if not is_graph_capturing():
                self._planner.begin()
        if self._is_graphed:
            if routing_map is None:  # a graph has done all of it
                done: tuple[torch.Tensor, torch.Tensor] = super().preprocess(hidden_states, probs, routing_map)
                return done
            self.token_dispatcher.chosen_E = tokens_of_experts(self.config, probs, routing_map)
        if self._looks_up:
            self.token_dispatcher.slot_of_expert_E = self.slot_of_expert_E  # the tensor may have been moved: .cuda()
        else:
            probs = probs.index_select(1, self.expert_of_slot_E)
            routing_map = routing_map.index_select(1, self.expert_of_slot_E)
        rows_and_weights: tuple[torch.Tensor, torch.Tensor] = super().preprocess(hidden_states, probs, routing_map)
        return rows_and_weights
