"""Mixtral (arXiv 2401.04088; transformers/models/mixtral)."""

from __future__ import annotations

from megatron_smartmoe.convert.families import blocks
from megatron_smartmoe.convert.families.table import ModelTable
from megatron_smartmoe.convert.hf_config import HFConfig


def table(config: HFConfig) -> ModelTable:
    """The model's table."""
    layers, ffn = config.num_layers, config.size("intermediate_size")
    # transformers 5 reads experts under both names.
    num_experts = config.size("num_local_experts", "num_experts")
    made = blocks.start("mixtral", config, num_experts=num_experts, expert_layers=(True,) * layers)
    blocks.no_sliding_window(config)
    if config.get("sliding_window", None) is not None:
        why = "attention to a sliding window has no torch kernel here (SDPAttention)"
        raise config.refused("sliding_window", f"is not supported: {why}", "Set it to null if the model has none.")
    blocks.attention_flags(made)
    blocks.plain_rope(made, theta=1e6)
    # MixtralTopKRouter: softmax over all experts, top-k, divided by their sum: the softmax over the top-k alone, which
    # is Megatron's default. Pre-softmax would leave the sum below 1.
    made.flags["moe-ffn-hidden-size"] = ffn
    for number in range(layers):
        where = blocks.layer(number)
        blocks.attention(made, where)
        blocks.mlp_norm(made, where)
        # MixtralExperts: w1 is the gate, w3 linear, w2 the output.
        blocks.experts(made, where, ffn, block="block_sparse_moe", names=("w1", "w3", "w2"))
    return made
