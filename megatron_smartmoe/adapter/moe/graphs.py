"""What CUDA graphs hold of a MoE layer, by Megatron's options; the same of arguments and of a configuration."""

from __future__ import annotations

from typing import Any


def graphed_modules(options: Any) -> frozenset[str]:
    """The names in --cuda-graph-modules; none where graphs are of whole layers or of whole iterations."""
    modules = getattr(options, "cuda_graph_modules", None) or ()
    return frozenset(str(getattr(module, "name", module)) for module in modules)


def holds_preprocessing(options: Any) -> bool:
    """Whether graphs end behind the preprocessing of a MoE layer, and the host continues from what they leave."""
    return getattr(options, "cuda_graph_impl", None) == "transformer_engine" and "moe_preprocess" in graphed_modules(
        options
    )
