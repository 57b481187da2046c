"""All options of the online phase, which the planners of homes and of replicas share."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from megatron_smartmoe.cost.replicas import FREE_TRANSFERS, TransferPrice
from megatron_smartmoe.placement.exact_plan import ExactPlanOptions
from megatron_smartmoe.placement.history import HistoryOptions
from megatron_smartmoe.placement.plan_homes import HomesOptions
from megatron_smartmoe.placement.plan_replicas import ReplicaOptions
from megatron_smartmoe.placement.policy import PolicyOptions

ReplicaMode = Literal["history", "exact", "auto"]


@dataclass(frozen=True, kw_only=True)
class OnlineOptions:
    """All options of the online phase.

    Attributes:
        homes_interval: homes are re-evaluated every so many iterations; 0 never moves them.
        first_evaluation: iteration before which homes are left alone.
        replicas: `history`: replicas are planned from earlier iterations, before this one begins; `exact`: from each
            micro-batch's own counts; `auto`: from history, and again from the counts of a micro-batch for a layer that
            the replicas from history leave too unbalanced, or from counts alone where history does not pay.
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

    def exact_plan(self, price: TransferPrice) -> ExactPlanOptions:
        """Of a plan for exactly the counts of a micro-batch, at this price of its transfers."""
        replica = self.replica
        return ExactPlanOptions(
            num_nodes=replica.num_nodes, or_group=replica.or_group, price=price, limit=self.auto_limit
        )
