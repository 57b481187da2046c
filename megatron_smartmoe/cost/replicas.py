"""When replicas travel and what the machine computes meanwhile: one schedule for simulator, planner and training.

A replica's weights go from its home to the rank that holds it, and its gradient comes back. How often depends on what
the replicas are planned from: `history` fetches them once an iteration and returns the gradients summed over its
micro-batches; `exact` fetches and returns them in each micro-batch. A layer's price is per micro-batch, so a transfer
that serves M of them costs each an M-th.

What is hidden is what training hides today (`runtime/replicas`, `adapter/moe/replica_dispatcher`):

- history, fetched early: all layers' weights are requested when the iteration begins and travel while the layers before
  compute, so that every layer gives one transfer the time that its forward pass leaves the ports idle.
- exact: the weights are requested before the permutation and needed by the experts; what comes between is the
  permutation, and the all-to-all, which uses the same ports.
- Gradients: the backward pass waits for them, in either mode.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_smartmoe.cost.compute import ExpertShape

HiddenBehind = Literal["nothing", "permute", "forward"]
PERMUTE_SHARE = 1 / 4  # of a source's row moves (permute and unpermute, forward and backward): the first permutation
FORWARD_SHARE = 1 / 3  # of the experts' arithmetic: the backward pass is twice the forward pass
FORWARD_HALF = 1 / 2  # of row moves, launches and latencies


@dataclass(frozen=True, kw_only=True)
class ReplicaSchedule:
    """How often replicas travel and what hides them.

    Attributes:
        micro_batches: micro-batches that one transfer serves.
        weight_share: share of a replica's bytes that are weights on their way out; the others are its gradient.
        fetch_hidden: what the weights travel behind.
    """

    micro_batches: int = 1
    weight_share: float = 0.5
    fetch_hidden: HiddenBehind = "nothing"


EVERY_MICRO_BATCH = ReplicaSchedule()  # nothing shared, nothing hidden


def schedule_of(mode: str, expert: ExpertShape, *, micro_batches: int, fetched_early: bool = True) -> ReplicaSchedule:
    """The schedule that training has for a way of planning replicas.

    Args:
        mode: `history` or `exact`.
        expert: an expert as a rank computes it.
        micro_batches: of an iteration.
        fetched_early: whether weights are fetched before the layer computes; they are not with --overlap-param-gather,
            where they are complete when the layer begins.
    """
    behind: HiddenBehind = "forward" if mode == "history" else "permute"
    return ReplicaSchedule(
        micro_batches=micro_batches if mode == "history" else 1,
        weight_share=expert.weight_bytes / (expert.weight_bytes + expert.gradient_bytes),
        fetch_hidden=behind if fetched_early else "nothing",
    )
