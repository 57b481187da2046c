"""Gating residuals of MoE++ (eq. 6): by hand, and their gradients with and without recomputation."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from megatron_smartmoe.adapter.gates.residuals import linked
from megatron_smartmoe.adapter.gates.router import settled
from megatron_smartmoe.adapter.gates.table import ZeroExperts
from megatron_smartmoe.adapter.gates.zero_computation import ZeroComputationRouter
from megatron_smartmoe.errors import CompatError
from tests.support.gates import HIDDEN, router

ROWS = 6
assert_close = functools.partial(torch.testing.assert_close, rtol=1e-5, atol=1e-6)


@pytest.fixture(autouse=True)
def weights_stay_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Megatron's router moves its weights to the device that CUDA names, and there is none."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: torch.device("cpu"))


def routers(count: int, num_micro_batches: int = 1) -> list[Any]:
    """Routers of successive layers, two experts and one that costs nothing each."""
    cls = settled(ZeroComputationRouter, experts=ZeroExperts(zero=1, copy=0, constant=0))
    torch.manual_seed(5)
    built = [
        router("moe++", cls=cls, num_experts=2, top_k=2, moe_expert_capacity_factor=3.0, init_method_std=0.5)
        for _ in range(count)
    ]
    for gate, link in zip(built, linked(count), strict=True):
        gate.link = link
        link.begin(num_micro_batches)
    return built


def test_scores_go_from_layer_to_layer_by_hand() -> None:
    """W x of (1, 2, 3), then of (1, 0, 0) and the first scores backwards, then 0 and twice the second scores."""
    first, second, third = routers(3)
    x = torch.tensor([1.0, 0.0, 0.0, 0.0]).view(1, 1, HIDDEN)
    with torch.no_grad():
        for gate, of_x in ((first, [1.0, 2.0, 3.0]), (second, [1.0, 0.0, 0.0]), (third, [0.0, 0.0, 0.0])):
            rows = torch.tensor(of_x)
            gate.weight.zero_()[:, 0] = rows[:2]
            gate.zero_weight.zero_()[:, 0] = rows[2:]
        second.residual_weight.copy_(torch.eye(3).flip(0))
        third.residual_weight.copy_(2 * torch.eye(3))
    scores = [gate.gating(x).flatten().tolist() for gate in (first, second, third)]
    assert scores == [[1.0, 2.0, 3.0], [4.0, 2.0, 1.0], [8.0, 4.0, 2.0]]
    for gate in (first, second, third):
        gate.eval()
    with torch.no_grad():
        assert [gate.gating(x).flatten().tolist() for gate in (first, second, third)] == scores


def gradients(layers: list[Any], run: Any, batches: list[torch.Tensor]) -> list[torch.Tensor]:
    """Of all parameters and inputs, after all forward passes and then all backward passes, as a pipeline has them."""
    inputs = [batch.clone().requires_grad_() for batch in batches]
    outputs = [run(x) for x in inputs]
    for output in outputs:
        output.backward()
    found = [parameter.grad for gate in layers for parameter in gate.parameters()] + [x.grad for x in inputs]
    assert all(gradient is not None for gradient in found)
    copies = [gradient.clone() for gradient in found if gradient is not None]
    for gate in layers:
        gate.zero_grad(set_to_none=True)
    return copies


def layer(gate: Any, x: torch.Tensor) -> torch.Tensor:
    """A layer whose output depends on all scores; the second router's input is the first one's output."""
    scores = gate.gating(x)
    return torch.tanh(x + scores.softmax(dim=-1).sum(dim=-1, keepdim=True) * x + scores.sum(dim=-1, keepdim=True))


def test_gradients_are_those_of_one_graph_however_layers_are_recomputed() -> None:
    """Of three micro-batches under way at once: kept whole, each layer recomputed, or the first two together."""
    layers = routers(3, num_micro_batches=3)
    batches = list(torch.randn(3, ROWS, 2, HIDDEN, generator=torch.Generator().manual_seed(1)))

    def in_one_graph(x: torch.Tensor) -> torch.Tensor:
        before = torch.zeros(ROWS, 2, 3)
        for gate in layers:
            weight = torch.cat([gate.weight, gate.zero_weight])
            before = x @ weight.T + before @ gate.residual_weight.T
            scores = before
            x = torch.tanh(x + scores.softmax(dim=-1).sum(dim=-1, keepdim=True) * x + scores.sum(dim=-1, keepdim=True))
        return x.square().sum()

    def whole(x: torch.Tensor) -> torch.Tensor:
        for gate in layers:
            x = layer(gate, x)
        return x.square().sum()

    def recomputed(x: torch.Tensor) -> torch.Tensor:
        for gate in layers:
            x = checkpoint(layer, gate, x, use_reentrant=True)
        return x.square().sum()

    def partly(x: torch.Tensor) -> torch.Tensor:
        x = checkpoint(lambda x: layer(layers[1], layer(layers[0], x)), x, use_reentrant=True)
        return layer(layers[2], x).square().sum()

    expected = gradients(layers, in_one_graph, batches)
    assert all(float(gradient.abs().max()) > 0 for gradient in expected[3:])  # the first matrix alone has none
    for run in (whole, recomputed, partly):
        for gate in layers:
            gate.link.begin(3)
        found = gradients(layers, run, batches)
        for ours, theirs in zip(found, expected, strict=True):
            assert_close(ours, theirs)
        for gate in layers[:-1]:  # nothing is kept beyond the backward passes
            assert not gate.link._after._values
            assert not gate.link._after._slopes


def test_a_router_without_a_place_in_the_row_is_refused() -> None:
    (gate,) = routers(1)
    gate.link = None
    with pytest.raises(CompatError, match="called before its layers were linked"):
        gate.gating(torch.zeros(1, 1, HIDDEN))
    (gate.link,) = linked(1)
    with pytest.raises(CompatError, match="called before an iteration started"):
        gate.gating(torch.zeros(1, 1, HIDDEN))
