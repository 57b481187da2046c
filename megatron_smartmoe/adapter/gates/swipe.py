"""SWIPE, the gate of BaGuaLu (Ma et al., PPoPP 2022): every rank computes the same number of tokens."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_smartmoe.adapter.gates.router import Choice, GateRouter, one_hot, spread


class SwipeRouter(GateRouter):
    """Top-k, with the choices that are too many for a rank given to ranks with room; no loss.

    The paper names the method; what it does is defined by what its authors published (`swipe_gate.py` of FastMoE):
    first choices first, each expert-parallel rank accepts choices in the order of the ranks that they come from,
    until it has tokens x k of them in all; what is left goes to ranks with room, in their order, there to expert
    (number of the choice) modulo (experts of a rank). Weights are the softmax of the logits of the experts that a token
    ends up with. In evaluation nothing is given away.

    Two rules are this project's. A token that would get one expert twice gets the next one of that rank (the code's
    would count twice, and a routing map cannot). And "a rank" is a logical one: experts 0 to E / R - 1 are rank 0's
    wherever they live, so that moving experts, or replicas, changes nothing in the training; it balances the ranks
    exactly as long as experts are at home.
    """

    def __init__(self, *args: Any, pg_collection: ProcessGroupCollection, **kwargs: Any) -> None:
        super().__init__(*args, pg_collection=pg_collection, **kwargs)
        self.ep_group = pg_collection.ep

    def choose(self, logits_TE: torch.Tensor, num_rows: int) -> Choice:
        """See the class. In training a collective call of the expert-parallel group."""
        experts_TK = logits_TE.topk(self.topk, dim=1).indices
        if self.training:
            experts_TK = self._shared_out(experts_TK)
        weights_TK = torch.softmax(logits_TE.gather(1, experts_TK), dim=1)
        chosen_TE = torch.zeros_like(logits_TE, dtype=torch.bool).scatter(1, experts_TK, True)
        return Choice(weights_TE=spread(weights_TK, experts_TK, self.num_experts), chosen_TE=chosen_TE)

    def _shared_out(self, experts_TK: torch.Tensor) -> torch.Tensor:
        """The experts of each token, after too many have been given away."""
        num_ranks = self.ep_group.size()
        experts_per_rank = self.num_experts // num_ranks
        # Step 1: how many choices each rank has for each rank
        ranks_TK = experts_TK // experts_per_rank
        counts_KR = torch.stack([one_hot(ranks_T, num_ranks).sum(dim=0) for ranks_T in ranks_TK.unbind(dim=1)])
        counts_SKR = counts_KR.new_empty(num_ranks * self.topk, num_ranks)
        dist.all_gather_into_tensor(counts_SKR, counts_KR, group=self.ep_group)
        # Step 2: which rank each of this rank's choices goes to
        new_ranks_TK = shares(counts_SKR.view(num_ranks, self.topk, num_ranks), ranks_TK, self.ep_group.rank())
        # Step 3: which expert there
        moved_TK = new_ranks_TK != ranks_TK
        number_K = torch.arange(self.topk, device=experts_TK.device) % experts_per_rank
        wanted_TK = torch.where(moved_TK, new_ranks_TK * experts_per_rank + number_K, experts_TK)
        return distinct(wanted_TK, experts_per_rank)


def shares(counts_SKR: torch.Tensor, ranks_TK: torch.Tensor, source: int) -> torch.Tensor:
    """The rank that takes each choice, the same computation on all ranks.

    Args:
        counts_SKR: choices of each source rank, by their number, for each rank.
        ranks_TK: the ranks of the choices of one source.
        source: that rank.

    Returns:
        Ranks, of the shape of `ranks_TK`.
    """
    top_k, num_ranks = counts_SKR.shape[1:]
    room_R = counts_SKR.new_full((num_ranks,), len(ranks_TK) * top_k)
    taken_TK = ranks_TK.clone()
    for k in range(top_k):
        # Step 1: what each rank accepts from each source, in the order of the sources
        counts_SR = counts_SKR[:, k]
        before_SR = counts_SR.cumsum(dim=0) - counts_SR
        accepted_SR = (room_R - before_SR).clamp(min=0).minimum(counts_SR)
        room_R = room_R - accepted_SR.sum(dim=0)
        # Step 2: what is left of all sources, in their order, fills the ranks with room in theirs
        left_S = (counts_SR - accepted_SR).sum(dim=1)
        first_left = left_S[:source].sum()
        ranks_T = ranks_TK[:, k]
        position_T = (one_hot(ranks_T, num_ranks).cumsum(dim=0) - 1).gather(1, ranks_T.unsqueeze(1)).squeeze(1)
        is_left_T = position_T >= accepted_SR[source][ranks_T]
        number_T = first_left + is_left_T.cumsum(dim=0) - 1
        filled_R = room_R.cumsum(dim=0)
        taken_TK[:, k] = torch.where(is_left_T, torch.searchsorted(filled_R, number_T, right=True), ranks_T)
        room_R = room_R - (left_S.sum() - (filled_R - room_R)).clamp(min=0).minimum(room_R)
    return taken_TK


def distinct(experts_TK: torch.Tensor, experts_per_rank: int) -> torch.Tensor:
    """Each token's experts, none of them twice: the later choice takes the next free one of its rank.

    Args:
        experts_TK: experts; every rank has at least as many as a token has choices.
        experts_per_rank: E / R.
    """
    found = [experts_TK[:, 0]]
    for expert_T in experts_TK.unbind(dim=1)[1:]:
        first_T, local_T = expert_T // experts_per_rank * experts_per_rank, expert_T % experts_per_rank
        for _ in range(len(found)):  # each try passes at least one of them
            is_twice_T = torch.stack([earlier_T == first_T + local_T for earlier_T in found]).any(dim=0)
            local_T = torch.where(is_twice_T, (local_T + 1) % experts_per_rank, local_T)
        found.append(first_T + local_T)
    return torch.stack(found, dim=1)
