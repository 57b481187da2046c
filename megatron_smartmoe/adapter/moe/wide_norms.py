"""A layer spec whose norms of queries and keys are over all heads together (`--smartmoe-wide-qk-norm`)."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import replace
from functools import partial
from typing import Any

from megatron.training.argument_utils import gpt_config_from_args
from megatron.training.models.gpt import GPTModelConfig, default_layer_spec

from megatron_smartmoe.adapter.local.norm import WideNorm


def model_config_of(args: Namespace) -> Any:
    """Megatron's configuration of the model, with such norms where the flags ask for them.

    Args:
        args: Megatron's arguments, after validation.
    """
    config = gpt_config_from_args(args)
    if args.smartmoe_wide_qk_norm:
        config.transformer_layer_spec = wide_layer_spec
    return config


def wide_layer_spec(config: GPTModelConfig, vp_stage: int | None = None) -> Any:
    """The spec of one pipeline stage; passed to Megatron as `GPTModelConfig.transformer_layer_spec`.

    Args:
        config: the model's configuration.
        vp_stage: stage of the virtual pipeline; None without one.
    """
    block = default_layer_spec(config, vp_stage)
    transformer = config.transformer
    query = partial(WideNorm, num_heads=transformer.num_attention_heads)
    key = partial(WideNorm, num_heads=transformer.num_query_groups)

    def widened(layer: Any) -> Any:
        attention = layer.submodules.self_attention
        submodules = replace(attention.submodules, q_layernorm=query, k_layernorm=key)
        attention = replace(attention, submodules=submodules)
        return replace(layer, submodules=replace(layer.submodules, self_attention=attention))

    if not hasattr(block, "layer_specs"):
        return widened(block)
    return replace(block, layer_specs=[widened(layer) for layer in block.layer_specs])
