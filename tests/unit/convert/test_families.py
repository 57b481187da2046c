"""What a config.json says is taken over or refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_smartmoe.convert.families import FAMILIES, table_of
from megatron_smartmoe.convert.hf_config import HFConfig
from megatron_smartmoe.errors import ConfigError

BASE: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 250,
    "intermediate_size": 96,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
}
LATENT: dict[str, Any] = {
    "moe_intermediate_size": 48,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 24,
    "q_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
}
OF_FAMILY: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 8, "num_experts_per_tok": 2},
    "qwen2_moe": {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
    | {"shared_expert_intermediate_size": 80},
    "qwen3_moe": {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 48},
    "olmoe": {"num_experts": 8, "num_experts_per_tok": 2},
    "deepseek_v2": {**LATENT, "num_experts_per_tok": 2},
    "deepseek_v3": {**LATENT, "num_experts_per_tok": 4, "n_group": 4, "topk_group": 2},
    "llama": {},
    "qwen2": {},
    "qwen3": {},
}


def config(family: str, **changes: Any) -> HFConfig:
    return HFConfig({"model_type": family, **BASE, **OF_FAMILY.get(family, {}), **changes}, Path("model/config.json"))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_tensor_is_made_of_whole_rows(family: str) -> None:
    table = table_of(config(family))
    for name, shape in table.shapes.items():
        rows = [
            row
            for parameter in table.parameters
            for segment in parameter.segments
            if segment.tensor == name
            for row in range(segment.first, segment.first + segment.count)
        ]
        assert sorted(rows) == list(range(shape[0])), name
    for parameter in table.parameters:
        assert sum(segment.count for segment in parameter.segments) == parameter.shape[0], parameter.name


@pytest.mark.parametrize(
    ("family", "key", "value", "rule"),
    [
        ("mixtral", "sliding_window", 4096, "sliding window"),
        ("mixtral", "new_attention_gate", True, "is not known here for a model of type 'mixtral'"),
        ("mixtral", "hidden_act", "gelu", "SwiGLU"),
        ("mixtral", "num_key_value_heads", 3, "must divide num_attention_heads = 8"),
        ("mixtral", "rope_scaling", {"type": "linear", "factor": 2.0}, "of kind 'linear'"),
        ("mixtral", "hidden_size", "64", "must be a whole number"),
        ("mixtral", "rope_theta", 10000.5, "must be a whole number"),
        ("qwen2_moe", "use_sliding_window", True, "sliding window"),
        ("qwen3_moe", "attention_bias", True, "no place for only these biases"),
        ("olmoe", "clip_qkv", 8.0, "does not clip"),
        ("deepseek_v2", "topk_method", "group_limited_greedy", "must be a whole number"),
        ("deepseek_v2", "q_lora_rank", None, "no norm of keys and values alone"),
        ("deepseek_v2", "norm_topk_prob", True, "does not normalise"),
        ("deepseek_v3", "topk_group", 4, "rated by its best two experts"),
        ("deepseek_v3", "norm_topk_prob", False, "divides the chosen scores"),
        ("deepseek_v3", "rms_norm_eps", 1e-5, "fixed for the norms inside the attention"),
        ("llama", "mlp_bias", True, "biases"),
        ("gpt_oss", "model_type", "gpt_oss", "sinks"),
        ("bert", "model_type", "bert", "is not a family that is known here"),
    ],
)
def test_what_megatron_has_not_is_refused_by_name(family: str, key: str, value: object, rule: str) -> None:
    with pytest.raises(ConfigError, match=rule) as raised:
        table_of(config(family, **{key: value}))
    assert "model/config.json, " in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_key_that_the_user_vouches_for() -> None:
    assert table_of(config("mixtral", new_key=1), ["new_key"]).family == "mixtral"


def test_dense_layers_among_those_with_experts() -> None:
    table = table_of(config("qwen3_moe", mlp_only_layers=[0], decoder_sparse_step=1))
    assert table.flags["moe-layer-freq"] == [0, 1, 1, 1]
    assert "model.layers.0.mlp.gate_proj.weight" in table.shapes


def test_softmax_and_top_k_are_in_the_familys_order() -> None:
    assert "moe-router-pre-softmax" not in table_of(config("mixtral")).flags
    assert table_of(config("olmoe", norm_topk_prob=False)).flags["moe-router-pre-softmax"] is True
    assert "moe-router-pre-softmax" not in table_of(config("qwen3_moe", norm_topk_prob=True)).flags
