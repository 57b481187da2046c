"""The blocks that models are made of: names and shapes on both sides, and Megatron's flags for them.

Names on Megatron's side are those of `checkpoint.names`: a norm that Megatron fuses with the linear layer behind it has
that layer's name. Shapes and order of rows are those of megatron-core 0.19: `Attention`, `MLASelfAttention`, `MLP`,
`TopKRouter` and `SharedExpertMLP` in megatron/core/transformer. Hugging Face's are those of the `modeling_*.py` of
transformers 5.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_smartmoe.convert.families.table import ModelTable
from megatron_smartmoe.convert.hf_config import HFConfig
from megatron_smartmoe.convert.packing import by_query_group, stacked

EMBEDDING = "embedding.word_embeddings.weight"
OUTPUT = "output_layer.weight"
FINAL_NORM = "decoder.final_layernorm.weight"
INPUT_NORM = "self_attention.linear_qkv.layer_norm_weight"
MLP_NORM = "mlp.linear_fc1.layer_norm_weight"
_MOST_EXPERTS = 1_000_000  # of all layers together; each has a line in the table
_EXPERT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts")
_ROPE_KEYS = frozenset(
    "rope_type type rope_theta partial_rotary_factor factor low_freq_factor high_freq_factor "
    "original_max_position_embeddings attention_factor beta_fast beta_slow mscale mscale_all_dim".split()
)


@dataclass(frozen=True, kw_only=True)
class Where:
    """One layer on both sides.

    Attributes:
        megatron: prefix of its parameters, with the final dot.
        hf: prefix of its tensors, with the final dot.
    """

    megatron: str
    hf: str


def layer(number: int) -> Where:
    """A layer of the model, counted from 0."""
    return Where(megatron=f"decoder.layers.{number}.", hf=f"model.layers.{number}.")


def start(family: str, config: HFConfig, *, num_experts: int | None, expert_layers: tuple[bool, ...]) -> ModelTable:
    """The table with embedding, output layer and last norm, and the flags that all families have.

    Raises:
        ConfigError: a size is missing or cannot be.
    """
    if (num_experts or 0) * len(expert_layers) > _MOST_EXPERTS:
        rule = f"is not possible: {num_experts:,} experts in each of {len(expert_layers):,} layers"
        key = next((key for key in _EXPERT_KEYS if key in config.content), _EXPERT_KEYS[0])
        raise config.refused(key, rule)
    hidden, vocab = config.size("hidden_size"), config.size("vocab_size")
    table = ModelTable(
        family=family,
        config=config,
        num_layers=len(expert_layers),
        num_experts=num_experts,
        expert_layers=expert_layers,
        vocab_size=vocab,
    )
    tied = config.flag("tie_word_embeddings", False)
    config.require("hidden_act", "silu", "silu", "the experts compute SwiGLU")
    table.add(EMBEDDING, (vocab, hidden), "model.embed_tokens.weight")
    table.add(FINAL_NORM, (hidden,), "model.norm.weight")
    if tied:
        table.copies["lm_head.weight"] = "model.embed_tokens.weight"
    else:
        table.add(OUTPUT, (vocab, hidden), "lm_head.weight")
    table.flags |= {
        "num-layers": table.num_layers,
        "hidden-size": hidden,
        "num-attention-heads": config.size("num_attention_heads"),
        "ffn-hidden-size": config.size("intermediate_size"),
        "max-position-embeddings": config.size("max_position_embeddings"),
        "position-embedding-type": "rope",
        "normalization": "RMSNorm",
        "norm-epsilon": config.number("rms_norm_eps"),
        "swiglu": True,
        "disable-bias-linear": True,
        "untie-embeddings-and-output-weights": not tied,
        "attention-dropout": 0,
        "hidden-dropout": 0,
        "init-method-std": config.number("initializer_range", 0.02),
    }
    if num_experts is not None:
        balance = config.get("router_aux_loss_coef", config.get("aux_loss_alpha", 0.0))
        if type(balance) not in (int, float) or balance < 0:
            raise config.refused("router_aux_loss_coef", "must be a number, at least 0")
        topk = config.size("num_experts_per_tok")
        if topk > num_experts:
            raise config.refused("num_experts_per_tok", f"must be at most the number of experts, {num_experts}")
        table.flags |= {
            "num-experts": num_experts,
            "moe-router-topk": topk,
            "moe-router-load-balancing-type": "aux_loss" if balance else "none",
            "moe-aux-loss-coeff": balance,
            "moe-router-dtype": "fp32",
        }
        if len(set(expert_layers)) > 1:
            table.flags["moe-layer-freq"] = [int(has) for has in expert_layers]
    return table


def attention(table: ModelTable, where: Where, *, has_bias: bool = False, norms: str | None = None) -> None:
    """Attention with grouped queries.

    Args:
        table: to add to.
        where: the layer.
        has_bias: whether queries, keys and values have biases.
        norms: `head` for norms of each query's and key's head, `all` for one over all heads together.
    """
    config = table.config
    hidden, heads, groups, head_size = attention_sizes(config)
    query, kv, packed = heads * head_size, groups * head_size, (heads + 2 * groups) * head_size
    table.add(where.megatron + INPUT_NORM, (hidden,), where.hf + "input_layernorm.weight")
    for kind in ("weight", "bias") if has_bias else ("weight",):
        tail = (hidden,) if kind == "weight" else ()
        names = [f"{where.hf}self_attn.{letter}_proj.{kind}" for letter in "qkv"]
        table.add(
            f"{where.megatron}self_attention.linear_qkv.{kind}",
            (packed, *tail),
            {name: (size, *tail) for name, size in zip(names, (query, kv, kv), strict=True)},
            by_query_group(names[0], names[1], names[2], heads=heads, groups=groups, head_size=head_size),
        )
    table.add(
        where.megatron + "self_attention.linear_proj.weight", (hidden, query), where.hf + "self_attn.o_proj.weight"
    )
    for letter, width in (("q", query), ("k", kv)) if norms else ():
        table.add(
            f"{where.megatron}self_attention.{letter}_layernorm.weight",
            (width if norms == "all" else head_size,),
            f"{where.hf}self_attn.{letter}_norm.weight",
        )


def attention_sizes(config: HFConfig) -> tuple[int, int, int, int]:
    """Hidden size, heads, query groups, size of a head.

    Raises:
        ConfigError: they do not divide each other.
    """
    hidden, heads = config.size("hidden_size"), config.size("num_attention_heads")
    groups = config.size("num_key_value_heads", default=heads)
    head_size = config.size("head_dim", default=max(1, hidden // heads))
    if heads % groups:
        raise config.refused("num_key_value_heads", f"must divide num_attention_heads = {heads}")
    return hidden, heads, groups, head_size


def attention_flags(table: ModelTable) -> None:
    """Megatron's flags for `attention`."""
    _, _, groups, head_size = attention_sizes(table.config)
    table.flags |= {"group-query-attention": True, "num-query-groups": groups, "kv-channels": head_size}


def mlp_norm(table: ModelTable, where: Where) -> None:
    """The norm in front of a layer's MLP or experts."""
    hidden = table.config.size("hidden_size")
    table.add(where.megatron + MLP_NORM, (hidden,), where.hf + "post_attention_layernorm.weight")


def gated(
    table: ModelTable,
    megatron: str,
    hf: str,
    ffn: int,
    *,
    expert: int | None = None,
    names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
) -> None:
    """A SwiGLU block: Megatron has the gate's rows above the linear ones in one tensor.

    Args:
        table: to add to.
        megatron: prefix of its two parameters.
        hf: prefix of its three tensors.
        ffn: its inner size.
        expert: logical expert; None where it is no expert.
        names: of gate, linear and output tensor.
    """
    hidden = table.config.size("hidden_size")
    gate, up, down = (f"{hf}{name}.weight" for name in names)
    shape = (ffn, hidden)
    table.add(
        f"{megatron}linear_fc1.weight",
        (2 * ffn, hidden),
        {gate: shape, up: shape},
        stacked((gate, up), ffn),
        expert=expert,
    )
    table.add(f"{megatron}linear_fc2.weight", (hidden, ffn), {down: (hidden, ffn)}, expert=expert)


def experts(
    table: ModelTable,
    where: Where,
    ffn: int,
    *,
    block: str = "mlp",
    names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
) -> None:
    """The router and the experts of a layer."""
    hidden, count = table.config.size("hidden_size"), table.num_experts
    assert count is not None
    table.add(where.megatron + "mlp.router.weight", (count, hidden), f"{where.hf}{block}.gate.weight")
    for expert in range(count):
        gated(
            table,
            where.megatron + "mlp.experts.",
            f"{where.hf}{block}.experts.{expert}.",
            ffn,
            expert=expert,
            names=names,
        )


def plain_rope(table: ModelTable, theta: float = 10000.0) -> None:
    """The rotary embedding, which must be the plain one or Llama 3's.

    transformers 5 writes `rope_parameters`; earlier releases `rope_theta`, and `rope_scaling` for what is not plain.

    Args:
        table: to add its flags to.
        theta: the base where config.json has none: the default of the family.

    Raises:
        ConfigError: it is of another kind.
    """
    config = table.config
    parameters, kind = rope_parameters(config)
    table.flags["rotary-base"] = rotary_base(config, parameters, theta)
    if parameters.get("partial_rotary_factor", 1.0) != 1.0:
        raise config.refused("rope_parameters", "is not supported: only a part of each head would be rotated")
    if kind == "llama3":
        _llama3_rope(table, parameters)
    elif kind != "default":
        rule = f"is not supported: the rotary embedding is of kind {kind!r}"
        raise config.refused(_rope_key(config), rule, "Supported here: default, llama3.")


def rotary_base(config: HFConfig, parameters: dict[str, object], default: float = 10000.0) -> int:
    """The base of the rotary embedding's frequencies.

    Raises:
        ConfigError: it is no whole number.
    """
    theta = parameters.get("rope_theta", config.get("rope_theta", default))
    if not isinstance(theta, int | float) or theta != int(theta) or theta < 1:
        raise config.refused("rope_theta", "must be a whole number: Megatron's --rotary-base is one")
    return int(theta)


def _llama3_rope(table: ModelTable, parameters: dict[str, object]) -> None:
    """Megatron's --use-rope-scaling has three of Llama 3's four numbers fixed (RotaryEmbedding._apply_scaling)."""
    fixed = {"low_freq_factor": 1, "high_freq_factor": 4, "original_max_position_embeddings": 8192}
    for name, wanted in fixed.items():
        if parameters.get(name) != wanted:
            rule = f"is not supported: {name} is {parameters.get(name)!r}, and Megatron has {wanted} fixed"
            raise table.config.refused(_rope_key(table.config), rule)
    factor = parameters.get("factor")
    if not isinstance(factor, int | float) or not factor > 0:
        raise table.config.refused(_rope_key(table.config), "must have a factor above 0")
    table.flags |= {"use-rope-scaling": True, "rope-scaling-factor": float(factor)}


def rope_parameters(config: HFConfig) -> tuple[dict[str, object], str]:
    """The rotary embedding's parameters, and its kind.

    Raises:
        ConfigError: they are no mapping.
    """
    old, new = config.get("rope_scaling", {}), config.get("rope_parameters", {})
    config.get("rope_theta", None)
    for key, value in (("rope_scaling", old), ("rope_parameters", new)):
        if not isinstance(value, dict):
            raise config.refused(key, "must be a mapping")
        unknown = next((name for name in value if name not in _ROPE_KEYS), None)
        if unknown is not None and _rope_kind(value) in ("default", "llama3", "yarn"):
            raise config.refused(key, f"is not supported: it has {unknown!r}, which is not known here")
    found = {**old, **new}
    return found, _rope_kind(found)


def _rope_kind(parameters: dict[str, object]) -> str:
    return str(parameters.get("rope_type", parameters.get("type", "default")))


def _rope_key(config: HFConfig) -> str:
    return "rope_parameters" if config.get("rope_parameters", None) else "rope_scaling"


def no_biases(config: HFConfig, *keys: str) -> None:
    """Refuse biases that Megatron has no place for.

    Raises:
        ConfigError: the model has some.
    """
    for key in keys:
        config.require(key, False, False, "Megatron has no place for only these biases")


def no_sliding_window(config: HFConfig) -> None:
    """Refuse attention to a window of the last tokens.

    Raises:
        ConfigError: a layer has it.
    """
    why = "attention to a sliding window has no torch kernel here (SDPAttention)"
    config.require("use_sliding_window", False, False, why)
    kinds = config.get("layer_types", [])
    if isinstance(kinds, list) and any(kind != "full_attention" for kind in kinds):
        raise config.refused("layer_types", f"is not supported: {why}")
