"""OLMoE (arXiv 2409.02060; transformers/models/olmoe).

Its norms of queries and keys are over all heads together, which Megatron's are not; `adapter.local.norm.WideNorm` is
such a norm, switched on by --smartmoe-wide-qk-norm.
"""

from __future__ import annotations

from megatron_smartmoe.convert.families import blocks
from megatron_smartmoe.convert.families.table import ModelTable
from megatron_smartmoe.convert.hf_config import HFConfig


def table(config: HFConfig) -> ModelTable:
    """The model's table."""
    layers, ffn = config.num_layers, config.size("intermediate_size")
    num_experts = config.size("num_experts", "num_local_experts")
    made = blocks.start("olmoe", config, num_experts=num_experts, expert_layers=(True,) * layers)
    blocks.no_biases(config, "attention_bias")
    config.require("clip_qkv", None, None, "Megatron does not clip queries, keys and values")
    blocks.attention_flags(made)
    blocks.plain_rope(made)
    made.flags |= {"qk-layernorm": True, "smartmoe-wide-qk-norm": True, "moe-ffn-hidden-size": ffn}
    # OlmoeTopKRouter: softmax over all experts, then top-k; divided by their sum only with norm_topk_prob.
    if not config.flag("norm_topk_prob", False):
        made.flags["moe-router-pre-softmax"] = True
    for number in range(layers):
        where = blocks.layer(number)
        blocks.attention(made, where, norms="all")
        blocks.mlp_norm(made, where)
        blocks.experts(made, where, ffn)
    return made
