"""What CUDA graphs hold of a MoE layer, by Megatron's options: of its arguments, or of a transformer's configuration.

Arguments that Megatron has not validated yet may have the former names, and in Megatron 0.17 the options still do.

Megatron's own graphs (`local`) are of whole layers in GPT models: its graphs of parts are those of hybrid models.
"""

from __future__ import annotations

from typing import Any

_WHOLE = frozenset(("full", "full_iteration", "full_iteration_inference"))  # former modules
_FORMER_FLAGS = {"enable_cuda_graph": "local", "external_cuda_graph": "transformer_engine"}


def graph_kind(options: Any) -> str:
    """--cuda-graph-impl; none where there is no such option."""
    kind = getattr(options, "cuda_graph_impl", None) or "none"
    for former, impl in _FORMER_FLAGS.items():
        if getattr(options, former, False):
            kind = impl
    return "full_iteration" if kind == "local" and "full_iteration" in _names(options) else kind


def graphed_modules(options: Any) -> frozenset[str]:
    """The names in --cuda-graph-modules; none where graphs are of whole layers or of whole iterations."""
    return _names(options) - _WHOLE


def _names(options: Any) -> frozenset[str]:
    names = ("cuda_graph_scope_deprecated", "cuda_graph_modules", "cuda_graph_scope")  # the last in Megatron 0.17
    modules = next(filter(None, (getattr(options, name, None) for name in names)), ())
    listed = (modules,) if isinstance(modules, str) else modules
    return frozenset(str(getattr(module, "name", module)) for module in listed)


def holds_preprocessing(options: Any) -> bool:
    """Whether graphs end behind the preprocessing of a MoE layer, and the host continues from what they leave."""
    return graph_kind(options) == "transformer_engine" and "moe_preprocess" in graphed_modules(options)


def holds_experts(options: Any) -> bool:
    """Whether graphs hold the whole MoE layer, of which the host sees nothing in a replay."""
    kind, modules = graph_kind(options), graphed_modules(options)
    if kind in ("none", "full_iteration"):
        return kind != "none"
    return not modules or "moe" in modules or (kind == "local" and "attn" in modules)
