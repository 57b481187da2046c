"""FasterMoE's topology-aware gate (He et al., PPoPP 2022): few tokens leave the node."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_smartmoe.adapter.cost_inputs import ranks_per_node
from megatron_smartmoe.adapter.gates.router import Choice, GateRouter, one_hot, settled, spread
from megatron_smartmoe.adapter.gates.table import OUTGOING_DEFAULT
from megatron_smartmoe.errors import CompatError


class TopologyRouter(GateRouter):
    """Two experts; where too many first choices are on other nodes, only the best of them may go there.

    As its authors' code has it (`faster_gate.py` of FastMoE): a token whose best expert is on another node is outgoing.
    While these are at most the share `--smartmoe-gate-outgoing` of a rank's tokens, every token gets its two best
    experts. Else it gets the two best ones on its own node, but the outgoing tokens with the highest scores of their
    best expert, as many as the share allows, get that expert in place of their second one. Weights are the softmax of
    the logits of the two experts. The loss is GShard's, of first choices, times E^2 of all experts (the code takes the
    experts of one rank).

    An expert is on the node that has it when training starts: "on its own node" is a matter of logical ranks. So moving
    experts, or replicas, changes nothing in the training; it saves traffic exactly as long as experts are at home. It
    is the same in training and evaluation.

    Attributes:
        outgoing: the share.
    """

    outgoing = OUTGOING_DEFAULT

    @classmethod
    def of_run(cls, args: Namespace) -> type[GateRouter]:
        """This router with the share of a run."""
        return settled(cls, outgoing=float(args.smartmoe_gate_outgoing))  # type: ignore[arg-type]  # a class is hashable

    def __init__(self, *args: Any, pg_collection: ProcessGroupCollection, **kwargs: Any) -> None:
        super().__init__(*args, pg_collection=pg_collection, **kwargs)
        ranks, per_node = dist.get_process_group_ranks(pg_collection.ep), ranks_per_node()
        own_node = ranks[pg_collection.ep.rank()] // per_node
        experts_per_rank = self.num_experts // len(ranks)
        is_near_R = torch.tensor([rank // per_node == own_node for rank in ranks])
        self.is_near_E = is_near_R.repeat_interleave(experts_per_rank).to(torch.cuda.current_device())
        if int(is_near_R.sum()) * experts_per_rank < 2:
            raise CompatError(
                "--smartmoe-gate topology: experts on a node = 1: must be at least 2, so that a token can stay there. "
                "Use fewer expert-parallel ranks, or another gate."
            )

    def choose(self, logits_TE: torch.Tensor, num_rows: int) -> Choice:
        """See the class."""
        experts_T2 = near_or_best(logits_TE.detach(), self.is_near_E, self.outgoing)
        weights_T2 = torch.softmax(logits_TE.gather(1, experts_T2), dim=1)
        chosen_TE = torch.zeros_like(logits_TE, dtype=torch.bool).scatter(1, experts_T2, True)
        loss = None
        if self.has_loss:
            loss = self.first_choice_loss(
                torch.softmax(logits_TE, dim=1), one_hot(logits_TE.argmax(dim=1), self.num_experts)
            )
        return Choice(weights_TE=spread(weights_T2, experts_T2, self.num_experts), chosen_TE=chosen_TE, loss=loss)


def near_or_best(logits_TE: torch.Tensor, is_near_E: torch.Tensor, share: float) -> torch.Tensor:
    """The two experts of each token, `[T, 2]`; without a wait for the device.

    Args:
        logits_TE: of all experts.
        is_near_E: which of them are on the tokens' node.
        share: of the tokens, whose best expert may be on another node.
    """
    # Step 1: the best ones, and who would leave the node
    scores_T2, best_T2 = logits_TE.topk(2, dim=1)
    is_outgoing_T = ~is_near_E[best_T2[:, 0]]
    allowed = int(share * len(logits_TE))
    # Step 2: the two best ones on the node; the best of those who would leave may
    near_T2 = logits_TE.masked_fill(~is_near_E, -torch.inf).topk(2, dim=1).indices
    order_T = scores_T2[:, 0].masked_fill(~is_outgoing_T, -torch.inf).argsort(descending=True, stable=True)
    place_T = torch.empty_like(order_T).scatter(0, order_T, torch.arange(len(order_T), device=order_T.device))
    leaves_T = is_outgoing_T & (place_T < allowed)
    second_T = torch.where(leaves_T, best_T2[:, 0], near_T2[:, 1])
    # Step 3: which of the two rules holds
    return torch.where(is_outgoing_T.sum() <= allowed, best_T2, torch.stack([near_T2[:, 0], second_T], dim=1))
