"""When replicas travel and what the machine computes meanwhile: one schedule for simulator, planner and training.

A replica's weights go along the relay tree of its expert to the rank that holds it, and its gradient comes back the
same way. How often depends on what the replicas are planned from: `history` fetches them once an iteration and returns
the gradients summed over its micro-batches; `exact` fetches and returns them in each micro-batch. A layer's price is
per micro-batch, so a transfer that serves M of them costs each an M-th.

What is hidden is what training hides (`runtime/replicas`, `adapter/moe`). Every layer gives a transfer the time that
its own computation leaves the ports idle:

- history: all layers' weights are requested when the iteration begins and travel while the layers before compute: the
  forward pass of a layer. With --overlap-param-gather they are requested when the homes are complete, shortly before
  the layer, which hides what `exact` hides.
- exact: the weights are requested before the permutation. Home rows are computed first, so what hides them is the
  permutation and the home rows of the rank with a replica that has fewest of them.
- Gradients, in either mode, travel while the layers that come next in the backward pass compute.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_smartmoe.cost.compute import ExpertShape

FetchHidden = Literal["nothing", "home_rows", "forward"]
ReturnHidden = Literal["nothing", "backward"]
PERMUTE_SHARE = 1 / 4  # of a source's row moves (permute and unpermute, forward and backward): the first permutation
FORWARD_SHARE = 1 / 3  # of the experts' arithmetic: the backward pass is twice the forward pass
FORWARD_HALF = 1 / 2  # of row moves, launches and latencies


@dataclass(frozen=True, kw_only=True)
class ReplicaSchedule:
    """How often replicas travel and what hides them.

    Attributes:
        micro_batches: micro-batches that one transfer serves.
        weight_share: share of a replica's bytes that are weights on their way out; the others are its gradient.
        fetch_hidden: what the weights travel behind: nothing; the permutation and the home rows; a forward pass.
        return_hidden: what the gradients travel behind: nothing; a backward pass.
    """

    micro_batches: int = 1
    weight_share: float = 0.5
    fetch_hidden: FetchHidden = "nothing"
    return_hidden: ReturnHidden = "nothing"


EVERY_MICRO_BATCH = ReplicaSchedule()  # nothing shared, nothing hidden


def schedule_of(mode: str, expert: ExpertShape, *, micro_batches: int, fetched_early: bool = True) -> ReplicaSchedule:
    """The schedule that training has for a way of planning replicas.

    Args:
        mode: `exact`, or `history` and what else plans replicas before the iteration.
        expert: an expert as a rank computes it.
        micro_batches: of an iteration.
        fetched_early: whether weights from history are fetched when the iteration begins; with --overlap-param-gather
            they are fetched shortly before the layer.
    """
    return ReplicaSchedule(
        micro_batches=1 if mode == "exact" else micro_batches,
        weight_share=expert.sent_weight_bytes / (expert.sent_weight_bytes + expert.gradient_bytes),
        fetch_hidden="forward" if mode != "exact" and fetched_early else "home_rows",
        return_hidden="backward",
    )
