"""The model that Megatron's arguments describe: what `--parallel auto` plans, the reverse of `flags.megatron_flags`.

It reads parsed arguments, not words, so that Megatron's own parser settles defaults, aliases and types. They come as
a mapping of names to values (`vars` of a namespace): nothing of Megatron is imported here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from megatron_smartmoe.errors import ConfigError
from megatron_smartmoe.spec.model import LatentAttention, ModelSpec, MoESpec, Norm, Position

_REQUIRED = ("num_layers", "hidden_size", "num_attention_heads", "seq_length", "num_experts", "global_batch_size")
# argument -> why the planner cannot price such a run
_UNKNOWN = {
    "use_checkpoint_args": "the model's shape is still in the checkpoint",
    "hybrid_layer_pattern": "the planner knows transformer layers only",
    "moe_latent_size": "the planner has no model of it",
    "use_megatron_fsdp": "the planner has no model of it",
    "use_torch_fsdp2": "the planner has no model of it",
    "rampup_batch_size": "the planner prices one batch size",
    "step_batch_size_schedule": "the planner prices one batch size",
}
_BALANCING = ("aux_loss", "seq_aux_loss", "global_aux_loss", "none")
_OWN_WAY = "Leave it out, or --parallel auto, and choose the sizes yourself."


def model_from_arguments(values: Mapping[str, Any], name: str = "run") -> ModelSpec:
    """The model and its batch.

    Its vocabulary is that of --vocab-size, else 0: it is the tokenizer's, and often no argument says it.

    Args:
        values: Megatron's arguments by name, as parsed.
        name: of the model.

    Raises:
        ConfigError: a size is missing, or the arguments describe what the planner has no model of.
    """
    for key, reason in _UNKNOWN.items():
        if values.get(key):
            raise ConfigError(_flag(key), values[key], f"cannot be planned: {reason}", _OWN_WAY)
    for key in _REQUIRED:
        if values.get(key) is None:
            rule = "is needed by --parallel auto"
            raise ConfigError(_flag(key), None, rule, f"Pass {_flag(key)}, or a --config that has it.")
    heads, hidden = values["num_attention_heads"], values["hidden_size"]
    norm: Norm = "LayerNorm" if values["normalization"] == "LayerNorm" else "RMSNorm"
    latent = _latent(values)
    head_dim = values["kv_channels"] or hidden // heads
    return ModelSpec(
        name=name,
        layers=values["num_layers"],
        hidden=hidden,
        heads=heads,
        query_groups=values["num_query_groups"] if values["group_query_attention"] and not latent else heads,
        head_dim=latent.qk_head_dim + latent.qk_rope_dim if latent else head_dim,
        ffn=_ffn(values),
        vocab=values["vocab_size"] or 0,
        seq_length=values["seq_length"],
        moe=_moe(values),
        global_batch=values["global_batch_size"],
        latent=latent,
        norm=norm,
        gated=bool(values["swiglu"]),
        bias=bool(values["add_bias_linear"]),
        qk_norm=bool(values["qk_layernorm"]),
        qkv_bias=bool(values["add_qkv_bias"]),
        tied=not values["untie_embeddings_and_output_weights"],
        position=_position(values["position_embedding_type"]),
        rope_base=int(values["rotary_base"]),
        mtp_layers=values["mtp_num_layers"] or 0,
        dropout=float(max(values["attention_dropout"], values["hidden_dropout"])),
    )


def _flag(key: str) -> str:
    return "--" + key.replace("_", "-")


def _position(kind: str) -> Position:
    """Only a learned table has weights; every other kind is as cheap as rotary embeddings."""
    if kind in ("learned_absolute", "none"):
        return "learned_absolute" if kind == "learned_absolute" else "none"
    return "rope"


def _ffn(values: Mapping[str, Any]) -> int:
    """Megatron's default: 4 H, and two thirds of it in multiples of 64 with a gate."""
    hidden: int = values["hidden_size"]
    given = values["ffn_hidden_size"]
    return int(given or (int(4 * hidden * 2 / 3 / 64) * 64 if values["swiglu"] else 4 * hidden))


def _latent(values: Mapping[str, Any]) -> LatentAttention | None:
    if not values["multi_latent_attention"]:
        return None
    return LatentAttention(
        q_rank=values["q_lora_rank"] or 0,
        kv_rank=values["kv_lora_rank"],
        qk_head_dim=values["qk_head_dim"],
        qk_rope_dim=values["qk_pos_emb_head_dim"],
        v_head_dim=values["v_head_dim"],
    )


def _moe(values: Mapping[str, Any]) -> MoESpec:
    first_dense, every = _places(values["moe_layer_freq"], values["num_layers"])
    kinds, weights = (_list(values[key]) for key in ("moe_router_load_balancing_type", "moe_aux_loss_coeff"))
    return MoESpec(
        experts=values["num_experts"],
        top_k=values["moe_router_topk"],
        ffn=values["moe_ffn_hidden_size"] or _ffn(values),
        shared_ffn=values["moe_shared_expert_intermediate_size"] or 0,
        first_dense=first_dense,
        every=every,
        score_function=values["moe_router_score_function"],
        pre_softmax=bool(values["moe_router_pre_softmax"]),
        expert_bias=bool(values["moe_router_enable_expert_bias"]),
        groups=values["moe_router_num_groups"] or 0,
        group_top_k=values["moe_router_group_topk"] or 0,
        balancing=str(kinds[0]) if kinds[0] in _BALANCING else "none",
        aux_loss_coeff=float(max(weights)),
        scaling_factor=float(values["moe_router_topk_scaling_factor"] or 0.0),
        capacity_factor=float(values["moe_expert_capacity_factor"] or 0.0),
    )


def _list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


def _places(freq: Any, layers: int) -> tuple[int, int]:
    """(leading dense layers, each n-th of the rest has experts) of --moe-layer-freq.

    Raises:
        ConfigError: the pattern is another one.
    """
    if isinstance(freq, int):
        return 0, freq
    pattern = list(freq) if isinstance(freq, list | tuple) else _pattern(str(freq))
    if 1 in pattern:
        first = pattern.index(1)
        rest = pattern[first:]
        every = rest.index(1, 1) if 1 in rest[1:] else len(rest)
        if pattern == [int(at >= first and (at - first) % every == 0) for at in range(layers)]:
            return first, every
    rule = "is a pattern that --parallel auto has no model of: dense layers first, then experts in every n-th layer"
    raise ConfigError("--moe-layer-freq", freq, rule, _OWN_WAY)


def _pattern(text: str) -> list[int]:
    """`([0]*1+[1]*3)`, `([0,1]*2)` or `([0,1,1,1])` as numbers; anything else is an empty list."""
    found: list[int] = []
    for part in text.replace(" ", "").removeprefix("(").removesuffix(")").split("+"):
        match = re.fullmatch(r"\[([01](?:,[01])*)\](?:\*(\d+))?", part)
        if match is None:
            return []
        found += [int(one) for one in match[1].split(",")] * int(match[2] or 1)
    return found
