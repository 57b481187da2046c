"""Replicas from the exact load: which replicas balance this micro-batch, built in one pass.

Method. T is the mean rank load. While a rank is above T (a donor), one rank below it (a receiver) gets a replica of the
donor's largest expert and just the tokens that fill it to T: the receiver is finished with one slot. The donor with the
highest load goes first, to the receiver with the largest gap that its surplus can fill. When no surplus fills a gap, a
donor gives more than its surplus and becomes a receiver itself, which its own free slot allows; so every replica
finishes one rank, R - 1 replicas are enough, and one spare slot per rank usually is too. Only when an expert is too
small for any gap is a slot spent on part of one. The exact split (`split.py`) then shares the tokens anew among homes
and replicas, which can only help. Where a rank is still above the mean, a bounded local search (`exact_search.py`)
replaces replicas.

This is the idea of MoonEP's planner (fill ranks one by one, fixed homes; Moonshot AI, 2026) with a choice of pairs
made for a single spare slot. Alternatives: UltraEP's threshold search over quotas stops at 1.07 with one slot on 256
experts and 64 ranks; the local search of `search/` reaches further and takes a hundred times as long.
"""

from __future__ import annotations

from bisect import bisect_right, insort

from megatron_smartmoe.placement.checks import check_replicas
from megatron_smartmoe.placement.exact_search import TRIALS, improve_replicas, node_bounds
from megatron_smartmoe.spec.arrays import IntArray
from megatron_smartmoe.spec.placement import EMPTY


def exact_replicas(
    load_E: IntArray, slots_RS: IntArray, home_slots: int, num_nodes: int = 1, trials: int = TRIALS
) -> IntArray:
    """Slots with the same homes and new replicas, planned from the tokens of each expert.

    Args:
        load_E: tokens of each expert.
        slots_RS: the slots as they are; the contents of the spare slots are ignored.
        home_slots: columns of homes, E / R.
        num_nodes: a replica stays on the node of its home; the ranks lie on this many, R / num_nodes consecutive ones
            each.
        trials: of the local search; 0 for the greedy pass alone.

    Raises:
        PlanError: see `checks.check_replicas`.
    """
    check_replicas(load_E, slots_RS, home_slots, num_nodes, trials)
    # Step 1: clear the spare slots.
    new_RS = slots_RS.copy()
    new_RS[:, home_slots:] = EMPTY
    num_ranks, num_slots = slots_RS.shape
    per_node = num_ranks // num_nodes
    # Step 2: fill the ranks of each node to its bound.
    is_even = True
    for node, bound in enumerate(node_bounds(load_E, slots_RS[:, :home_slots], num_nodes)):
        ranks = slice(node * per_node, (node + 1) * per_node)
        filling = _Filling(slots_RS[ranks, :home_slots].tolist(), load_E.tolist(), num_slots - home_slots)
        for rank, replicas in enumerate(filling.run(bound)):
            new_RS[ranks.start + rank, home_slots : home_slots + len(replicas)] = replicas
        is_even = is_even and max(filling.load) <= bound
    # Step 3: replace replicas while that helps the busiest rank.
    if is_even:
        return new_RS
    return improve_replicas(load_E, new_RS, home_slots, num_nodes, trials)


class _Filling:
    """State of the pass over one node: tokens by rank and expert as they would be computed, free slots, replicas."""

    def __init__(self, homes: list[list[int]], load: list[int], spare_slots: int) -> None:
        self.tokens = [{expert: load[expert] for expert in experts} for experts in homes]
        self.load = [sum(tokens.values()) for tokens in self.tokens]
        self.free = [spare_slots] * len(homes)
        self.replicas: list[list[int]] = [[] for _ in homes]
        self.gaps: list[tuple[int, int]] = []  # (tokens missing to the mean, rank) of the receivers, ascending

    def run(self, mean: int) -> list[list[int]]:
        """Add replicas until no rank is above `mean` or no slot helps; returns the replicas of each rank."""
        self.gaps = sorted((mean - load, r) for r, load in enumerate(self.load) if load < mean and self.free[r])
        while self.gaps:
            donors = sorted((mean - load, r) for r, load in enumerate(self.load) if load > mean)
            # A gap filled from a surplus first, else from more than a surplus, else a part of a gap.
            choice = self._fills(donors) or self._overfills(donors) or self._part(donors)
            if choice is None:
                break
            self._give(*choice, mean)
        return self.replicas

    def _fills(self, donors: list[tuple[int, int]]) -> tuple[int, int, int, int] | None:
        """A donor (the highest first) whose surplus fills a gap: the largest such gap."""
        for missing, donor in donors:
            expert, tokens = self._largest(donor)
            at = bisect_right(self.gaps, (min(-missing, tokens), len(self.load)))
            for gap, receiver in reversed(self.gaps[:at]):
                if expert not in self.tokens[receiver]:
                    return donor, receiver, expert, gap
        return None

    def _overfills(self, donors: list[tuple[int, int]]) -> tuple[int, int, int, int] | None:
        """A donor with a free slot of its own that fills a gap with more than its surplus, by as little as possible."""
        best: tuple[int, int, int, int, int] | None = None
        for missing, donor in donors:
            expert, tokens = self._largest(donor)
            if not self.free[donor]:
                continue
            for gap, receiver in self.gaps:
                if gap > tokens or (best is not None and gap + missing >= best[0]):
                    break
                if expert not in self.tokens[receiver]:
                    best = (gap + missing, donor, receiver, expert, gap)
                    break
        return best[1:] if best is not None else None

    def _part(self, donors: list[tuple[int, int]]) -> tuple[int, int, int, int] | None:
        """As many tokens as one replica can take off a donor for a gap that stays open: the whole expert if the donor
        has a free slot, else its surplus."""
        best: tuple[int, int, int, int, int] | None = None
        for missing, donor in donors:
            expert, tokens = self._largest(donor)
            given = tokens if self.free[donor] else min(-missing, tokens)
            if best is not None and given <= best[0]:
                continue
            for gap, receiver in reversed(self.gaps):
                if expert not in self.tokens[receiver]:
                    best = (given, donor, receiver, expert, min(given, gap))
                    break
        return best[1:] if best is not None else None

    def _largest(self, donor: int) -> tuple[int, int]:
        expert, tokens = max(self.tokens[donor].items(), key=lambda item: (item[1], -item[0]))
        return expert, tokens

    def _give(self, donor: int, receiver: int, expert: int, tokens: int, mean: int) -> None:
        self.gaps.remove((mean - self.load[receiver], receiver))
        self.tokens[donor][expert] -= tokens
        self.tokens[receiver][expert] = tokens
        self.load[donor] -= tokens
        self.load[receiver] += tokens
        self.free[receiver] -= 1
        self.replicas[receiver].append(expert)
        for rank in (donor, receiver):
            if self.load[rank] < mean and self.free[rank]:
                insort(self.gaps, (mean - self.load[rank], rank))
