"""The model and the launch that Megatron's arguments describe, the reverse of `flags.megatron_flags`.

It reads parsed arguments, not tokens, so that Megatron's own parser settles defaults, aliases and types. They come as
a mapping of names to values (`vars` of a namespace), as parsed or as validated: nothing of Megatron is imported here.

Describing a run and planning one are two things: `check_plannable` refuses what the planner has no model of;
`model_from_arguments` describes any run that trains, where necessary by the nearest model.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from megatron_smartmoe.errors import ConfigError
from megatron_smartmoe.planner.flags import as_flag, grads_in_fp32, layout_layers, recompute_mode
from megatron_smartmoe.spec.model import LatentAttention, ModelSpec, MoESpec, Norm, Position
from megatron_smartmoe.spec.parallel import FLAT, HIERARCHICAL, ParallelSpec

_REQUIRED = ("num_layers", "hidden_size", "num_attention_heads", "seq_length", "num_experts", "global_batch_size")
# argument -> why the planner cannot price such a run
_NOT_PLANNED = {
    "use_checkpoint_args": "the model's shape is still in the checkpoint",
    "hybrid_layer_pattern": "the planner supports transformer layers only",
    "moe_latent_size": "the planner has no model of it",
    "mtp_use_repeated_layer": "the planner counts a layer for each prediction depth",
    "use_megatron_fsdp": "the planner has no model of it",
    "use_torch_fsdp2": "the planner has no model of it",
    "rampup_batch_size": "the planner prices one batch size",
    "step_batch_size_schedule": "the planner prices one batch size",
    "fp8": "the planner prices bf16 and fp32",
    "fp4": "the planner prices bf16 and fp32",
    "use_precision_aware_optimizer": "the planner counts fp32 main weights and moments, on the GPU",
    "moe_pad_expert_input_to_capacity": "the planner prices the rows that tokens choose, without padding",
    "optimizer_cpu_offload": "the planner counts fp32 main weights and moments, on the GPU",
}
_FLAG_OF = {"fp8": "--fp8-format", "fp4": "--fp4-format"}  # where the argument has another name
_BALANCING = ("aux_loss", "seq_aux_loss", "global_aux_loss", "none")
_WAY_OUT = "Remove this flag, or remove --parallel auto and set the parallel sizes yourself."


def check_plannable(values: Mapping[str, Any]) -> None:
    """Refuse what `--parallel auto` cannot plan.

    Args:
        values: Megatron's arguments by name, as parsed.

    Raises:
        ConfigError: a size is missing, or the arguments describe what the planner has no model of.
    """
    for name, reason in _NOT_PLANNED.items():
        if values.get(name):
            rule = f"is not supported with --parallel auto: {reason}"
            raise ConfigError(_FLAG_OF.get(name, as_flag(name)), values[name], rule, _WAY_OUT)
    if (optimizer := values.get("optimizer") or "adam") != "adam":
        rule = "is not supported with --parallel auto: the planner counts Adam's state"
        raise ConfigError("--optimizer", optimizer, rule, _WAY_OUT)
    if (dispatcher := values.get("moe_token_dispatcher_type") or "alltoall") != "alltoall":
        rule = "is not supported with --parallel auto: the planner prices the launches of the all-to-all dispatcher"
        raise ConfigError("--moe-token-dispatcher-type", dispatcher, rule, _WAY_OUT)
    for name in _REQUIRED:
        if values.get(name) is None:
            way_out = f"Pass {as_flag(name)}, or a --config that has it."
            raise ConfigError(as_flag(name), None, "is required by --parallel auto", way_out)
    pattern = _expert_layers(values)
    first_dense, every = _nearest_places(pattern)
    if pattern != [int(at >= first_dense and (at - first_dense) % every == 0) for at in range(values["num_layers"])]:
        rule = "is not supported with --parallel auto, which plans dense layers first, then experts in every n-th layer"
        raise ConfigError(as_flag("moe_layer_freq"), values["moe_layer_freq"], rule, _WAY_OUT)


def model_from_arguments(values: Mapping[str, Any], name: str = "run") -> ModelSpec:
    """The model and its batch.

    Its vocabulary is that of --vocab-size, else 0: the tokenizer has it, and often no argument does. Experts in an
    irregular pattern of layers become the nearest regular one.

    Args:
        values: Megatron's arguments by name, with the sizes that `check_plannable` requires.
        name: of the model.
    """
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
        gated=bool(values["swiglu"] or values["quick_geglu"]),
        bias=bool(values["add_bias_linear"]),
        qk_norm=bool(values["qk_layernorm"]),
        qkv_bias=bool(values["add_qkv_bias"]),
        tied=not values["untie_embeddings_and_output_weights"],
        position=_position(values["position_embedding_type"]),
        rope_base=int(values["rotary_base"]),
        mtp_layers=values["mtp_num_layers"] or 0,
        dropout=float(max(values["attention_dropout"], values["hidden_dropout"])),
    )


def parallel_from_arguments(values: Mapping[str, Any], model: ModelSpec, gpus: int) -> ParallelSpec:
    """The launch that arguments describe: what `flags.parallel_from_flags` reads from a command line.

    Args:
        values: Megatron's arguments by name.
        model: from `model_from_arguments`.
        gpus: ranks of the job.

    Raises:
        ConfigError: a layout that Megatron would not read.
    """
    tp, pp = values["tensor_model_parallel_size"], values["pipeline_model_parallel_size"]
    layout, layers_each = values["pipeline_model_parallel_layout"], values["num_layers_per_virtual_pipeline_stage"]
    layers_of_chunk = None if layout is None else layout_layers(str(layout))
    vpp = values["num_virtual_stages_per_pipeline_rank"] or 1
    if layers_of_chunk is not None:
        vpp = len(layers_of_chunk) // pp
    elif layers_each:
        vpp = max(1, model.layers // pp // layers_each)
    degree, slots = values["smartmoe_overlap_degree"], values["smartmoe_spare_slots"]
    homes_move = values["smartmoe"] and values["smartmoe_homes"] != "off"
    return ParallelSpec(
        gpus=gpus,
        tp=tp,
        pp=pp,
        vpp=vpp,
        ep=values["expert_model_parallel_size"],
        etp=values["expert_tensor_parallel_size"] or tp,
        cp=values["context_parallel_size"],
        micro_batch=values["micro_batch_size"],
        global_batch=values["global_batch_size"] or model.global_batch,
        layers_of_chunk=layers_of_chunk,
        recompute=recompute_mode(values["recompute_granularity"], values["recompute_modules"] or ()),
        spare_slots=slots,
        replicas=values["smartmoe_replicas"] or ("auto" if slots else "off"),
        homes_interval=values["smartmoe_homes_interval"] if homes_move else 0,
        overlap_degree=1 if degree == "auto" else int(degree),
        dispatch=HIERARCHICAL if values["smartmoe_dispatch"] == HIERARCHICAL else FLAT,
        distributed_optimizer=bool(values["use_distributed_optimizer"]),
        overlap_grad_reduce=bool(values["overlap_grad_reduce"]),
        overlap_param_gather=bool(values["overlap_param_gather"]),
        grad_reduce_in_fp32=grads_in_fp32(
            bf16=values["bf16"],
            fp16=values["fp16"],
            reduce_in_bf16=values["grad_reduce_in_bf16"],
            accumulate_in_fp32=values["accumulate_allreduce_grads_in_fp32"],
        ),
        precision="bf16" if values["bf16"] or values["fp16"] else "fp32",
        implementation="local" if values["transformer_impl"] == "local" else "transformer_engine",
    )


def _position(kind: str) -> Position:
    """A learned table has weights; every other kind costs as little as rotary embeddings."""
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
    first_dense, every = _nearest_places(_expert_layers(values))
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


def _expert_layers(values: Mapping[str, Any]) -> list[int]:
    """1 for each layer with experts, else 0, from --moe-layer-freq; an empty list where its text cannot be read."""
    freq, layers = values["moe_layer_freq"], values["num_layers"]
    if isinstance(freq, int):
        return [int(at % freq == 0) for at in range(layers)]
    return list(freq) if isinstance(freq, list | tuple) else _pattern(str(freq))


def _nearest_places(pattern: list[int]) -> tuple[int, int]:
    """(leading dense layers, each n-th of the rest has experts), the nearest to a pattern of layers."""
    if 1 not in pattern:
        return 0, 1
    at = [layer for layer, has_experts in enumerate(pattern) if has_experts]
    return at[0], round((at[-1] - at[0]) / (len(at) - 1)) if len(at) > 1 else len(pattern) - at[0]


def _pattern(text: str) -> list[int]:
    """`([0]*1+[1]*3)`, `([0,1]*2)` or `([0,1,1,1])` as numbers; anything else is an empty list."""
    found: list[int] = []
    for part in text.replace(" ", "").removeprefix("(").removesuffix(")").split("+"):
        match = re.fullmatch(r"\[([01](?:,[01])*)\](?:\*(\d+))?", part)
        if match is None:
            return []
        found += [int(one) for one in match[1].split(",")] * int(match[2] or 1)
    return found
