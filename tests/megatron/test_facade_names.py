"""Every name of torch.cuda that Megatron calls on the paths that CPU ranks take has an answer in the facade.

The names are read from the installed Megatron's sources, so a release that calls another one fails here.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.ranks import run_ranks

pytestmark = pytest.mark.dist

# Sources that no CPU rank reaches: other programs, other models, and what is refused or needs libraries for GPUs.
ELSEWHERE = (
    "core/inference/",
    "core/ssm/",
    "core/resharding/",
    "core/models/audio/",
    "core/distributed/fsdp/",
    "core/nccl_allocator",
    "core/transformer/cuda_graphs",
    "core/full_cuda_graph",
    "core/optimizer/optimizer_cuda_graph",
    "core/extensions/",
    "core/transformer/experimental_attention_variant",
    "core/transformer/custom_layers/batch_invariant",
    "core/fusions/fused_indices",
    "core/fusions/fused_mla",
    "core/post_training",
    "core/export",
    "training/gpu_sniff_test",
)
# Names that are called only with an option that CPU ranks refuse, or that is refused for all.
REFUSED = {
    "CUDAGraph": "CUDA graphs",
    "check_error": "--profile",
    "cudart": "--profile",
    "memory._dump_snapshot": "--record-memory-history",
    "memory._record_memory_history": "--record-memory-history",
    "memory._snapshot": "--record-memory-history",
    "clock_rate": "--log-straggler",
    "power_draw": "--log-straggler",
    "temperature": "--log-straggler",
    "utilization": "--log-straggler",
    "use_mem_pool": "--perform-rl-step",
}
# Types and decorators, which are there without a GPU; names with arguments.
IS_THERE = ("BFloat16Tensor", "FloatTensor", "HalfTensor", "OutOfMemoryError", "amp.custom_bwd", "amp.custom_fwd")
CALLS = {
    "default_generators": "torch.cuda.default_generators[0]",
    "manual_seed": "torch.cuda.manual_seed(1)",
    "set_rng_state": "torch.cuda.set_rng_state(torch.cuda.get_rng_state())",
    "set_device": "torch.cuda.set_device(0)",
    "set_stream": "torch.cuda.set_stream(torch.cuda.Stream())",
    "stream": "torch.cuda.stream(torch.cuda.current_stream())",
    "get_device_properties": "torch.cuda.get_device_properties(0)",
    "nvtx.range_push": "torch.cuda.nvtx.range_push('a')",
}


def _dotted(node: ast.Attribute) -> str:
    """`a.b.c` of an attribute of a name; empty for others."""
    parts: list[str] = []
    inner: ast.expr = node
    while isinstance(inner, ast.Attribute):
        parts.append(inner.attr)
        inner = inner.value
    return ".".join([inner.id, *reversed(parts)]) if isinstance(inner, ast.Name) else ""


def _called_names() -> Iterator[str]:
    import megatron.core
    import megatron.training

    root = Path(megatron.core.__path__[0]).parent
    for path in sorted([*root.glob("core/**/*.py"), *root.glob("training/**/*.py")]):
        text = path.read_text(encoding="utf-8", errors="replace")
        if str(path.relative_to(root)).startswith(ELSEWHERE) or "torch.cuda." not in text:
            continue
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Attribute) and (name := _dotted(node)).startswith("torch.cuda."):
                yield name.removeprefix("torch.cuda.")


def _answers() -> dict[str, str]:
    """What goes wrong with each name; empty where it has an answer."""
    import warnings

    import torch

    warnings.simplefilter("ignore")
    names = set(_called_names())
    names -= {name for name in names if any(other.startswith(f"{name}.") for other in names)}  # torch.cuda.nvtx itself
    found = {}
    for name in sorted(names - set(REFUSED)):
        try:
            if name in IS_THERE:
                eval(f"torch.cuda.{name}", {"torch": torch})
            else:
                eval(CALLS.get(name, f"torch.cuda.{name}()"), {"torch": torch})
            found[name] = ""
        except Exception as error:
            found[name] = repr(error)
    return found


def test_every_name_has_an_answer(tmp_path: Path) -> None:
    found: dict[str, str] = run_ranks(_answers, 1, log_dir=tmp_path)[0]
    assert len(found) > 30
    assert {name: wrong for name, wrong in found.items() if wrong} == {}
