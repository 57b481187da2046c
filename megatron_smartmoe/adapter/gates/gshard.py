"""GShard's gate (Lepikhin et al. 2020, arXiv 2006.16668, algorithm 1): two experts, the second one by chance."""

from __future__ import annotations

import torch
from megatron.core.transformer.moe.moe_utils import get_capacity

from megatron_smartmoe.adapter.gates.router import Choice, GateRouter, fitting, one_hot, spread


class GShardRouter(GateRouter):
    """Algorithm 1 of the paper; its group is the tokens of a rank's micro-batch.

    - Weights: g1 and g2, softmax probabilities divided by their sum. What is dropped leaves the other one as it is.
    - Loss: l_aux = mean over experts of c_e / S x m_e, with the share c_e / S of tokens whose first choice is e, and
      the mean probability m_e. It is multiplied by E^2, so that an even load has loss 1 whatever E is, as with
      Megatron's own loss. Tokens of the whole micro-batch count, on all ranks that share it.
    - Capacity: first choices in the order of the tokens, and then second ones: position c_e in the expert's buffer must
      be below ceil(2 S / E x capacity factor). A choice that is not kept takes its position all the same.
    - The second choice is kept with probability min(1, 2 x g2), in training; in evaluation always.
    """

    def choose(self, logits_TE: torch.Tensor, num_rows: int) -> Choice:
        """See the class."""
        # Step 1: the two best experts, and their weights
        probs_TE = torch.softmax(logits_TE, dim=1)
        best_T2, experts_T2 = probs_TE.topk(2, dim=1)
        weights_T2 = best_T2 / best_T2.sum(dim=1, keepdim=True)
        chosen_2TE = [one_hot(experts_T2[:, i], self.num_experts) for i in range(2)]
        # Step 2: which of them fit, and which second ones chance keeps
        capacity = get_capacity(2 * len(logits_TE), self.num_experts, self.config.moe_expert_capacity_factor)
        kept_TE = fitting(chosen_2TE, capacity)
        if self.training:
            assert self.draws is not None
            uniform_T = self.draws.uniform(num_rows, len(logits_TE) // num_rows, 1, logits_TE.device).squeeze(1)
            unlucky_T = uniform_T >= 2 * weights_T2[:, 1]
            kept_TE = kept_TE & ~(chosen_2TE[1] & unlucky_T.unsqueeze(1))
        weights_TE = spread(weights_T2, experts_T2, self.num_experts) * kept_TE
        # Step 3: the loss
        loss = self.first_choice_loss(probs_TE, chosen_2TE[0]) if self.has_loss else None
        return Choice(weights_TE=weights_TE, chosen_TE=kept_TE, loss=loss)
