"""Qwen2-MoE and Qwen3-MoE (arXiv 2407.10671, 2505.09388; transformers/models/qwen2_moe and qwen3_moe)."""

from __future__ import annotations

from megatron_smartmoe.convert.families import blocks
from megatron_smartmoe.convert.families.table import ModelTable
from megatron_smartmoe.convert.hf_config import HFConfig


def qwen2_moe(config: HFConfig) -> ModelTable:
    """The table of a Qwen2-MoE: biases of queries, keys and values, and a gated shared expert."""
    has_bias, shared = config.flag("qkv_bias", True), config.size("shared_expert_intermediate_size")
    made = _start("qwen2_moe", config)
    hidden = config.size("hidden_size")
    made.flags |= {
        "add-qkv-bias": has_bias,
        "moe-shared-expert-intermediate-size": shared,
        "moe-shared-expert-gate": True,
    }
    for number, has_experts in enumerate(made.expert_layers):
        where = blocks.layer(number)
        blocks.attention(made, where, has_bias=has_bias)
        _mlp(made, where, has_experts=has_experts)
        if has_experts:
            # Qwen2MoeSparseMoeBlock: the shared expert's output times the sigmoid of its gate, added to the others'.
            blocks.gated(made, where.megatron + "mlp.shared_experts.", where.hf + "mlp.shared_expert.", shared)
            gate = where.hf + "mlp.shared_expert_gate.weight"
            made.add(where.megatron + "mlp.shared_experts.gate_weight", (1, hidden), gate)
    return made


def qwen3_moe(config: HFConfig) -> ModelTable:
    """The table of a Qwen3-MoE: a norm of every query's and key's head."""
    blocks.no_biases(config, "attention_bias")
    made = _start("qwen3_moe", config)
    made.flags["qk-layernorm"] = True
    for number, has_experts in enumerate(made.expert_layers):
        where = blocks.layer(number)
        blocks.attention(made, where, norms="head")
        _mlp(made, where, has_experts=has_experts)
    return made


def _start(family: str, config: HFConfig) -> ModelTable:
    layers = config.num_layers
    # transformers 5 writes Qwen3's experts as num_local_experts.
    num_experts = config.size("num_experts", "num_local_experts")
    step, dense = config.size("decoder_sparse_step", default=1), config.get("mlp_only_layers", [])
    if not isinstance(dense, list) or not all(type(number) is int for number in dense):
        raise config.refused("mlp_only_layers", "must be a list of layers")
    # Qwen3MoeDecoderLayer: experts where the layer is not listed and (number + 1) is a multiple of the step.
    expert_layers = tuple(number not in dense and (number + 1) % step == 0 for number in range(layers))
    if not any(expert_layers):
        raise config.refused("decoder_sparse_step", "leaves no layer with experts")
    made = blocks.start(family, config, num_experts=num_experts, expert_layers=expert_layers)
    blocks.no_sliding_window(config)
    blocks.attention_flags(made)
    blocks.plain_rope(made)
    made.flags["moe-ffn-hidden-size"] = config.size("moe_intermediate_size")
    # Qwen3MoeTopKRouter: softmax over all experts, then top-k. Divided by their sum that is the softmax over the top-k.
    if not config.flag("norm_topk_prob", False):
        made.flags["moe-router-pre-softmax"] = True
    return made


def _mlp(made: ModelTable, where: blocks.Where, *, has_experts: bool) -> None:
    config = made.config
    blocks.mlp_norm(made, where)
    if has_experts:
        blocks.experts(made, where, config.size("moe_intermediate_size"))
    else:
        blocks.gated(made, where.megatron + "mlp.", where.hf + "mlp.", config.size("intermediate_size"))
