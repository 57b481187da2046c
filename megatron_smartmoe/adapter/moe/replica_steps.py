"""What any dispatcher does for replicas besides its own work: it lets their messages move on beside its steps.

Where a CUDA graph holds the preprocessing, the host takes no part in it: `dispatch_preprocess` starts the plan of the
micro-batch and leaves what `resume` continues from, behind the graph. Megatron keeps the attributes that a dispatcher
names in `cudagraph_attrs` as outputs of the graph, and sets them again behind every replay.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from megatron_smartmoe.adapter.moe.graphs import holds_preprocessing
from megatron_smartmoe.runtime.replicas.dispatch_plan import DispatchPlan
from megatron_smartmoe.runtime.replicas.layer_planner import LayerPlanner, StartedPlan
from megatron_smartmoe.runtime.replicas.wire import advancing

LEFT_BY_GRAPH = ("awaited", "segments_3C", "rows_TK")  # what `resume` continues from, besides rows and weights


class ReplicaSteps:
    """To be put in front of a dispatcher's class.

    Attributes:
        planner: plans the layer's micro-batches.
        awaited: see `StartedPlan`; from `dispatch_preprocess` to `resume` where a graph holds the preprocessing.
        segments_3C: as `awaited`.
        rows_TK: the row of each choice.
    """

    planner: LayerPlanner
    config: Any
    awaited: torch.Tensor
    segments_3C: torch.Tensor | None = None
    rows_TK: torch.Tensor

    @functools.cached_property
    def is_graphed(self) -> bool:
        """Whether the preprocessing is made for a CUDA graph."""
        return holds_preprocessing(self.config)

    def keep_started(self, started: StartedPlan) -> None:
        """Keep a plan for `resume`."""
        self.awaited, self.segments_3C = started.awaited, started.segments_3C

    def resume(self, hidden_states: torch.Tensor, probs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What the host does between a graph that holds the preprocessing and the exchange; the fetch starts.

        Args:
            hidden_states: what `dispatch_preprocess` returned.
            probs: what `dispatch_preprocess` returned.

        Returns:
            What the dispatcher exchanges.
        """
        plan = self.planner.finish(StartedPlan(awaited=self.awaited, segments_3C=self.segments_3C))
        rows, probs = self.after_plan(plan, advancing(hidden_states, self.planner.wire), probs)
        self.planner.start_fetch()
        self.planner.wire.advance()  # behind the permutation
        return rows, probs

    def after_plan(
        self, plan: DispatchPlan, hidden_states: torch.Tensor, probs: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Continue behind the plan; see `resume`."""
        raise NotImplementedError

    def dispatch_preprocess(self, hidden_states: torch.Tensor, routing_map: torch.Tensor, probs: torch.Tensor) -> Any:
        """The dispatcher's; behind it a fetch starts that the plan has left to start."""
        if self.is_graphed:
            return super().dispatch_preprocess(hidden_states, routing_map, probs)  # type: ignore[misc]
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
