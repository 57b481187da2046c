"""Noisy top-k gating (Shazeer et al. 2017, arXiv 1701.06538): trained noise, and losses on importance and load."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.moe.moe_utils import router_gating_linear

from megatron_smartmoe.adapter.gates.router import Choice, GateRouter, spread

_EPSILON = 1e-10  # in the squared coefficient of variation: no expert has a load of its own before training


class NoisyTopKRouter(GateRouter):
    """The gate of the paper's section 2.1, with the losses of section 4 and appendix A.

    Eq. 3: G(x) = softmax(keep_top_k(H(x), k)). Eq. 4: H(x)_i = (x W_g)_i + N(0, 1) softplus((x W_noise)_i). Eq. 5: what
    is not among the k is -inf. Eq. 6-7: importance, the sum of G over the micro-batch, and its loss, the squared
    coefficient of variation. Eq. 8-11: load, the sum of the probabilities that another draw of an expert's noise would
    leave it among the k, and its loss. Both losses have the coefficient `--moe-aux-loss-coeff`; as in the paper's code
    the coefficient of variation is that of the population.

    In evaluation there is no noise. `noise_weight` starts at zero, as in appendix A; W_g is Megatron's `weight` and
    starts as Megatron has it, where the paper starts it at zero too.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.noise_weight = torch.nn.Parameter(torch.zeros_like(self.weight))
        setattr(self.noise_weight, "sequence_parallel", self.config.sequence_parallel)  # noqa: B010  # mypy knows none

    def gating(self, input: torch.Tensor) -> torch.Tensor:
        """Megatron's logits, and behind them those of the noise in training."""
        logits: torch.Tensor = super().gating(input)
        if not self.training:
            return logits
        if self.noise_weight.device != input.device:  # as Megatron does for its weight
            self.noise_weight.data = self.noise_weight.data.to(device=input.device)
        noise: torch.Tensor = router_gating_linear(input, self.noise_weight, None, logits.dtype)
        return torch.cat([logits, noise], dim=-1)

    def gate_logits(self, logits_TE: torch.Tensor) -> torch.Tensor:
        """The z-loss is one of the clean logits."""
        clean_TE, noise_TE = logits_TE[:, : self.num_experts], logits_TE[:, self.num_experts :]
        return torch.cat([super().gate_logits(clean_TE), noise_TE], dim=1)

    def choose(self, logits_TE: torch.Tensor, num_rows: int) -> Choice:
        """See the class."""
        clean_TE, noise_TE = logits_TE[:, : self.num_experts], logits_TE[:, self.num_experts :]
        if not self.training:
            weights_TE, chosen_TE, _ = keep_top_k(clean_TE, self.topk)
            return Choice(weights_TE=weights_TE, chosen_TE=chosen_TE)
        assert self.draws is not None
        uniform_TE = self.draws.uniform(num_rows, len(clean_TE) // num_rows, self.num_experts, clean_TE.device)
        scale_TE = torch.nn.functional.softplus(noise_TE)
        noisy_TE = clean_TE + torch.special.ndtri(uniform_TE).to(clean_TE.dtype) * scale_TE
        weights_TE, chosen_TE, threshold_TE = keep_top_k(noisy_TE, self.topk)
        loss = None
        if self.has_loss:
            importance_E = self.over_ranks(weights_TE.sum(dim=0))
            load_E = self.over_ranks(torch.special.ndtr((clean_TE - threshold_TE) / scale_TE).sum(dim=0))
            loss = squared_variation(importance_E) + squared_variation(load_E)
        return Choice(weights_TE=weights_TE, chosen_TE=chosen_TE, loss=loss)


def keep_top_k(scores_TE: torch.Tensor, top_k: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Eq. 3 and 5: weights and choice of each token, and `kth_excluding` of eq. 8.

    Args:
        scores_TE: H(x).
        top_k: less than the number of experts.

    Returns:
        Weights, choice, and for each expert the k-th best score among the others.
    """
    best_TK, experts_TK = scores_TE.topk(top_k + 1, dim=1)
    weights_TE = spread(torch.softmax(best_TK[:, :top_k], dim=1), experts_TK[:, :top_k], scores_TE.shape[1])
    chosen_TE = torch.zeros_like(scores_TE, dtype=torch.bool).scatter(1, experts_TK[:, :top_k], True)
    # Without an expert that is among the k, the next one moves up; without another one nothing changes.
    threshold_TE = torch.where(chosen_TE, best_TK[:, top_k:], best_TK[:, top_k - 1 : top_k])
    return weights_TE, chosen_TE, threshold_TE


def squared_variation(values_E: torch.Tensor) -> torch.Tensor:
    """Squared coefficient of variation, of a population."""
    return values_E.var(correction=0) / (values_E.mean().square() + _EPSILON)
