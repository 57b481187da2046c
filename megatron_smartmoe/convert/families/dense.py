"""Dense models, as a start for upcycling: Llama, Qwen2, Qwen3 (transformers/models/llama, qwen2, qwen3)."""

from __future__ import annotations

from megatron_smartmoe.convert.families import blocks
from megatron_smartmoe.convert.families.table import ModelTable
from megatron_smartmoe.convert.hf_config import HFConfig


def llama(config: HFConfig) -> ModelTable:
    """The table of a Llama."""
    blocks.no_biases(config, "attention_bias", "mlp_bias")
    return _table("llama", config)


def qwen2(config: HFConfig) -> ModelTable:
    """The table of a Qwen2: biases of queries, keys and values (Qwen2Attention)."""
    made = _table("qwen2", config, has_bias=True)
    made.flags["add-qkv-bias"] = True
    return made


def qwen3(config: HFConfig) -> ModelTable:
    """The table of a Qwen3: a norm of every query's and key's head (Qwen3Attention)."""
    blocks.no_biases(config, "attention_bias")
    made = _table("qwen3", config, norms="head")
    made.flags["qk-layernorm"] = True
    return made


def _table(family: str, config: HFConfig, *, has_bias: bool = False, norms: str | None = None) -> ModelTable:
    layers = config.num_layers
    made = blocks.start(family, config, num_experts=None, expert_layers=(False,) * layers)
    blocks.no_sliding_window(config)
    blocks.attention_flags(made)
    blocks.plain_rope(made)
    for number in range(layers):
        where = blocks.layer(number)
        blocks.attention(made, where, has_bias=has_bias, norms=norms)
        blocks.mlp_norm(made, where)
        blocks.gated(made, where.megatron + "mlp.", where.hf + "mlp.", config.size("intermediate_size"))
    return made
