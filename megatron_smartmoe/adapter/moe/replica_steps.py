"""What any dispatcher does for replicas besides its own work: it lets their messages move on beside its steps."""

from __future__ import annotations

from typing import Any

import torch

from megatron_smartmoe.runtime.replicas.layer_planner import LayerPlanner
from megatron_smartmoe.runtime.replicas.wire import advancing


class ReplicaSteps:
    """To be put in front of a dispatcher's class.

    Attributes:
        planner: plans the layer's micro-batches.
    """

    planner: LayerPlanner

    def dispatch_preprocess(self, hidden_states: torch.Tensor, routing_map: torch.Tensor, probs: torch.Tensor) -> Any:
        """The dispatcher's; behind it a fetch starts that the plan has left to start."""
        rows = super().dispatch_preprocess(  # type: ignore[misc]
            advancing(hidden_states, self.planner.wire), routing_map, probs
        )
        self.planner.start_fetch()
        self.planner.wire.advance()  # behind the permutation
        return rows

    def dispatch_postprocess(self, hidden_states: torch.Tensor, probs: torch.Tensor) -> Any:
        """The dispatcher's."""
        self.planner.wire.advance()  # behind the exchange
        return super().dispatch_postprocess(hidden_states, probs)  # type: ignore[misc]

    def combine_postprocess(self, hidden_states: torch.Tensor) -> Any:
        """The dispatcher's; the layer ends."""
        output = advancing(super().combine_postprocess(hidden_states), self.planner.wire)  # type: ignore[misc]
        self.planner.end()
        return output
