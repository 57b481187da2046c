"""FastMoE's distributed capacity (its `DCGate`): an expert's capacity is one for the tokens of all ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_utils import get_capacity

from megatron_smartmoe.adapter.gates.router import Choice, GateRouter, one_hot, spread


class DistributedCapacityRouter(GateRouter):
    """GShard's top-k and loss, with a capacity that the ranks of an expert-parallel group share.

    With a capacity per rank a rank drops choices although other ranks leave places of the same expert empty. Here an
    expert has `ceil(tokens x k / experts x capacity factor)` places for the tokens of all ranks that exchange tokens,
    and gives them to choices in the order of the ranks that they come from.

    FastMoE defines it in code alone, whose counters decide by chance which tokens of a rank are dropped, and whose
    capacity knows neither k nor the number of experts. Here first choices go before second ones, as in GShard's
    algorithm 1, earlier tokens of a rank before later ones, and the capacity is Megatron's formula.
    """

    def __init__(self, *args: Any, pg_collection: ProcessGroupCollection, **kwargs: Any) -> None:
        super().__init__(*args, pg_collection=pg_collection, **kwargs)
        self.sources = pg_collection.tp_ep

    def choose(self, logits_TE: torch.Tensor, num_rows: int) -> Choice:
        """See the class. A collective call of the ranks that exchange tokens."""
        # Step 1: the best experts, and their weights
        probs_TE = torch.softmax(logits_TE, dim=1)
        best_TK, experts_TK = probs_TE.topk(self.topk, dim=1)
        weights_TK = best_TK / best_TK.sum(dim=1, keepdim=True)
        chosen_KTE = [one_hot(experts_T, self.num_experts) for experts_T in experts_TK.unbind(dim=1)]
        # Step 2: how many places are taken before this rank's choices, and which of these find one
        counts_KE = torch.stack([chosen_TE.sum(dim=0) for chosen_TE in chosen_KTE])
        counts_SKE = counts_KE.new_empty(self.sources.size() * self.topk, self.num_experts)
        dist.all_gather_into_tensor(counts_SKE, counts_KE, group=self.sources)
        counts_SKE = counts_SKE.view(self.sources.size(), self.topk, self.num_experts)
        before_KE = places_before(counts_SKE, self.sources.rank())
        num_choices = experts_TK.numel() * self.sources.size()
        capacity = get_capacity(num_choices, self.num_experts, self.config.moe_expert_capacity_factor)
        kept_TE = granted(chosen_KTE, before_KE, capacity)
        # Step 3: what is dropped leaves the other weights as they are
        weights_TE = spread(weights_TK, experts_TK, self.num_experts) * kept_TE
        loss = self.first_choice_loss(probs_TE, chosen_KTE[0]) if self.has_loss else None
        return Choice(weights_TE=weights_TE, chosen_TE=kept_TE, loss=loss)


def places_before(counts_SKE: torch.Tensor, source: int) -> torch.Tensor:
    """Places of each expert that are taken before the choices of one source, by the number of the choice, `[K, E]`.

    Args:
        counts_SKE: choices of each source, by their number, for each expert.
        source: whose choices.
    """
    num_sources, top_k, num_experts = counts_SKE.shape
    in_order = counts_SKE.transpose(0, 1).reshape(
        top_k * num_sources, num_experts
    )  # first choices of all sources first
    before = in_order.cumsum(dim=0) - in_order
    return before.view(top_k, num_sources, num_experts)[:, source]


def granted(chosen_KTE: Sequence[torch.Tensor], before_KE: torch.Tensor, capacity: int) -> torch.Tensor:
    """Which choices of this rank get a place, bool `[T, E]`.

    Args:
        chosen_KTE: every token's first choice, second choice and so on, bool `[T, E]` each.
        before_KE: places that are taken before those.
        capacity: places of an expert.
    """
    kept_TE = torch.zeros_like(chosen_KTE[0])
    for chosen_TE, before_E in zip(chosen_KTE, before_KE, strict=True):
        kept_TE = kept_TE | (chosen_TE & (before_E + chosen_TE.cumsum(dim=0) <= capacity))
    return kept_TE
