from __future__ import annotations

import numpy as np
import pytest
import torch

from megatron_smartmoe.convert.numbers import as_float32, converted


def bits_of(tensor: torch.Tensor) -> np.ndarray:
    return tensor.view({2: torch.uint16, 1: torch.uint8, 4: torch.float32, 8: torch.float64}[tensor.itemsize]).numpy()


SPECIAL = torch.tensor(
    [0.0, -0.0, 1.0, float("inf"), -float("inf"), float("nan"), 1e-45, 3.4e38, 1 + 2**-8, 1 + 3 * 2**-8]
)


def test_float32_is_rounded_to_bfloat16_as_torch_does() -> None:
    values = torch.cat([SPECIAL, torch.randn(10_000), torch.randn(1000) * 1e-40])
    found = converted(values.numpy(), "float32", "bfloat16")
    wanted = bits_of(values.bfloat16())
    is_nan = values.isnan().numpy()
    assert (found[~is_nan] == wanted[~is_nan]).all()
    assert np.isnan(as_float32(found[is_nan], "bfloat16")).all()


def test_all_numbers_of_8_bits() -> None:
    values = torch.arange(256, dtype=torch.uint8)
    found = as_float32(values.numpy(), "float8_e4m3fn")
    assert np.array_equal(found, values.view(torch.float8_e4m3fn).float().numpy(), equal_nan=True)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
def test_a_type_and_back(dtype: str) -> None:
    values = torch.randn(1000).bfloat16().to(getattr(torch, dtype))
    there = converted(bits_of(values) if dtype == "bfloat16" else values.numpy(), dtype, "float32")
    assert np.array_equal(there, values.float().numpy())
    assert np.array_equal(
        converted(there, "float32", dtype), bits_of(values) if dtype == "bfloat16" else values.numpy()
    )
