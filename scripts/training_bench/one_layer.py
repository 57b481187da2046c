"""One MoE layer of this project's on CPU ranks, outside of a model."""

from __future__ import annotations

from dataclasses import replace
from typing import Any


def smart_layer(
    *, ranks: int, experts: int, hidden: int, ffn: int, dispatch_nodes: int = 1, degree: int = 1, **options: Any
) -> Any:
    """A layer with gated experts in slots; process groups exist.

    Args:
        ranks: all in one expert-parallel group.
        experts: E.
        hidden: H.
        ffn: inner size of an expert.
        dispatch_nodes: see `SmartMoELayer`.
        degree: chunks of each all-to-all.
        options: of Megatron's TransformerConfig.
    """
    import torch.nn.functional as F
    from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron_smartmoe.adapter.moe.experts import SlottedExperts
    from megatron_smartmoe.adapter.moe.layer import SmartMoELayer
    from megatron_smartmoe.adapter.moe.overlap import OverlappedMoELayer

    config = TransformerConfig(
        num_layers=1,
        hidden_size=hidden,
        num_attention_heads=4,
        num_moe_experts=experts,
        moe_ffn_hidden_size=ffn,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        bias_activation_fusion=False,
        expert_model_parallel_size=ranks,
        moe_token_dispatcher_type="alltoall",
        moe_router_load_balancing_type="none",
        moe_router_dtype="fp32",
        use_cpu_initialization=True,
        gradient_accumulation_fusion=False,
        **options,
    )
    spec: Any = get_moe_module_spec(use_te=False, num_experts=experts, moe_grouped_gemm=False)
    submodules = replace(spec.keywords["submodules"], experts=SlottedExperts)
    if degree > 1:
        return OverlappedMoELayer(config, submodules, overlap_degree=degree)
    return SmartMoELayer(config, submodules, dispatch_nodes=dispatch_nodes)
