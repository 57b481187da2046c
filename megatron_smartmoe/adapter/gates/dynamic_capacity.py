"""Tutel's dynamic capacity (Hwang et al. 2022, arXiv 2206.03382): as many places as are needed, up to a bound."""

from __future__ import annotations

import torch
from megatron.core.transformer.moe.moe_utils import get_capacity

from megatron_smartmoe.adapter.gates.router import Choice, GateRouter, fitting, one_hot, spread


class DynamicCapacityRouter(GateRouter):
    """Top-k of the softmax, weights divided by their sum, and Tutel's capacity.

    In Tutel a capacity factor of 0 gives every expert the places that the fullest one of the micro-batch needs, and -x
    no more than the factor x would. Its places are padded; here experts get their tokens without padding, so places
    that nobody needs do not exist, and the bound alone is left: `--moe-expert-capacity-factor x` stands for Tutel's -x,
    the number of experts for its 0. What exceeds it is dropped as there, first choices last and later tokens before
    earlier ones. The loss is GShard's, as in Tutel: of first choices, times E^2.
    """

    def choose(self, logits_TE: torch.Tensor, num_rows: int) -> Choice:
        """See the class."""
        probs_TE = torch.softmax(logits_TE, dim=1)
        best_TK, experts_TK = probs_TE.topk(self.topk, dim=1)
        chosen_KTE = [one_hot(experts_T, self.num_experts) for experts_T in experts_TK.unbind(dim=1)]
        capacity = get_capacity(experts_TK.numel(), self.num_experts, self.config.moe_expert_capacity_factor)
        kept_TE = fitting(chosen_KTE, capacity)
        weights_TE = spread(best_TK / best_TK.sum(dim=1, keepdim=True), experts_TK, self.num_experts) * kept_TE
        loss = self.first_choice_loss(probs_TE, chosen_KTE[0]) if self.has_loss else None
        return Choice(weights_TE=weights_TE, chosen_TE=kept_TE, loss=loss)
