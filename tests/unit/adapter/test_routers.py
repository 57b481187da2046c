"""Counters on routers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

from megatron_smartmoe.adapter.moe.routers import count_tokens
from megatron_smartmoe.runtime.counts import ExpertCounts


class Router(torch.nn.Module):
    """Returns what a router returns: probabilities, and which experts each token chose."""

    def __init__(self, routing_map_TE: Any) -> None:
        super().__init__()
        self.routing_map_TE = routing_map_TE
        self.config = SimpleNamespace(moe_pad_expert_input_to_capacity=False)

    def forward(self, rows: torch.Tensor) -> tuple[torch.Tensor, Any]:
        return rows, self.routing_map_TE


def test_a_router_adds_its_map_up_once_for_all_that_count() -> None:
    routing_map_TE = mock.Mock()
    routing_map_TE.sum.return_value = torch.tensor([2, 0, 1])
    layer: Any = mock.Mock(router=Router(routing_map_TE))
    counts = [ExpertCounts(4, 3, "cpu") for _ in range(3)]
    for each in counts:
        count_tokens([(2, layer)], each)
    layer.router(torch.zeros(1))
    layer.router(torch.zeros(1))
    with torch.no_grad():
        layer.router(torch.zeros(1))
    assert [call.kwargs for call in routing_map_TE.sum.call_args_list] == [{"dim": 0}] * 2
    for each in counts:
        assert each.local_LE.tolist() == [[0, 0, 0], [0, 0, 0], [4, 0, 2], [0, 0, 0]]
