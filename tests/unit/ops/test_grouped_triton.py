"""Triton's grouped GEMMs: interpreted on the CPU, and compiled for the GPUs that they are for."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parents[3]
SHARED_BYTES = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 120: 99 << 10}  # of a block, by architecture
NAMES = {torch.bfloat16: "bf16", torch.float32: "fp32"}


@pytest.mark.slow
def test_results_are_those_of_the_loop_over_groups() -> None:
    command = [sys.executable, "-m", "tests.unit.ops.triton_cases"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-500:] + done.stderr[-3000:]


def compiled(name: str, dtype: torch.dtype, architecture: int) -> Any:
    """A kernel for a GPU that is not here, as for sizes that are multiples of 16."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from megatron_smartmoe.ops import grouped_triton

    tiles, kernel = grouped_triton.tiles_of(dtype), getattr(grouped_triton, f"_{name}_kernel")
    pointers = {"rows_NK", "weight_SKM", "out_NM", "grad_NM"}
    constants: dict[str, Any] = {"PRECISION": "ieee", "ROWS": tiles.rows, "K": tiles.depth, "M": tiles.columns}
    if name == "multiply":
        constants |= {"GROUPS": 8, "weight_stride_k": 1}
    else:
        constants |= {"ADDS": True, "ROWS": tiles.depth, "M": tiles.rows, "K": tiles.columns}
    signature, aligned = {}, {}
    for index, argument in enumerate(kernel.arg_names):
        if argument in constants:
            signature[argument] = "constexpr"
        elif argument in pointers | {"out_SMK", "ends_S"}:
            signature[argument] = {"out_SMK": "*fp32", "ends_S": "*i32"}.get(argument, f"*{NAMES[dtype]}")
        else:
            signature[argument] = "i32"
        if argument not in constants and argument != "num_groups":
            aligned[(index,)] = [["tt.divisibility", 16]]
    places = {(kernel.arg_names.index(argument),): value for argument, value in constants.items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=places, attrs=aligned)
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=tiles.launch)


@pytest.mark.parametrize(
    ("architecture", "dtype"), [(80, torch.float32), (86, torch.bfloat16), (90, torch.bfloat16), (120, torch.bfloat16)]
)
@pytest.mark.parametrize("name", ["multiply", "weight_gradient"])
def test_kernels_compile_for_gpus_and_use_their_tensor_cores(
    name: str, architecture: int, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    made = compiled(name, dtype, architecture)
    assert made.metadata.shared <= SHARED_BYTES[architecture]
    code = made.asm["ptx"]
    assert "st.local" not in code
    assert ("cp.async.cg" in code) or ("ld.global.v4" in code)  # 16 bytes a load
    assert ("mma.sync" in code or "wgmma.mma_async" in code) == (dtype != torch.float32)
