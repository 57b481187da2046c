"""From a run's arguments to a config.json: which family a model is, and the keys that say so.

A checkpoint that was converted from a Hugging Face model leads back to that model's config.json. For any other, a
config.json is made here. Either way its table is asked for Megatron's flags, and each of them must be what the run had:
what a family cannot say is refused by name.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_smartmoe.checkpoint.directory import RELEASE
from megatron_smartmoe.convert.arguments import argument_name, default_of
from megatron_smartmoe.convert.carried import FOLDER
from megatron_smartmoe.convert.families import table_of
from megatron_smartmoe.convert.families.table import ModelTable
from megatron_smartmoe.convert.hf_config import CONFIG_FILE, HFConfig
from megatron_smartmoe.errors import ConfigError

# Flags that a training run may set otherwise without a change of what the model computes.
_OF_TRAINING = frozenset(
    "attention-dropout hidden-dropout init-method-std moe-router-load-balancing-type moe-aux-loss-coeff "
    "moe-router-dtype max-position-embeddings group-query-attention".split()
)
_CLASSES = {
    "mixtral": "Mixtral", "qwen2_moe": "Qwen2Moe", "qwen3_moe": "Qwen3Moe", "olmoe": "Olmoe",
    "deepseek_v2": "DeepseekV2", "deepseek_v3": "DeepseekV3", "llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3",
}  # fmt: skip
# Arguments that change what a model computes and that no family has: the value that means that they are off.
_OFF = {
    "apply_query_key_layer_scaling": False, "apply_residual_connection_post_layernorm": False, "squared_relu": False,
    "layernorm_zero_centered_gamma": False, "qk_l2_norm": False, "rotary_interleaved": False, "window_size": None,
    "rotary_percent": 1.0, "rotary_seq_len_interpolation_factor": None, "no_rope_freq": None, "quick_geglu": False,
    "glu_linear_offset": 0.0, "moe_latent_size": None, "moe_expert_capacity_factor": None, "softmax_type": "vanilla",
    "moe_input_jitter_eps": None, "moe_router_topk_scaling_factor": None, "moe_router_num_groups": None,
    "moe_router_group_topk": None, "moe_shared_expert_intermediate_size": None, "moe_apply_probs_on_input": False,
    "activation_func_clamp_value": None, "moe_mlp_glu_interleave_size": None, "qk_clip": False,
    "attention_output_gate": False,
}  # fmt: skip

# Gates whose routers Hugging Face's formats have no place for.
_GATES = {
    "noisy-top-k": "its routers' noise_weight",
    "moe++": "its experts that cost nothing (zero_weight and others) and residual_weight",
    "topology": "its choice by the node that an expert is on",
}


def config_beside(folder: Path, arguments: Mapping[str, Any]) -> Path | None:
    """The folder with the config.json of the model that a checkpoint was converted from, if there is one.

    Args:
        folder: of the checkpoint's iteration.
        arguments: of the run that saved it.
    """
    places = [folder.parent] if folder.name == RELEASE else []
    started = arguments.get("pretrained_checkpoint") or arguments.get("load")
    places += [Path(started)] if isinstance(started, str) else []
    return next((place / FOLDER for place in places if (place / FOLDER / CONFIG_FILE).is_file()), None)


def table_of_checkpoint(arguments: Mapping[str, Any], beside: Path | None, vocab_size: int) -> ModelTable:
    """The table of a checkpoint's model.

    Args:
        arguments: of the run that saved it.
        beside: folder with the config.json of the model that it began with; None to make one.
        vocab_size: rows of the embedding, for a config.json that is made.

    Raises:
        ConfigError: no family computes what this model does.
    """
    gate = str(arguments.get("smartmoe_gate"))
    if gate in _GATES:
        rule = f"is what the checkpoint was trained with, and Hugging Face's formats have no place for {_GATES[gate]}"
        way_out = "Train it on with --smartmoe-gate top-k --no-load-optim and export that run, or pass --to megatron."
        raise ConfigError("--smartmoe-gate", gate, rule, way_out)
    if beside is not None:
        config = HFConfig.of(beside)
        table = table_of(config, config.content)
    else:
        path = Path("config.json of this checkpoint")
        content = made_config(arguments, vocab_size)
        config = HFConfig(content, path)
        table = table_of(config)
    _compare(table, arguments)
    return table


def made_config(arguments: Mapping[str, Any], vocab_size: int) -> dict[str, Any]:
    """A config.json for the model of these arguments.

    Raises:
        ConfigError: it is like no family that is known here.
    """
    family = _family(arguments)
    heads = arguments["num_attention_heads"]
    groups = arguments["num_query_groups"] if arguments.get("group_query_attention") else heads
    base = arguments.get("rotary_base", 10000)
    found: dict[str, Any] = {
        "architectures": [f"{_CLASSES[family]}ForCausalLM"],
        "model_type": family,
        "vocab_size": vocab_size,
        "hidden_size": arguments["hidden_size"],
        "intermediate_size": arguments["ffn_hidden_size"],
        "num_hidden_layers": arguments["num_layers"],
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "hidden_act": "silu",
        "max_position_embeddings": arguments["max_position_embeddings"],
        "rms_norm_eps": arguments.get("layernorm_epsilon", 1e-5),
        "tie_word_embeddings": not arguments.get("untie_embeddings_and_output_weights"),
        "initializer_range": arguments.get("init_method_std") or 0.02,
        "rope_theta": base,
        "rope_parameters": {"rope_type": "default", "rope_theta": base},
    }
    head_size = arguments.get("kv_channels") or arguments["hidden_size"] // heads
    if family in ("mixtral", "qwen3_moe", "llama", "qwen3"):
        found["head_dim"] = head_size
    elif head_size * heads != arguments["hidden_size"]:
        rule = f"cannot be said in the config.json of {family}: heads have hidden size / heads there"
        raise ConfigError("--kv-channels", head_size, rule, "This model cannot be exported.")
    if arguments.get("num_experts"):
        found |= _experts(family, arguments)
    if family in ("mixtral",):
        found["sliding_window"] = None
    return found


def _family(arguments: Mapping[str, Any]) -> str:
    """The family whose blocks the arguments describe; what else they say is compared later."""
    has_experts, norms = bool(arguments.get("num_experts")), bool(arguments.get("qk_layernorm"))
    if arguments.get("multi_latent_attention"):
        rule = "needs the config.json of the model that it began with"
        way_out = f"Put it into {FOLDER}/ beside the checkpoint's tracker."
        raise ConfigError("--multi-latent-attention", True, rule, way_out)
    if not has_experts:
        return "qwen3" if norms else "qwen2" if arguments.get("add_qkv_bias") else "llama"
    if arguments.get("smartmoe_wide_qk_norm"):
        return "olmoe"
    if arguments.get("moe_shared_expert_gate") or arguments.get("add_qkv_bias"):
        return "qwen2_moe"
    return "qwen3_moe" if norms else "mixtral"


def _experts(family: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    ffn = arguments.get("moe_ffn_hidden_size") or arguments["ffn_hidden_size"]
    pattern = arguments.get("moe_layer_freq") or 1
    layers = int(arguments["num_layers"])
    if not isinstance(pattern, list):
        pattern = [int(number % pattern == 0) for number in range(layers)]
    found: dict[str, Any] = {
        "num_experts_per_tok": arguments["moe_router_topk"],
        "router_aux_loss_coef": _balance(arguments),
        "num_local_experts" if family == "mixtral" else "num_experts": arguments["num_experts"],
    }
    if family in ("mixtral", "olmoe"):
        found["intermediate_size"] = ffn
    else:
        dense = [number for number, has in enumerate(pattern) if not has]
        found |= {"moe_intermediate_size": ffn, "decoder_sparse_step": 1, "mlp_only_layers": dense}
    if family != "mixtral":
        found["norm_topk_prob"] = not arguments.get("moe_router_pre_softmax")
    if family == "qwen2_moe":
        found |= {
            "shared_expert_intermediate_size": arguments.get("moe_shared_expert_intermediate_size"),
            "qkv_bias": bool(arguments.get("add_qkv_bias")),
        }
    return found


def _balance(arguments: Mapping[str, Any]) -> float:
    coefficient = arguments.get("moe_aux_loss_coeff", 0.0)
    return float(coefficient[0] if isinstance(coefficient, list) and coefficient else coefficient or 0.0)


def _compare(table: ModelTable, arguments: Mapping[str, Any]) -> None:
    """Every flag of the table is what the run had, and nothing else is on.

    Raises:
        ConfigError: the first that is not.
    """
    way_out = f"It cannot be exported as {table.family}."
    is_all_experts = table.num_experts is not None and all(table.expert_layers)
    for flag, value in table.flags.items():
        if flag in _OF_TRAINING or (flag == "ffn-hidden-size" and is_all_experts):
            continue
        name, is_negated = argument_name(flag)
        found, wanted = _spelled_out(name, arguments), (not value) if is_negated else value
        if not _is_same(found, wanted):
            rule = f"is what the checkpoint was trained with, and a {table.family} model has {json.dumps(wanted)}"
            raise ConfigError(f"--{flag}", found, rule, way_out)
    said = {argument_name(flag)[0] for flag in table.flags}
    for name, off in {**{name: default_of(name) for name in _UNSAID}, **_OFF}.items():
        found = arguments.get(name, off)
        if name not in said and found != off and found is not None:
            rule = f"is what the checkpoint was trained with, and a {table.family} model has no such thing"
            raise ConfigError(f"--{name.replace('_', '-')}", found, rule, way_out)


def _spelled_out(name: str, arguments: Mapping[str, Any]) -> Any:
    """The value of an argument, in place of one that stands for it."""
    found = arguments.get(name, default_of(name))
    if name == "moe_layer_freq" and not isinstance(found, list):
        return [int(number % int(found or 1) == 0) for number in range(int(arguments["num_layers"]))]
    if name == "num_query_groups" and not arguments.get("group_query_attention"):
        return arguments.get("num_attention_heads")
    if name == "kv_channels" and found is None:
        return arguments["hidden_size"] // arguments["num_attention_heads"]
    if name == "moe_ffn_hidden_size" and found is None:
        return arguments.get("ffn_hidden_size")
    return found


_UNSAID = (
    "add_qkv_bias qk_layernorm multi_latent_attention moe_router_pre_softmax moe_router_score_function "
    "moe_router_enable_expert_bias moe_shared_expert_gate use_rope_scaling smartmoe_wide_qk_norm"
).split()


def _is_same(found: object, wanted: object) -> bool:
    if isinstance(wanted, bool):
        return bool(found) == wanted
    if isinstance(wanted, int | float) and isinstance(found, int | float):
        return float(found) == float(wanted)
    return found == wanted
