"""Spare GEMMs of TransformerEngine's grouped linear, on a stand-in for it: what can be said without the package.

scripts/test_transformer_engine.sh runs the same class on the real one.
"""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

import pytest
import torch

HOMES, SPARES, ROWS, IN, OUT = 2, 2, 6, 4, 3


class _Gemms(torch.autograd.Function):
    """y = x W^T + b by slot; weight gradients are added to `main_grad`, or returned, as TransformerEngine's are."""

    @staticmethod
    def forward(
        ctx: Any, rows: torch.Tensor, splits: list[int], fused: bool, is_first: bool, *weights: torch.Tensor
    ) -> torch.Tensor:
        ctx.rows, ctx.splits, ctx.fused, ctx.is_first, ctx.weights = rows, splits, fused, is_first, weights
        parts = zip(rows.split(splits), weights, strict=True)
        return torch.cat([part @ weight.T for part, weight in parts])

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[Any, ...]:
        parts = list(zip(ctx.rows.split(ctx.splits), gradients[0].split(ctx.splits), ctx.weights, strict=True))
        to_rows = torch.cat([gradient @ weight for _, gradient, weight in parts])
        to_weights: list[torch.Tensor | None] = [gradient.T @ part for part, gradient, _ in parts]
        if ctx.fused:
            for (_, _, weight), gradient in zip(parts, to_weights, strict=True):
                weight.main_grad.copy_(gradient if ctx.is_first else weight.main_grad + gradient)
                weight.grad_added_to_main_grad = True
            to_weights = [torch.empty_like(weight) for _, _, weight in parts]  # dummies
        return (to_rows, None, None, None, *to_weights)


class GroupedLinear(torch.nn.Module):
    """A stand-in for the part of TransformerEngine's grouped linear that spare GEMMs touch."""

    def __init__(self, *, fused: bool, has_bias: bool = False) -> None:
        super().__init__()
        self.has_bias = has_bias
        self.wgrad_store = SimpleNamespace(delay_wgrad_compute=lambda: False)
        self.num_gemms, self.fuse_wgrad_accumulation, self.ub_name = HOMES, fused, "fc1"
        self._fp8_workspaces: dict[str, object] = {}
        self.is_first_microbatch = False
        self.quantizers = 0
        for slot in range(HOMES):
            weight = torch.nn.Parameter(torch.randn(OUT, IN))
            weight.main_grad, weight.grad_added_to_main_grad = torch.zeros(OUT, IN), False  # type: ignore[attr-defined]
            self.register_parameter(f"weight{slot}", weight)
            bias = torch.nn.Parameter(torch.full((OUT,), float(slot))) if has_bias else torch.Tensor()
            setattr(self, f"bias{slot}", bias)

    def init_fp8_metadata(self, num_gemms: int = 1) -> None:
        self.quantizers = self.quantizers or num_gemms

    def forward(self, rows: torch.Tensor, splits: list[int]) -> torch.Tensor:
        assert len(splits) == self.num_gemms
        self.init_fp8_metadata(num_gemms=self.num_gemms)
        self._fp8_workspaces |= {f"weight{slot}": object() for slot in range(self.num_gemms)}
        weights = [getattr(self, f"weight{slot}") for slot in range(self.num_gemms)]
        biases = [getattr(self, f"bias{slot}") for slot in range(self.num_gemms)]
        is_first, self.is_first_microbatch = self.is_first_microbatch, False
        found: torch.Tensor = _Gemms.apply(rows, splits, self.fuse_wgrad_accumulation, is_first, *weights)
        if not self.has_bias:
            assert all(bias.numel() == 0 for bias in biases)
            return found
        return found + torch.cat([bias.expand(split, -1) for bias, split in zip(biases, splits, strict=True)])


@pytest.mark.parametrize("fused", [True, False], ids=["main_grad", "returned"])
def test_spare_gemms_get_weights_and_give_gradients(fused: bool) -> None:
    from megatron_smartmoe.adapter.moe.te_experts import with_spare_gemms

    torch.manual_seed(0)
    linear = with_spare_gemms(GroupedLinear)(fused=fused)
    linear.most_gemms = HOMES + SPARES
    spare = torch.randn(SPARES, OUT, IN, requires_grad=True)
    splits, rows = [1, 2, 0, 3], torch.randn(ROWS, IN)
    for number in (1, 2):  # the buffer for their gradients is used again
        linear(rows[:3], [1, 2])  # a micro-batch without replicas, between
        with linear.spare(spare):
            output = linear(rows, splits)
        output.sum().backward()
        # Each spare slot has the gradient of its rows, and one without rows has zeros.
        expected = torch.stack([part.sum(0).expand(OUT, IN) for part in rows.split(splits)])
        assert spare.grad is not None
        torch.testing.assert_close(spare.grad, number * expected[HOMES:])
        for slot in range(HOMES):
            weight = getattr(linear, f"weight{slot}")
            torch.testing.assert_close(weight.main_grad if fused else weight.grad, number * expected[slot])
        # Afterwards the module is what it was.
        assert [name for name, _ in linear.named_parameters()] == ["weight0", "weight1"]
        assert linear.num_gemms == HOMES
        assert not hasattr(linear, f"weight{HOMES}")
        assert sorted(linear._fp8_workspaces) == ["weight0", "weight1"]
    assert linear.quantizers == HOMES + SPARES  # from the first pass on, which had no replicas


def test_spare_gemms_have_biases() -> None:
    from megatron_smartmoe.adapter.moe.te_experts import with_spare_gemms

    linear = with_spare_gemms(GroupedLinear)(fused=False, has_bias=True)
    weights, biases = torch.zeros(SPARES, OUT, IN), torch.tensor([[5.0], [7.0]]).repeat(1, OUT).requires_grad_()
    with linear.spare(weights, biases):
        output = linear(torch.zeros(ROWS, IN), [1, 2, 1, 2])
    assert output[:, 0].tolist() == [0.0, 1.0, 1.0, 5.0, 7.0, 7.0]
    output.sum().backward()
    assert biases.grad is not None
    assert biases.grad[:, 0].tolist() == [1.0, 2.0]
    assert linear.bias1.grad.tolist() == [2.0] * OUT
    assert [name for name, _ in linear.named_parameters()] == ["weight0", "bias0", "weight1", "bias1"]


def test_spare_slots_do_not_wait_where_weight_gradients_are_delayed() -> None:
    """TransformerEngine's GEMM would compute the gradients of biases with them, later: these come home with them."""
    from megatron_smartmoe.adapter.moe.te_experts import with_spare_gemms

    kept: list[Any] = []
    linear = with_spare_gemms(GroupedLinear)(fused=False, has_bias=True)
    linear.wgrad_store = SimpleNamespace(delay_wgrad_compute=lambda: True, put=lambda *each: kept.append(each))
    weights, biases = torch.zeros(SPARES, OUT, IN), torch.zeros(SPARES, OUT, requires_grad=True)
    slots = [torch.full((OUT,), float(slot)) for slot in range(HOMES + SPARES)]
    for _ in range(2):  # micro-batches
        with linear.spare(weights, biases):
            of_biases, store = linear.bias2 + 0 * linear.bias3, linear.wgrad_store

        def compute(inputs: list[Any], gradients: list[Any], sums: list[Any], m_splits: list[int]) -> Any:
            assert len(inputs) == len(gradients) == len(sums) == len(m_splits)
            return None, inputs, None

        store.put([slots, slots, slots], functools.partial(compute, m_splits=[1, 2, 3, 4]))
        of_biases.sum().backward()
    assert biases.grad is not None
    assert biases.grad[:, 0].tolist() == [2 * (2 + 1), 2 * 3]  # autograd's are added
    (operands, later), _ = kept
    assert [len(each) for each in operands] == [HOMES] * 3
    assert later.keywords == {"m_splits": [1, 2]}
    assert linear.wgrad_store is not store


@pytest.mark.parametrize("fused", [True, False], ids=["main_grad", "returned"])
def test_one_parameter_holds_all_home_slots(fused: bool) -> None:
    from megatron_smartmoe.adapter.moe.te_experts import with_spare_gemms

    linear = with_spare_gemms(GroupedLinear)(fused=fused)
    weight = torch.nn.Parameter(torch.randn(HOMES, OUT, IN))
    weight.main_grad = torch.zeros(HOMES, OUT, IN)  # type: ignore[attr-defined]
    for slot in range(HOMES):
        linear.register_parameter(f"weight{slot}", None)
    linear.register_parameter("weight", weight)
    linear.single_grouped_weight = True
    homes = linear.home_slots("weight")
    assert (homes.shape, homes.parameters) == ((HOMES, OUT, IN), (weight,))
    spare, splits, rows = torch.randn(SPARES, OUT, IN, requires_grad=True), [1, 2, 0, 3], torch.randn(ROWS, IN)
    with linear.spare(spare):
        assert not linear.single_grouped_weight  # in this pass each slot has a weight
        assert linear.get_parameter("weight3").is_meta  # a stand-in, which is replaced after it has been registered
        output = linear(rows, splits)
    torch.testing.assert_close(output[:1], rows[:1] @ weight[0].T)
    output.sum().backward()
    expected = torch.stack([part.sum(0).expand(OUT, IN) for part in rows.split(splits)])
    torch.testing.assert_close(homes.main_grad[1] if fused else weight.grad[1], expected[1])  # type: ignore[index]
    assert spare.grad is not None
    torch.testing.assert_close(spare.grad, expected[HOMES:])
    assert [name for name, _ in linear.named_parameters()] == ["weight"]
    assert linear.single_grouped_weight
    assert linear.get_parameter("weight") is weight
    assert linear.weight0 is None


@pytest.mark.parametrize("added_up", [True, False])
def test_gradients_of_several_passes_of_the_first_micro_batch(added_up: bool) -> None:
    """The last pass of the backward direction, the first one of the forward direction, would overwrite the others'."""
    from megatron_smartmoe.adapter.moe.te_experts import add_up_passes

    linear = GroupedLinear(fused=True)
    linear.is_first_microbatch, linear._fp8_workspaces["weight0"] = True, object()
    if added_up:
        add_up_passes(SimpleNamespace(linear_fc1=linear, linear_fc2=linear))
        assert not linear._fp8_workspaces
    rows = torch.randn(ROWS, IN)
    (linear(rows[:3], [1, 2]).sum() + linear(rows[3:], [2, 1]).sum()).backward()
    weight: Any = linear.weight1
    assert torch.allclose(weight.main_grad[0], rows[1:3].sum(0) + rows[5]) == added_up


def test_a_weight_of_slots_that_are_parameters() -> None:
    from megatron_smartmoe.runtime.replicas.per_slot import PerSlot, tensors_of

    slots = tuple(torch.nn.Parameter(torch.full((3, 2), float(slot))) for slot in range(4))
    for slot in slots:
        slot.main_grad = torch.zeros(3, 2)  # type: ignore[attr-defined]
    weight = PerSlot(slots)
    assert (weight.shape, len(weight)) == ((4, 3, 2), 4)
    assert weight[3] is slots[3]
    weight.main_grad[1].add_(1)
    assert slots[1].main_grad.sum() == 6  # type: ignore[attr-defined]
    packed = torch.zeros(4, 2)
    assert [id(tensor) for tensor in tensors_of([weight, packed])] == [*map(id, slots), id(packed)]


def test_an_expert_is_a_range_of_the_one_parameter_for_all() -> None:
    from megatron_smartmoe.adapter.migration.expert_state import slot_pieces
    from megatron_smartmoe.errors import CompatError

    experts = torch.nn.Module()
    experts.linear_fc1 = linear = torch.nn.Module()
    linear.weight = torch.nn.Parameter(torch.zeros(HOMES, OUT, IN))
    linear.bias = torch.nn.Parameter(torch.zeros(HOMES, OUT))
    moved = [[(piece.name, piece.start, piece.stop) for piece in pieces] for pieces in slot_pieces(experts, HOMES)]
    assert moved == [
        [
            ("linear_fc1.weight", slot * OUT * IN, (slot + 1) * OUT * IN),
            ("linear_fc1.bias", slot * OUT, (slot + 1) * OUT),
        ]
        for slot in range(HOMES)
    ]
    experts.scale = torch.nn.Parameter(torch.zeros(HOMES, OUT))
    with pytest.raises(CompatError, match=r"scale \(2, 3\): cannot tell which part belongs to which expert"):
        slot_pieces(experts, HOMES)
