"""BASE layers (Lewis et al. 2021, arXiv 2103.16716): tokens are assigned to experts, the same number to each."""

from __future__ import annotations

import numpy as np
import torch

from megatron_smartmoe.adapter.gates.auction import balanced_assignment
from megatron_smartmoe.adapter.gates.router import Choice, GateRouter, spread
from megatron_smartmoe.errors import CompatError, PlanError


class BaseRouter(GateRouter):
    """One expert per token, weighted by the sigmoid of the token's score for it; no loss.

    In training the experts are those of the assignment with the largest sum of scores among all that give every expert
    the same number of a rank's tokens, as the paper's section 3.1 has it, exact but for a rounding of the scores to
    2^20 levels. The paper first spreads the tokens of all ranks at random; here a rank assigns those of its own
    micro-batch. In evaluation each token takes its best expert.

    The assignment is computed on the host: it waits for the scores of its micro-batch once per layer.
    """

    def choose(self, logits_TE: torch.Tensor, num_rows: int) -> Choice:
        """See the class.

        Raises:
            CompatError: the tokens of this rank cannot be divided among the experts.
            PlanError: a score is not finite.
        """
        if not self.training:
            expert_T = logits_TE.argmax(dim=1)
        elif len(logits_TE) % self.num_experts:
            raise CompatError(
                f"--smartmoe-gate base: tokens of a rank's micro-batch = {len(logits_TE)}: must be divisible by the "
                f"{self.num_experts} experts. Change --micro-batch-size or --seq-length."
            )
        else:
            scores_TE = logits_TE.detach().float().cpu().numpy()
            if not np.isfinite(scores_TE).all():
                raise PlanError(
                    "--smartmoe-gate base: scores = not finite: there is no assignment. The training diverged."
                )
            expert_T = torch.from_numpy(balanced_assignment(scores_TE)).to(logits_TE.device)
        experts_T1 = expert_T.unsqueeze(1)
        weights_T1 = torch.sigmoid(logits_TE.gather(1, experts_T1))
        chosen_TE = torch.zeros_like(logits_TE, dtype=torch.bool).scatter(1, experts_T1, True)
        return Choice(weights_TE=spread(weights_T1, experts_T1, self.num_experts), chosen_TE=chosen_TE)
