"""DeepSeek-V2 and V3 (arXiv 2405.04434, 2412.19437; transformers/models/deepseek_v2 and deepseek_v3).

Multi-latent attention rotates pairs of neighbours on both sides (`apply_rotary_pos_emb_interleave` there,
`mla_rotary_interleaved` in Megatron), so no row changes its place. Released V3 files are 8-bit floats with a scale for
each block of 128 x 128; they are dequantised as they are read.
"""

from __future__ import annotations

import re

from megatron_smartmoe.convert.families import blocks
from megatron_smartmoe.convert.families.table import ModelTable
from megatron_smartmoe.convert.hf_config import HFConfig

# Numbers of the rotary embedding that Megatron has no flags for (MLATransformerConfig's defaults).
_FIXED_ROPE = {"original_max_position_embeddings": 4096, "beta_fast": 32, "beta_slow": 1}
_NORM_EPSILON = 1e-6  # that transformers has fixed for the norms inside the attention (DeepseekV3RMSNorm)


def deepseek_v2(config: HFConfig) -> ModelTable:
    """The table of a DeepSeek-V2."""
    made = _start("deepseek_v2", config)
    method = config.get("topk_method", "greedy")
    if method == "group_limited_greedy":
        # DeepseekV2TopkRouter scores a group by its best expert, Megatron's group_limited_topk by the sum of its best
        # topk / group_topk: the same where that is one.
        topk, groups_taken = config.size("num_experts_per_tok"), config.size("topk_group")
        if topk // groups_taken != 1:
            rule = f"is not supported: it rates a group by its best expert, and Megatron by its best {topk}"
            raise config.refused("topk_method", f"{rule} / {groups_taken}")
        made.flags |= {"moe-router-num-groups": config.size("n_group"), "moe-router-group-topk": groups_taken}
    elif method != "greedy":
        raise config.refused("topk_method", "must be greedy or group_limited_greedy")
    for key in ("n_group", "topk_group"):
        config.get(key, None)
    config.require("scoring_func", "softmax", "softmax", "DeepSeek-V2 scores by softmax")
    config.require("norm_topk_prob", False, False, "transformers does not normalise, and neither does Megatron")
    made.flags["moe-router-pre-softmax"] = True
    scale = config.number("routed_scaling_factor", 1.0)
    if scale != 1:
        made.flags["moe-router-topk-scaling-factor"] = scale
    for number, has_experts in enumerate(made.expert_layers):
        _layer(made, blocks.layer(number), has_experts=has_experts, has_bias=False)
    return made


def deepseek_v3(config: HFConfig) -> ModelTable:
    """The table of a DeepSeek-V3."""
    made = _start("deepseek_v3", config)
    config.require("topk_method", "noaux_tc", "noaux_tc", "DeepSeek-V3 chooses experts with a bias")
    config.require("scoring_func", "sigmoid", "sigmoid", "DeepSeek-V3 scores by sigmoid")
    config.require("norm_topk_prob", True, True, "Megatron divides the chosen scores by their sum")
    config.require("rope_interleave", True, True, "Megatron rotates pairs of neighbours")
    topk, groups = config.size("num_experts_per_tok"), config.size("n_group")
    taken = config.size("topk_group")
    if groups > 1:
        # DeepseekV3TopkRouter rates a group by its best two experts, Megatron by its best topk / group_topk.
        if topk // taken != 2:
            rule = f"is not supported: a group is rated by its best two experts, and by Megatron by {topk} / {taken}"
            raise config.refused("topk_group", rule)
        made.flags |= {"moe-router-num-groups": groups, "moe-router-group-topk": taken}
    made.flags |= {
        "moe-router-score-function": "sigmoid",
        "moe-router-enable-expert-bias": True,
        "moe-router-topk-scaling-factor": config.number("routed_scaling_factor", 2.5),
    }
    made.flags["moe-router-load-balancing-type"] = "seq_aux_loss" if made.flags["moe-aux-loss-coeff"] else "none"
    for number, has_experts in enumerate(made.expert_layers):
        _layer(made, blocks.layer(number), has_experts=has_experts, has_bias=True)
    _leave_out_prediction(made)
    return made


def _start(family: str, config: HFConfig) -> ModelTable:
    layers, first_dense = config.num_layers, config.count("first_k_dense_replace", 0)
    expert_layers = tuple(number >= first_dense for number in range(layers))
    num_experts = config.size("n_routed_experts", "num_local_experts", "num_experts")
    made = blocks.start(family, config, num_experts=num_experts, expert_layers=expert_layers)
    blocks.no_biases(config, "attention_bias", "mlp_bias")
    config.require("moe_layer_freq", 1, 1, "every layer behind the first dense ones must have experts")
    if config.number("rms_norm_eps", 1e-6) != _NORM_EPSILON:
        rule = f"is not supported: transformers has {_NORM_EPSILON} fixed for the norms inside the attention"
        raise config.refused("rms_norm_eps", rule)
    shared = config.size("n_shared_experts") * config.size("moe_intermediate_size")
    made.flags |= {
        "multi-latent-attention": True,
        "qk-layernorm": True,
        "kv-lora-rank": config.size("kv_lora_rank"),
        "qk-head-dim": config.size("qk_nope_head_dim"),
        "qk-pos-emb-head-dim": config.size("qk_rope_head_dim"),
        "v-head-dim": config.size("v_head_dim"),
        "moe-ffn-hidden-size": config.size("moe_intermediate_size"),
        "moe-shared-expert-intermediate-size": shared,
    }
    if config.get("q_lora_rank", None) is None:
        # QKNormConfigResolver: without low-rank queries Megatron 0.19 normalises both queries and keys, or neither.
        rule = "is not supported: Megatron has no norm of keys and values alone, as this model has without q_lora_rank"
        raise config.refused("q_lora_rank", rule)
    made.flags["q-lora-rank"] = config.size("q_lora_rank")
    config.get("qk_head_dim", None)  # the sum of two others
    _rope(made)
    return made


def _rope(made: ModelTable) -> None:
    config = made.config
    parameters, kind = blocks.rope_parameters(config)
    made.flags["rotary-base"] = blocks.rotary_base(config, parameters)
    if kind == "default":
        made.flags["rope-type"] = "rope"
        return
    key = "rope_parameters" if config.get("rope_parameters", None) else "rope_scaling"
    if kind != "yarn":
        raise config.refused(key, f"is not supported: the rotary embedding is of kind {kind!r}")
    for name, fixed in _FIXED_ROPE.items():
        if parameters.get(name, fixed) != fixed:
            raise config.refused(key, f"is not supported: {name} must be {fixed}, which Megatron has no flag for")
    if parameters.get("attention_factor") is not None:
        raise config.refused(key, "is not supported: Megatron computes attention_factor itself")
    made.flags |= {"rope-type": "yarn", "rotary-scaling-factor": _number(made, key, parameters, "factor", None)}
    # transformers takes both only where both are given and not 0, and 1 and 0 otherwise (_compute_yarn_parameters).
    mscale = _number(made, key, parameters, "mscale", 0.0)
    all_dim = _number(made, key, parameters, "mscale_all_dim", 0.0)
    if all_dim and not mscale:
        raise config.refused(key, "is not supported: mscale_all_dim without mscale")
    made.flags |= {"mscale": mscale if mscale and all_dim else 1.0, "mscale-all-dim": all_dim}


def _number(made: ModelTable, key: str, parameters: dict[str, object], name: str, default: float | None) -> float:
    value = parameters.get(name, default)
    if not isinstance(value, int | float) or value < 0:
        raise made.config.refused(key, f"must have a number {name} that is not negative")
    return float(value)


def _layer(made: ModelTable, where: blocks.Where, *, has_experts: bool, has_bias: bool) -> None:
    config = made.config
    _latent_attention(made, where)
    blocks.mlp_norm(made, where)
    if not has_experts:
        blocks.gated(made, where.megatron + "mlp.", where.hf + "mlp.", config.size("intermediate_size"))
        return
    blocks.experts(made, where, config.size("moe_intermediate_size"))
    if has_bias:
        # Added to the scores for the choice alone, in float32 on both sides.
        bias = where.hf + "mlp.gate.e_score_correction_bias"
        made.add(where.megatron + "mlp.router.expert_bias", (made.num_experts or 0,), bias, is_float32=True)
    shared = config.size("n_shared_experts") * config.size("moe_intermediate_size")
    blocks.gated(made, where.megatron + "mlp.shared_experts.", where.hf + "mlp.shared_experts.", shared)


def _latent_attention(made: ModelTable, where: blocks.Where) -> None:
    """Multi-latent attention (MLASelfAttention; DeepseekV3Attention): both sides have the same rows."""
    config = made.config
    hidden, heads = config.size("hidden_size"), config.size("num_attention_heads")
    nope, rope, value = (config.size(key) for key in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"))
    latent = config.size("kv_lora_rank")
    megatron, hf = where.megatron + "self_attention.", where.hf + "self_attn."
    made.add(where.megatron + blocks.INPUT_NORM, (hidden,), where.hf + "input_layernorm.weight")
    rank = config.size("q_lora_rank")
    made.add(megatron + "linear_q_down_proj.weight", (rank, hidden), hf + "q_a_proj.weight")
    made.add(megatron + "q_layernorm.weight", (rank,), hf + "q_a_layernorm.weight")
    made.add(megatron + "linear_q_up_proj.weight", (heads * (nope + rope), rank), hf + "q_b_proj.weight")
    made.add(megatron + "linear_kv_down_proj.weight", (latent + rope, hidden), hf + "kv_a_proj_with_mqa.weight")
    made.add(megatron + "kv_layernorm.weight", (latent,), hf + "kv_a_layernorm.weight")
    made.add(megatron + "linear_kv_up_proj.weight", (heads * (nope + value), latent), hf + "kv_b_proj.weight")
    made.add(megatron + "linear_proj.weight", (hidden, heads * value), hf + "o_proj.weight")


def _leave_out_prediction(made: ModelTable) -> None:
    """Layers that predict further tokens lie behind the others in the released files, and not in all files."""
    count = made.config.count("num_nextn_predict_layers", 0) or made.config.count("num_mtp_layers", 0)
    if count:
        numbers = "|".join(str(made.num_layers + number) for number in range(count))
        made.ignored = re.compile(rf"{made.ignored.pattern}|model\.layers\.(?:{numbers})\..*")
        made.mtp_layers = count


def add_prediction(made: ModelTable) -> None:
    """Add the layers that predict further tokens (MTP), for a model whose files have them.

    On both sides such a layer norms the embedding of the next token and the last hidden state, projects the two to one,
    in this order, and ends in a norm (MultiTokenPredictionLayer; transformers/modeling_layers.py). The released files
    repeat embedding and output layer for each; Megatron shares them.
    """
    hidden = made.config.size("hidden_size")
    made.flags["mtp-num-layers"] = made.mtp_layers
    made.ignored = ModelTable.ignored
    for number in range(made.mtp_layers):
        megatron, hf = f"mtp.layers.{number}.", f"model.layers.{made.num_layers + number}."
        for name, of_hf in (("enorm", "enorm"), ("hnorm", "hnorm"), ("final_layernorm", "shared_head.norm")):
            made.add(f"{megatron}{name}.weight", (hidden,), f"{hf}{of_hf}.weight")
        made.add(f"{megatron}eh_proj.weight", (hidden, 2 * hidden), f"{hf}eh_proj.weight")
        where = blocks.Where(megatron=f"{megatron}transformer_layer.", hf=hf)
        _layer(made, where, has_experts=True, has_bias=True)
        made.copies[f"{hf}embed_tokens.weight"] = "model.embed_tokens.weight"
        made.copies[f"{hf}shared_head.head.weight"] = "lm_head.weight"
