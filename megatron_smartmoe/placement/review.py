"""What a move of homes saved: the same counts priced with the homes before and the homes after it.

Method. After a move the counts of the next records are kept. When there are enough, each is priced twice with
the cost model, with the old homes and with the new ones, both with the cheapest replicas for exactly these counts that
may be, so that nothing but the homes differs. Comparing iteration times before and after the move instead would blame
the move for whatever else changed, above all the load itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from megatron_smartmoe.placement.exact_plan import ExactPlanOptions
from megatron_smartmoe.placement.kernels import NUMPY, Kernels
from megatron_smartmoe.placement.plan_homes import drop_misplaced
from megatron_smartmoe.spec.arrays import IntArray
from megatron_smartmoe.spec.placement import Placement

LayerSeconds = Callable[[IntArray, IntArray], float]  # (slots_RS, counts_RE of one micro-batch) -> seconds of the layer


class MoveReview:
    """One move under review.

    Args:
        before: the placement before it.
        after: the placement that it made.
        predicted_gain_s: predicted seconds per iteration that it saves.
        records: number of records that it is reviewed on.
    """

    def __init__(self, before: Placement, after: Placement, predicted_gain_s: float, records: int) -> None:
        self.before, self.after, self.records = before, after, records
        self.predicted_gain_s = predicted_gain_s
        self.counts: list[IntArray] = []  # [L, R, E] of each record

    @property
    def ready(self) -> bool:
        """Whether enough records have been observed."""
        return len(self.counts) >= self.records

    def observe(self, counts_LRE: IntArray) -> None:
        """Add the counts of one iteration after the move."""
        if not self.ready:
            self.counts.append(counts_LRE)

    def gain_s(
        self, layer_seconds: LayerSeconds, replicas: ExactPlanOptions, kernels: Kernels = NUMPY
    ) -> tuple[float, float]:
        """Seconds per micro-batch that the move saves in the layers that it changed, and the seconds of all layers with
        it; means over the records.

        Args:
            layer_seconds: cost model.
            replicas: where the replicas of either side may be, and what they cost.
            kernels: what plans them.
        """
        home_slots = self.before.home_slots
        touched_L = (self.before.home_rank_LE != self.after.home_rank_LE).any(axis=1)
        gain_s, total_s = 0.0, 0.0
        for counts_LRE in self.counts:
            for layer, counts_RE in enumerate(counts_LRE):
                load_E = counts_RE.sum(axis=0)
                slots_RS = kernels.exact_plan(load_E, self.after.slots_LRS[layer], home_slots, replicas).slots_RS
                now_s = layer_seconds(slots_RS, counts_RE)
                total_s += now_s
                if touched_L[layer]:
                    slots_RS = kernels.exact_plan(load_E, self.before.slots_LRS[layer], home_slots, replicas).slots_RS
                    gain_s += layer_seconds(slots_RS, counts_RE) - now_s
        return gain_s / len(self.counts), total_s / len(self.counts)

    def reverted(self, placement: Placement, num_nodes: int) -> Placement:
        """`placement` with the homes from before the move in the layers that it changed; replicas stay where allowed.

        Args:
            placement: the present slots.
            num_nodes: nodes that the ranks lie on, each of which keeps the replicas of its homes.
        """
        slots_LRS, home_slots = placement.slots_LRS.copy(), placement.home_slots
        node_R = np.arange(placement.num_ranks) * num_nodes // placement.num_ranks
        for layer in np.nonzero((self.before.home_rank_LE != self.after.home_rank_LE).any(axis=1))[0]:
            slots_LRS[layer, :, :home_slots] = self.before.slots_LRS[layer, :, :home_slots]
            drop_misplaced(slots_LRS[layer], home_slots, node_R)
        return replace(placement, slots_LRS=slots_LRS)
