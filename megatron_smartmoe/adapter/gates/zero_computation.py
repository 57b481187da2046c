"""MoE++ (Jin et al. 2024, arXiv 2410.07348): experts that cost nothing beside those that compute."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

import torch
from megatron.core.transformer.moe.moe_utils import router_gating_linear

from megatron_smartmoe.adapter.gates.residuals import Link
from megatron_smartmoe.adapter.gates.router import Choice, GateRouter, fitting, one_hot, settled, spread
from megatron_smartmoe.adapter.gates.table import GATE, RESIDUALS, TAU_DEFAULT, ZeroExperts
from megatron_smartmoe.errors import CompatError


class ZeroComputationRouter(GateRouter):
    """Top-k of the softmax over E experts and Z that cost nothing: they are computed where the token is.

    - A zero expert returns 0 (eq. 3), a copy expert its input (eq. 4), a constant expert a1 x + a2 v with
      [a1, a2] = softmax(W_c x) and a vector v that is trained (eq. 5). Behind the others, in this order.
    - Weights are softmax probabilities over all E + Z, of the k best ones.
    - Loss (eq. 7): the sum of eta x f x P over all experts, with the share f of tokens that choose one, its mean
      probability P, and eta 1 for an expert that computes and tau for the others. It is multiplied by (E + Z) / k, so
      that an even load with tau = 1 has loss 1.
    - Capacity (eq. 8): factor x tokens x k / (tau E + Z) for an expert that costs nothing, tau times as many for the
      others, rounded up. The paper's formula is for tokens; here it is for their choices, as Megatron's is. First
      choices go first.

    Gating residuals (eq. 6): the scores of a layer are W x + W_g s with the scores s of the MoE layer before, which are
    0 for the first one. Pipeline stages exchange hidden states alone: with several of them, each begins with s = 0.

    Dispatch, homes, replicas and every count of them know the E experts only: what chose another one never leaves its
    rank. `beside` is the sum of those others.

    Attributes:
        experts: how many there are of each kind.
        tau: above.
        has_residuals: whether there are gating residuals.
        link: where the scores of the layer before come from; set by `steps.GateSteps`.
    """

    experts = ZeroExperts()
    tau = TAU_DEFAULT
    has_residuals = True
    link: Link | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        hidden, constants = self.config.hidden_size, self.experts.constant
        self.zero_weight = self._parameter(self.experts.total, hidden)
        if constants:
            self.constant_weight = self._parameter(2 * constants, hidden)
            self.constant_vector = self._parameter(constants, hidden)
        if self.has_residuals:
            num_all = self.num_experts + self.experts.total
            self.residual_weight = self._parameter(num_all, num_all)
        self._weights_TZ: torch.Tensor | None = None  # of the tokens that were routed last

    @classmethod
    def of_run(cls, args: Namespace) -> type[GateRouter]:
        """This router with what a run's flags say."""
        experts, tau = ZeroExperts.parse(args.smartmoe_zero_experts), float(args.smartmoe_zero_experts_tau)
        has_residuals = args.smartmoe_gate_residuals == "on"
        return settled(cls, experts=experts, tau=tau, has_residuals=has_residuals)  # type: ignore[arg-type]  # a class is hashable

    def _parameter(self, *shape: int) -> torch.nn.Parameter:
        """A parameter that starts as Megatron's router does."""
        parameter = torch.nn.Parameter(torch.empty(shape, dtype=torch.float32))
        if self.config.perform_initialization:
            self.config.init_method(parameter)
        parameter.data = parameter.data.to(dtype=self.config.params_dtype)
        setattr(parameter, "sequence_parallel", self.config.sequence_parallel)  # noqa: B010  # mypy knows none
        return parameter

    def gating(self, input: torch.Tensor) -> torch.Tensor:
        """Scores of the experts, and behind them of those that cost nothing.

        Raises:
            CompatError: the router does not know which layer is before its own.
        """
        for parameter in self.parameters():
            if parameter.device != input.device:  # as Megatron does for its weight
                parameter.data = parameter.data.to(device=input.device)
        if not self.has_residuals:
            return self._own_scores(input)
        if self.link is None:
            raise CompatError(
                f"{GATE} moe++: the model was called before its layers were linked, so its gating residuals are not "
                f"defined. Train with Megatron's loop, or a session of your own loop; or pass {RESIDUALS} off."
            )
        number = self.link.number(training=self.training)
        input, before = self.link.take(number, input)
        scores = self._own_scores(input)
        before = torch.zeros_like(scores) if before is None else before  # the first layer's matrix has slope 0
        residual: torch.Tensor = router_gating_linear(before, self.residual_weight, None, scores.dtype)
        return self.link.give(number, scores + residual)

    def _own_scores(self, input: torch.Tensor) -> torch.Tensor:
        """W x, of all experts."""
        scores: torch.Tensor = super().gating(input)
        zero: torch.Tensor = router_gating_linear(input, self.zero_weight, None, scores.dtype)
        return torch.cat([scores, zero], dim=-1)

    def choose(self, logits_TE: torch.Tensor, num_rows: int) -> Choice:
        """See the class; columns of `logits_TE` are all E + Z experts."""
        num_all = self.num_experts + self.experts.total
        # Step 1: the best of all experts, and which choices fit
        probs_TA = torch.softmax(logits_TE, dim=1)
        best_TK, experts_TK = probs_TA.topk(self.topk, dim=1)
        chosen_KTA = [one_hot(experts_T, num_all) for experts_T in experts_TK.unbind(dim=1)]
        kept_TA = fitting(chosen_KTA, self._capacities(experts_TK))
        weights_TA = spread(best_TK, experts_TK, num_all) * kept_TA
        # Step 2: the loss, of the choices before any is dropped
        loss = None
        if self.has_loss:
            num_tokens = len(probs_TA) * self.tp_cp_group.size()
            eta_A = probs_TA.new_full((num_all,), self.tau)
            eta_A[: self.num_experts] = 1
            share_A = self.over_ranks(torch.stack(chosen_KTA).sum(dim=(0, 1)).to(probs_TA.dtype)) / num_tokens
            mean_A = self.over_ranks(probs_TA.sum(dim=0)) / num_tokens
            loss = (eta_A * share_A * mean_A).sum() * num_all / self.topk
        # Step 3: what stays on this rank, until the layer asks for it
        self._weights_TZ = weights_TA[:, self.num_experts :]
        return Choice(weights_TE=weights_TA[:, : self.num_experts], chosen_TE=kept_TA[:, : self.num_experts], loss=loss)

    def _capacities(self, experts_TK: torch.Tensor) -> torch.Tensor:
        """Eq. 8, of each expert, `[E + Z]`."""
        num_zero = self.experts.total
        of_zero = self.config.moe_expert_capacity_factor * experts_TK.numel() / (self.tau * self.num_experts + num_zero)
        places_A = torch.full((self.num_experts + num_zero,), of_zero, dtype=torch.float64, device=experts_TK.device)
        places_A[: self.num_experts] *= self.tau
        return places_A.ceil().long()

    def beside(self, hidden: torch.Tensor) -> torch.Tensor:
        """The weighted sum of the experts that cost nothing, for the tokens that were routed last.

        Args:
            hidden: what was routed, `[rows, samples, hidden]`.
        """
        assert self._weights_TZ is not None, "nothing was routed"
        weights_TZ, self._weights_TZ = self._weights_TZ.to(hidden.dtype), None
        x_TH = hidden.reshape(len(weights_TZ), -1)
        first_copy, first_constant = self.experts.zero, self.experts.zero + self.experts.copy
        output_TH = x_TH * weights_TZ[:, first_copy:first_constant].sum(dim=1, keepdim=True)
        if self.experts.constant:
            weights_TC = weights_TZ[:, first_constant:]
            logits_TC2 = torch.nn.functional.linear(x_TH, self.constant_weight).view(len(x_TH), -1, 2)
            of_input_TC, of_vector_TC = torch.softmax(logits_TC2, dim=2).unbind(dim=2)
            output_TH = output_TH + x_TH * (weights_TC * of_input_TC).sum(dim=1, keepdim=True)
            output_TH = output_TH + (weights_TC * of_vector_TC) @ self.constant_vector
        return output_TH.view_as(hidden)
