"""Megatron's arguments for a model: from the flags of its table, and the other way round.

A checkpoint carries the arguments of its run, from which `--use-checkpoint-args` takes the model's shape. Megatron 0.19
takes only a part of them from there (`load_args_from_checkpoint`); run.yaml has all.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_smartmoe.convert.families.table import FlagValue

# Flags whose values have other names, or are the opposite, in Megatron's arguments.
_OTHER_NAMES = {"norm-epsilon": "layernorm_epsilon"}
_NEGATED = {"disable-bias-linear": "add_bias_linear"}
# Values of a model that its flags do not name, and whose meaning therefore is Megatron's default; and of a checkpoint.
_DEFAULTS: dict[str, Any] = {
    "add_position_embedding": True,
    "apply_layernorm_1p": False,
    "apply_query_key_layer_scaling": False,
    "add_qkv_bias": False,
    "qk_layernorm": False,
    "multi_latent_attention": False,
    "moe_router_pre_softmax": False,
    "moe_router_score_function": "softmax",
    "moe_router_enable_expert_bias": False,
    "moe_shared_expert_gate": False,
    "rotary_percent": 1.0,
    "rotary_interleaved": False,
    "squared_relu": False,
    "use_rope_scaling": False,
    "smartmoe_wide_qk_norm": False,
}
_OF_A_CHECKPOINT: dict[str, Any] = {
    "tensor_model_parallel_size": 1,
    "pipeline_model_parallel_size": 1,
    "expert_model_parallel_size": 1,
    "context_parallel_size": 1,
    "ckpt_format": "torch_dist",
    "use_distributed_optimizer": False,
    "consumed_train_samples": 0,
    "consumed_valid_samples": 0,
}


def arguments_of(flags: Mapping[str, FlagValue], *, dtype: str, seq_length: int) -> dict[str, Any]:
    """The arguments of a run with these flags, as far as they describe its model.

    Args:
        flags: of the table.
        dtype: of the weights.
        seq_length: that run.yaml trains with.
    """
    found: dict[str, Any] = {**_DEFAULTS, **_OF_A_CHECKPOINT}
    for flag, value in flags.items():
        if flag in _NEGATED:
            found[_NEGATED[flag]] = not value
        else:
            found[_OTHER_NAMES.get(flag, flag.replace("-", "_"))] = value
    found |= {"bf16": dtype == "bfloat16", "fp16": False, "seq_length": seq_length, "no_save_optim": True}
    return found | {"no_save_rng": True}


def argument_name(flag: str) -> tuple[str, bool]:
    """The name of a flag's value in a run's arguments, and whether it is the opposite there."""
    if flag in _NEGATED:
        return _NEGATED[flag], True
    return _OTHER_NAMES.get(flag, flag.replace("-", "_")), False


def default_of(name: str) -> Any:
    """What an argument is where nothing is said."""
    return _DEFAULTS.get(name)
