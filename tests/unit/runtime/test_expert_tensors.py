"""Fingerprints of experts, and the checks on their pieces."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megatron_smartmoe.errors import PlanError
from megatron_smartmoe.placement.transfers import LayerLayout, TensorLayout
from megatron_smartmoe.runtime.migration.expert_tensors import LayerState
from tests.support import fingerprints
from tests.support.fingerprints import digest


@pytest.fixture
def values() -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randn(1000)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.uint8])
def test_the_whole_is_the_sum_of_its_parts(dtype: torch.dtype, values: torch.Tensor) -> None:
    whole = (values * 10).to(dtype)
    parts = [(0, 1), (1, 333), (333, 334), (334, 1000)]
    assert digest(whole) == sum(digest(whole[low:high], low) for low, high in parts)


def test_blocks_do_not_show(values: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = digest(values)
    monkeypatch.setattr(fingerprints, "_BLOCK", 17)
    assert digest(values) == whole


def test_a_bit_a_sign_and_an_order_show(values: torch.Tensor) -> None:
    others = [values.clone() for _ in range(3)]
    others[0].view(torch.int32)[500] ^= 1
    others[1][7] = -others[1][7]
    others[2][[3, 4]] = others[2][[4, 3]]
    found = {int(digest(one)) for one in (values, *others, torch.zeros(1000), torch.zeros(999))}
    assert len(found) == 6


def layout(numel: int = 6) -> LayerLayout:
    held_SC2 = np.array([[[0, 4], [4, numel]], [[0, 0], [0, numel]]])
    tensor = TensorLayout(name="weight1/exp_avg", numel=numel, itemsize=4, copies=((0, 1),), held_SC2=held_SC2)
    return LayerLayout(layer=3, tensors=(tensor,))


def test_bytes_of_a_run_are_a_view() -> None:
    live = torch.arange(8.0)
    state = LayerState(layout=layout(), shards=(1,), pieces=((live[:2],), (live[2:],)))
    run = state.run_bytes(0, 0, 5, 6)
    assert run.view(torch.float32).tolist() == [1.0]
    run.zero_()
    assert live[1] == 0
    assert state.run_bytes(1, 0, 0, 6).view(torch.float32).tolist() == [2, 3, 4, 5, 6, 7]


def test_a_piece_of_another_size_is_refused() -> None:
    with pytest.raises(PlanError) as caught:
        LayerState(layout=layout(), shards=(0,), pieces=((torch.zeros(3),), (torch.zeros(0),)))
    assert str(caught.value) == (
        "layer 3, slot 0, weight1/exp_avg: a flat piece of 4 elements of 4 bytes is expected, got (3,) of torch.float32"
    )
    with pytest.raises(PlanError, match="slots of pieces = 1: the layout has 2"):
        LayerState(layout=layout(), shards=(0,), pieces=((torch.zeros(4),),))
