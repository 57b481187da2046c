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


def test_the_start_says_how_experts_are_multiplied() -> None:
    assert gemm_line((9, 0), torch.bfloat16) == (
        "experts: torch's grouped GEMM, one kernel for all experts of a rank (bfloat16, compute capability 9.0)"
    )
    for capability, dtype, here in (
        ((8, 9), torch.bfloat16, "bfloat16, 8.9"),
        ((9, 0), torch.float32, "float32, 9.0"),
        ((12, 0), torch.float16, "float16, 12.0"),
    ):
        assert gemm_line(capability, dtype) == (
            "experts: a GEMM for each expert, because torch's grouped GEMM has a kernel only for bfloat16 on compute "
            f"capability 9.x and 10.x (here {here})"
        )
