"""What limits a placement: sets of ranks (cuts) whose experts have no host outside, for many loads at once.

With the best split, the largest rank load of a placement is the maximum over rank sets Q of (load of the experts all of
whose hosts lie inside Q) / |Q| (Hall's condition, 1935). Up to 8 ranks all sets are listed; beyond, only the ones that
were ever binding: an exact split finds them (`split.binding_cuts`) and they are kept, as in a cutting-plane method
(Kelley 1960). A search can then judge thousands of changed placements by matrix products and run the exact oracle only
for the one it wants to make.

Alternatives: a subset-sum transform over all 2^R sets per candidate (exact, but 65,536 sets at 16 ranks and
impossible at 64); a flow per candidate and load (exact, 0.2 to 1 ms each).

Loads are whole numbers held in float64, so every sum is exact and equal on every machine, whatever the order.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from megatron_smartmoe.placement.split import binding_cuts, split_graph
from megatron_smartmoe.spec.arrays import FloatArray, IntArray
from megatron_smartmoe.spec.placement import BoolArray

MEAN_LOAD = 1_000_000  # tokens; a scenario is scaled so that a rank's mean load is about this: six digits of balance
ALL_SETS_UP_TO_RANKS = 8  # 255 sets, a matrix product that stays in the cache


def scaled(loads_KE: FloatArray | IntArray, num_ranks: int) -> FloatArray:
    """Whole loads whose mean per rank is about MEAN_LOAD, one scenario a row."""
    loads_KE = np.asarray(loads_KE, dtype=np.float64)
    total_K1 = np.maximum(loads_KE.sum(axis=1, keepdims=True), 1.0)
    return np.rint(loads_KE * (MEAN_LOAD * num_ranks) / total_K1)


class CutPool:
    """The rank sets that a search judges placements by.

    Args:
        num_ranks: R.
    """

    def __init__(self, num_ranks: int) -> None:
        self.num_ranks = num_ranks
        self.complete = num_ranks <= ALL_SETS_UP_TO_RANKS
        if self.complete:
            masks = np.arange(1, 1 << num_ranks)
            self.outside_RQ = ((masks >> np.arange(num_ranks)[:, None]) & 1) == 0
        else:
            self.outside_RQ = ~np.eye(num_ranks, dtype=np.bool_)
        self._known = {self._key(column) for column in self.outside_RQ.T}
        self._update()

    def _update(self) -> None:
        self.size_Q = (~self.outside_RQ).sum(axis=0).astype(np.float64)
        self._outside_RQ = self.outside_RQ.astype(np.float64)

    @staticmethod
    def _key(outside_R: BoolArray) -> bytes:
        return np.packbits(outside_R).tobytes()

    def add(self, cuts: Iterable[list[int]]) -> bool:
        """Add rank sets that are not known yet; returns whether there were any."""
        fresh = []
        for ranks in cuts:
            outside_R = np.ones(self.num_ranks, dtype=np.bool_)
            outside_R[ranks] = False
            if self._key(outside_R) not in self._known:
                self._known.add(self._key(outside_R))
                fresh.append(outside_R)
        if fresh:
            self.outside_RQ = np.concatenate([self.outside_RQ, np.stack(fresh, axis=1)], axis=1)
            self._update()
        return bool(fresh)

    def ask_oracle(self, scenarios_KE: FloatArray, hosts_ER: BoolArray) -> Iterator[bool]:
        """Add the sets that bind, scenario by scenario; yields whether there were new ones, or nothing when every set
        is listed."""
        if self.complete:
            return
        graph = split_graph(hosts_ER, scenarios_KE.max(axis=0).astype(np.int64))
        for load_E in scenarios_KE.astype(np.int64):
            yield self.add(binding_cuts(graph, load_E)[1])

    def hosts_outside(self, hosts_ER: BoolArray) -> FloatArray:
        """`[E, Q]`: hosts of expert e outside set Q; with none of them its load is locked into the set."""
        outside_EQ: FloatArray = hosts_ER.astype(np.float64) @ self._outside_RQ
        return outside_EQ
