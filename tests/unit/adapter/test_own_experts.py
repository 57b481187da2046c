"""What is said and declared about the project's experts."""

from __future__ import annotations

from argparse import Namespace

import pytest
import torch

from megatron_smartmoe.adapter.moe.own_experts import declare_grouped, gemm_line

ARGS = {
    "smartmoe": True,
    "smartmoe_experts": "grouped_mm",
    "recompute_granularity": "selective",
    "recompute_modules": ["core_attn", "moe_act"],
    "moe_grouped_gemm": False,
}


@pytest.mark.parametrize(
    ("changes", "declared"),
    [
        ({}, True),
        ({"smartmoe": False}, False),
        ({"smartmoe_experts": "transformer_engine"}, False),
        ({"recompute_granularity": None}, False),
        ({"recompute_modules": None}, False),
        ({"recompute_modules": ["core_attn"]}, False),
    ],
)
def test_grouped_gemm_is_declared_where_the_activation_is_recomputed(
    changes: dict[str, object], declared: bool
) -> None:
    args = Namespace(**(ARGS | changes))
    declare_grouped(args)
    assert args.moe_grouped_gemm is declared


FAULT = "ModuleNotFoundError: No module named 'triton'"
TORCH = "experts: torch's grouped GEMM, one kernel for all experts of a rank (bfloat16, compute capability 9.0)"
TRITON = "experts: a grouped GEMM in Triton, one kernel for all experts of a rank "


@pytest.mark.parametrize(
    ("capability", "dtype", "fault", "accumulates", "line"),
    [
        ((9, 0), torch.bfloat16, None, False, TORCH),
        ((9, 0), torch.bfloat16, FAULT, False, TORCH),
        (
            (9, 0),
            torch.bfloat16,
            None,
            True,
            f"{TORCH}; weight gradients are added to the float32 sums by a Triton kernel",
        ),
        (
            (9, 0),
            torch.bfloat16,
            FAULT,
            True,
            f"{TORCH}; weight gradients are rounded to the type of the weights before they are added to the float32 "
            f"sums; Triton does not work here: {FAULT}",
        ),
        ((8, 9), torch.bfloat16, None, False, f"{TRITON}(bfloat16, compute capability 8.9)"),
        ((9, 0), torch.float32, None, True, f"{TRITON}(float32, compute capability 9.0)"),
        (
            (12, 0),
            torch.float16,
            FAULT,
            True,
            "experts: a GEMM for each expert (float16, compute capability 12.0); weight gradients are added to the "
            f"float32 sums by these GEMMs; Triton does not work here: {FAULT}",
        ),
    ],
)
def test_the_start_says_how_experts_are_multiplied(
    capability: tuple[int, int], dtype: torch.dtype, fault: str | None, accumulates: bool, line: str
) -> None:
    assert gemm_line(capability, dtype, triton_fault=fault, accumulates=accumulates) == line
