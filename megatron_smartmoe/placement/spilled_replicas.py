"""Replicas from the exact load, for few transfers: ranks above the mean spill their largest experts.

Method. What a rank has above the mean is its surplus. It spills it in pieces, its largest expert first: all of the
expert's tokens, or what is left of the surplus. The largest piece of all ranks goes first, to the rank with the
smallest gap that it fits into, or else to the one with the largest gap, which takes what fits; what is left of it is
spilled again. No rank spills or takes more pieces than the one needs that needs most, with its surplus in pieces of its
largest experts that fill the largest gap: another transfer behind those would hold up all of them.

`exact_replicas` fills every gap to the last token, with many small pieces, each of which is a transfer. This pass
leaves some per cent above the mean, and as few transfers follow one another as the largest surplus permits.
`exact_plan.cheapest_exact_plan` makes both plans and takes the cheaper one.

Example. 4 ranks of 2 experts, the mean is 100. Ranks 0 and 1 have 105 + 95 and 104 + 96 tokens, ranks 2 and 3 none.
Either surplus, 100 tokens, is less than the rank's largest expert, so one piece of each is enough: 100 tokens of expert
0 go to rank 2 and 100 of expert 2 to rank 3, in one transfer.

After ECHO (NVIDIA/Megatron-LM pull request 2368, 2025), whose ranks with the most room take the largest spillover, and
LLEP, which moves whole pieces from the busiest rank. Neither bounds the pieces of a rank or compares prices.
"""

from __future__ import annotations

import heapq

from megatron_smartmoe.placement.checks import check_replicas
from megatron_smartmoe.placement.exact_search import node_bounds
from megatron_smartmoe.spec.arrays import IntArray
from megatron_smartmoe.spec.placement import EMPTY


def spilled_replicas(load_E: IntArray, slots_RS: IntArray, home_slots: int, num_nodes: int = 1) -> IntArray:
    """Slots with the same homes and new replicas, planned from the tokens of each expert.

    Args:
        load_E: tokens of each expert.
        slots_RS: the slots as they are; the contents of the spare slots are ignored.
        home_slots: columns of homes, E / R.
        num_nodes: a replica stays on the node of its home; the ranks lie on this many, R / num_nodes consecutive ones
            each.

    Raises:
        PlanError: see `checks.check_replicas`.
    """
    check_replicas(load_E, slots_RS, home_slots, num_nodes)
    new_RS = slots_RS.copy()
    new_RS[:, home_slots:] = EMPTY
    per_node = len(slots_RS) // num_nodes
    for node, bound in enumerate(node_bounds(load_E, slots_RS[:, :home_slots], num_nodes)):
        _spill(load_E, new_RS[node * per_node : (node + 1) * per_node], home_slots, bound)
    return new_RS


def _spill(load_E: IntArray, slots_RS: IntArray, home_slots: int, mean: int) -> None:
    """Write the replicas of one node into its spare slots."""
    tokens_R = [{int(expert): int(load_E[expert]) for expert in homes} for homes in slots_RS[:, :home_slots]]
    load_R = [sum(tokens.values()) for tokens in tokens_R]
    # Step 1: pieces that a rank may spill or take.
    room = mean - min(load_R)
    most = max(_pieces(load - mean, tokens, room) for load, tokens in zip(load_R, tokens_R, strict=True))
    free_R = [min(slots_RS.shape[1] - home_slots, most)] * len(load_R)
    left_R = [most] * len(load_R)
    # Step 2: the next piece of every rank above the mean.
    pieces: list[tuple[int, int, int]] = []  # (-tokens, rank, expert)

    def cut(rank: int) -> None:
        surplus = load_R[rank] - mean
        if surplus > 0 and left_R[rank]:
            expert, tokens = max(tokens_R[rank].items(), key=lambda item: (item[1], -item[0]))
            heapq.heappush(pieces, (-min(tokens, surplus), rank, expert))

    for rank in range(len(load_R)):
        cut(rank)
    # Step 3: the largest of them goes where it fits best.
    while pieces:
        negative, donor, expert = heapq.heappop(pieces)
        gaps = [
            (mean - load, rank)
            for rank, load in enumerate(load_R)
            if load < mean and free_R[rank] and expert not in slots_RS[rank]
        ]
        if not gaps:
            continue  # the rank keeps what it has
        gap, receiver = min((each for each in gaps if each[0] >= -negative), default=max(gaps))
        tokens = min(-negative, gap)
        slots_RS[receiver, slots_RS[receiver].tolist().index(EMPTY)] = expert
        tokens_R[donor][expert] -= tokens
        load_R[donor] -= tokens
        load_R[receiver] += tokens
        left_R[donor] -= 1
        free_R[receiver] -= 1
        cut(donor)


def _pieces(surplus: int, tokens: dict[int, int], room: int) -> int:
    """Pieces of about `room` tokens that it takes to hold a surplus, the largest experts first."""
    count = 0
    for each in sorted(tokens.values(), reverse=True):
        if surplus <= 0 or room <= 0:
            break
        count += max(1, (2 * min(each, surplus) + room) // (2 * room))  # rounded
        surplus -= each
    return count
