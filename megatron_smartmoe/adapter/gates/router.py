"""GateRouter: Megatron's router with another gate in it, the base of the routers of this package.

A gate is a function of the logits, `choose`: which experts each token takes, with which weights, and its loss. All
that is around it stays Megatron's: weights, z-loss, the scale of the loss, its line in the log. A gate knows logical
experts only, so balancing cannot change what it chooses.
"""

from __future__ import annotations

import functools
import importlib
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core.transformer.moe.router import TopKRouter

from megatron_smartmoe.adapter.gates.draws import Draws
from megatron_smartmoe.adapter.gates.table import GATES, has_router
from megatron_smartmoe.errors import CompatError


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What a gate makes of a micro-batch.

    Attributes:
        weights_TE: of the chosen experts, 0 for the others.
        chosen_TE: bool.
        loss: the gate's own loss over all tokens of the micro-batch, without its coefficient; None for none.
    """

    weights_TE: torch.Tensor
    chosen_TE: torch.Tensor
    loss: torch.Tensor | None = None


class GateRouter(TopKRouter):
    """Base of the gates.

    Attributes:
        draws: this router's random numbers; set by `steps.GateSteps`, for gates that draw.
    """

    draws: Draws | None = None

    @classmethod
    def of_run(cls, args: Namespace) -> type[GateRouter]:
        """This router with what it needs of a run's arguments, besides Megatron's configuration."""
        return cls

    def choose(self, logits_TE: torch.Tensor, num_rows: int) -> Choice:
        """The gate.

        Args:
            logits_TE: of all experts, float32 or wider, rows in Megatron's order (position first).
            num_rows: rows per sample on this rank, so that T = num_rows x samples.
        """
        raise NotImplementedError

    def routing(
        self, logits: torch.Tensor, padding_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Megatron's step between the logits and the dispatch.

        Args:
            logits: `[rows, samples, experts]`.
            padding_mask: refused.

        Raises:
            CompatError: tokens are masked, which the gates' definitions do not know.
        """
        if padding_mask is not None:
            raise CompatError(
                f"--smartmoe-gate: {type(self).__name__} = called with a padding mask: the gate's balance would count "
                "padding. Train on packed sequences without padding, or remove --smartmoe-gate."
            )
        # Step 1: the gate
        num_rows, dtype = logits.shape[0], logits.dtype
        logits_TE = self.gate_logits(logits.reshape(-1, logits.shape[-1]))
        choice = self.choose(logits_TE.to(torch.promote_types(dtype, torch.float32)), num_rows)
        weights_TE = choice.weights_TE.to(dtype)
        # Step 2: its loss, which the weights carry into the backward pass
        if choice.loss is not None:
            weights_TE = self._with_loss(weights_TE, choice.loss)
        return weights_TE, choice.chosen_TE

    def gate_logits(self, logits_TE: torch.Tensor) -> torch.Tensor:
        """What `choose` gets, of what `gating` returns: with Megatron's z-loss attached."""
        with_z_loss: torch.Tensor = self.apply_z_loss(logits_TE)
        return with_z_loss

    @property
    def has_loss(self) -> bool:
        """Whether the gate's loss is wanted in this pass: not in evaluation, nor where nothing is differentiated."""
        return bool(self.training and torch.is_grad_enabled() and self.loss_coeff > 0)

    @property
    def loss_coeff(self) -> float:
        """`--moe-aux-loss-coeff`."""
        return float(self.get_aux_loss_coeff("aux_loss"))

    def over_ranks(self, sums: torch.Tensor) -> torch.Tensor:
        """Sums over this rank's tokens made sums over all tokens of the micro-batch.

        The ranks that share a micro-batch are those of sequence and context parallelism. The gradient is that of this
        rank's own part: Megatron adds the ranks' gradients up.
        """
        if self.tp_cp_group.size() == 1:
            return sums
        total = sums.detach().clone()
        dist.all_reduce(total, group=self.tp_cp_group)
        return sums + (total - sums.detach())

    def first_choice_loss(self, probs_TE: torch.Tensor, first_TE: torch.Tensor) -> torch.Tensor:
        """l_aux of GShard's algorithm 1, times E^2, so that it is 1 where the load is even.

        Args:
            probs_TE: softmax over all experts.
            first_TE: each token's first choice, before any is dropped.
        """
        num_tokens: int = len(probs_TE) * self.tp_cp_group.size()
        share_E = self.over_ranks(first_TE.sum(dim=0).to(probs_TE.dtype)) / num_tokens
        mean_E = self.over_ranks(probs_TE.sum(dim=0)) / num_tokens
        return (share_E * mean_E).sum() * probs_TE.shape[1]

    def _with_loss(self, weights_TE: torch.Tensor, loss: torch.Tensor) -> torch.Tensor:
        # Every rank has the whole loss, and Megatron logs the sum over the ranks: its value is divided, not its slope.
        share = loss - loss.detach() * (1 - 1 / self.tp_cp_group.size())
        attached: torch.Tensor = self.attach_and_log_load_balancing_loss(
            weights_TE,
            self.loss_coeff,
            self.loss_coeff * share,
            "load_balancing_loss",
            self.tp_cp_group,
            valid_token_count=len(weights_TE),
        )
        return attached


def spread(values_TK: torch.Tensor, experts_TK: torch.Tensor, num_experts: int) -> torch.Tensor:
    """Values of chosen experts as rows over all experts, 0 for the others."""
    zeros_TE = values_TK.new_zeros(len(values_TK), num_experts)
    return zeros_TE.scatter(1, experts_TK, values_TK)


def one_hot(experts_T: torch.Tensor, num_experts: int) -> torch.Tensor:
    """Bool rows over all experts."""
    return experts_T.unsqueeze(1) == torch.arange(num_experts, device=experts_T.device)


def fitting(chosen_KTE: Sequence[torch.Tensor], capacity: int | torch.Tensor) -> torch.Tensor:
    """Which choices get a place in their expert's buffer, bool `[T, E]`.

    First choices go first, in the order of the tokens, then second ones and so on; a choice that finds no place is
    counted all the same.

    Args:
        chosen_KTE: every token's first choice, second choice and so on, bool `[T, E]` each.
        capacity: places of an expert; one number, or `[E]`.
    """
    kept_TE, before_E = torch.zeros_like(chosen_KTE[0]), torch.zeros_like(chosen_KTE[0][0], dtype=torch.int64)
    for chosen_TE in chosen_KTE:
        position_TE = before_E + chosen_TE.cumsum(dim=0) - 1
        kept_TE = kept_TE | (chosen_TE & (position_TE < capacity))
        before_E = before_E + chosen_TE.sum(dim=0)
    return kept_TE


@functools.cache
def settled(router: type[GateRouter], **settings: object) -> type[GateRouter]:
    """A gate with other settings than its class has; the same class for the same settings."""
    return type(router.__name__, (router,), {"__module__": router.__module__, "__doc__": router.__doc__, **settings})


def router_of(gate: str) -> type[GateRouter] | None:
    """The router of a gate by its name, before a run's settings; None for Megatron's own."""
    if not has_router(gate):
        return None
    module, _, name = str(GATES[gate].router).partition(":")
    found: type[GateRouter] = getattr(importlib.import_module(f"megatron_smartmoe.adapter.gates.{module}"), name)
    return found
