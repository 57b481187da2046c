"""Gates outside of a model: routers of one rank, which need no process groups."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

from megatron_smartmoe.adapter.gates.draws import Draws, Part
from megatron_smartmoe.adapter.gates.residuals import Link
from megatron_smartmoe.adapter.gates.router import GateRouter, router_of
from megatron_smartmoe.adapter.gates.table import GATES

HIDDEN = 4
SEED = 11


def router(gate: str, num_experts: int, top_k: int, cls: type[GateRouter] | None = None, **changes: Any) -> Any:
    """The router of a gate as a rank alone has it, in training, in the first iteration of one micro-batch each.

    Args:
        gate: its name.
        num_experts: E.
        top_k: k.
        cls: with settings; None for the gate's own.
        changes: of the configuration.
    """
    from megatron.core.transformer.transformer_config import TransformerConfig

    values = {"moe_router_load_balancing_type": "none", "moe_aux_loss_coeff": 0.0}
    if GATES[gate].sets["--moe-router-load-balancing-type"] == "aux_loss":
        values = {"moe_router_load_balancing_type": "aux_loss", "moe_aux_loss_coeff": 0.5}
    config = TransformerConfig(
        num_layers=2,
        hidden_size=HIDDEN,
        num_attention_heads=2,
        add_bias_linear=False,
        num_moe_experts=num_experts,
        moe_router_topk=top_k,
        moe_router_score_function=GATES[gate].sets["--moe-router-score-function"],
        **(values | changes),
    )
    alone = mock.Mock(**{"size.return_value": 1, "rank.return_value": 0})
    names = ("tp", "cp", "tp_cp", "tp_dp_cp", "ep", "tp_ep")
    cls = cls or router_of(gate)
    assert cls is not None
    built = cls(config=config, pg_collection=SimpleNamespace(**dict.fromkeys(names, alone)))
    built.set_layer_number(1)
    built.draws = Draws(SEED, 0, Part())
    built.draws.begin(1, 1)
    built.link = Link(before=None, after=None)
    built.link.begin(1)
    return built


def logits_of(rows: list[list[float]]) -> torch.Tensor:
    """Logits in float64, for which a gradient check holds."""
    return torch.tensor(rows, dtype=torch.float64, requires_grad=True)
