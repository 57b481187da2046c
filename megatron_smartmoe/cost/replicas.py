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

from dataclasses import dataclass, replace
from typing import Literal

from megatron_smartmoe.cost.compute import ExpertShape

FetchHidden = Literal["nothing", "home_rows", "forward"]
ReturnHidden = Literal["nothing", "backward"]
PERMUTE_SHARE = 1 / 4  # of a source's row moves (permute and unpermute, forward and backward): the first permutation
FORWARD_SHARE = 1 / 3  # of the experts' arithmetic: the backward pass is twice the forward pass
FORWARD_HALF = 1 / 2  # of row moves, launches and latencies
TRANSFERS_IN_A_ROW = 3  # of replicas: 2 on 8 ranks with one slot, 3 on 16 and 64; measured on lognormal loads


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


@dataclass(frozen=True, kw_only=True)
class LegPrice:
    """One way of replicas: their weights out, or their gradients back. In tokens of the busiest rank that take as long.

    Attributes:
        inside_tokens: of a transfer inside a node.
        between_tokens: of a transfer between nodes.
        hidden_tokens: of what computes meanwhile; so much of all transfers together costs nothing.
    """

    inside_tokens: float = 0.0
    between_tokens: float = 0.0
    hidden_tokens: float = 0.0

    def carried(self, inside: float, between: float) -> float:
        """So many transfers that follow one another, hidden or not."""
        return inside * self.inside_tokens + between * self.between_tokens

    def exposed(self, inside: float, between: float) -> float:
        """What is not hidden of so many transfers that follow one another."""
        return max(0.0, self.carried(inside, between) - self.hidden_tokens)

    def scaled(self, factor: float) -> LegPrice:
        """Every token counted `factor` times."""
        return LegPrice(
            inside_tokens=self.inside_tokens * factor,
            between_tokens=self.between_tokens * factor,
            hidden_tokens=self.hidden_tokens * factor,
        )


FREE_LEG = LegPrice()


@dataclass(frozen=True, kw_only=True)
class TransferPrice:
    """What the replicas of a plan cost: tokens of the busiest rank that take as long as their transfers are not hidden.

    It is the cost model's price of replicas (`moe_layer.layer_time`) for planners, which count tokens, not seconds.

    Attributes:
        fetch: the weights' way out.
        back: the gradients' way back.
        num_nodes: nodes that the ranks lie on, consecutive ranks together.
        crosses_nodes: whether replicas may leave their home's node.
    """

    fetch: LegPrice = FREE_LEG
    back: LegPrice = FREE_LEG
    num_nodes: int = 1
    crosses_nodes: bool = False

    @classmethod
    def of_each(cls, tokens: float) -> TransferPrice:
        """The same for every transfer, wherever it goes, and nothing hidden."""
        return cls(fetch=LegPrice(inside_tokens=tokens, between_tokens=tokens))

    @property
    def is_free(self) -> bool:
        """Whether no number of transfers costs anything."""
        return not any(leg.inside_tokens > 0 or leg.between_tokens > 0 for leg in (self.fetch, self.back))

    def tokens(self, inside: float, between: float) -> float:
        """The price of so many transfers that follow one another, inside nodes and between them."""
        return self.fetch.exposed(inside, between) + self.back.exposed(inside, between)

    @property
    def each_tokens(self) -> float:
        """Of one transfer among `TRANSFERS_IN_A_ROW`, for messages: what is hidden is shared by all of them."""
        inside, between = (0, 1) if self.crosses_nodes else (1, 0)
        legs = (replace(leg, hidden_tokens=leg.hidden_tokens / TRANSFERS_IN_A_ROW) for leg in (self.fetch, self.back))
        return sum(leg.exposed(inside, between) for leg in legs)

    def scaled(self, factor: float) -> TransferPrice:
        """Every token counted `factor` times."""
        return replace(self, fetch=self.fetch.scaled(factor), back=self.back.scaled(factor))

    @property
    def legs(self) -> tuple[tuple[float, float, float], ...]:
        """Both ways, inside, between and hidden, as the compiled functions take them."""
        return tuple((leg.inside_tokens, leg.between_tokens, leg.hidden_tokens) for leg in (self.fetch, self.back))


FREE_TRANSFERS = TransferPrice()
