"""Tiny random models of each family that `smartmoe convert` knows, made with transformers' own classes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

_SIZES = {
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 250,
    "max_position_embeddings": 128,
    "initializer_range": 0.1,
}
_EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2}
_LATENT = {
    **_SIZES,
    "num_key_value_heads": 8,
    "intermediate_size": 128,
    "moe_intermediate_size": 48,
    "first_k_dense_replace": 1,
    "n_shared_experts": 2,
    "n_routed_experts": 8,
    "kv_lora_rank": 24,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
}
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "mscale": 0.9,
    "mscale_all_dim": 0.8,
    "original_max_position_embeddings": 4096,
    "beta_fast": 32,
    "beta_slow": 1,
}

# Name of transformers' classes without Config and ForCausalLM, and what differs from its defaults.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": (
        "Mixtral",
        {**_SIZES, "intermediate_size": 96, "num_local_experts": 8, "num_experts_per_tok": 2, "rope_theta": 1e6},
    ),
    "qwen2_moe": (
        "Qwen2Moe",
        {**_SIZES, **_EXPERTS, "intermediate_size": 128, "moe_intermediate_size": 48}
        | {"shared_expert_intermediate_size": 80, "norm_topk_prob": False},
    ),
    "qwen3_moe": (
        "Qwen3Moe",
        {**_SIZES, **_EXPERTS, "head_dim": 16, "intermediate_size": 128, "moe_intermediate_size": 48}
        | {"norm_topk_prob": True, "decoder_sparse_step": 1},
    ),
    "olmoe": ("Olmoe", {**_SIZES, **_EXPERTS, "intermediate_size": 48, "norm_topk_prob": False}),
    "deepseek_v2": (
        "DeepseekV2",
        {**_LATENT, "num_experts_per_tok": 3, "q_lora_rank": 32, "topk_method": "greedy"}
        | {"routed_scaling_factor": 1.5, "rope_parameters": _YARN},
    ),
    "deepseek_v3": (
        "DeepseekV3",
        {**_LATENT, "num_experts_per_tok": 4, "q_lora_rank": 32, "n_group": 4, "topk_group": 2, "num_mtp_layers": 0}
        | {"routed_scaling_factor": 2.5, "norm_topk_prob": True, "rope_parameters": _YARN},
    ),
    "llama": ("Llama", {**_SIZES, "intermediate_size": 96, "tie_word_embeddings": True}),
    "qwen2": ("Qwen2", {**_SIZES, "intermediate_size": 96}),
    "qwen3": ("Qwen3", {**_SIZES, "head_dim": 16, "intermediate_size": 96}),
}


def make(family: str, folder: Path, *, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    """Save a random model of a family, in several files, as transformers does."""
    import transformers

    torch.manual_seed(1)
    name, values = MODELS[family]
    config = getattr(transformers, f"{name}Config")(**{**values, **changes})
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    with torch.no_grad():
        for key, tensor in (*model.named_parameters(), *model.named_buffers()):
            if "norm" in key:  # all of transformers' norms begin as ones
                tensor.copy_(1 + 0.3 * torch.randn_like(tensor))
            elif key.endswith(("bias", "gate.weight")):
                tensor.normal_(0, 0.3)
    model.to(dtype).save_pretrained(folder, max_shard_size="200KB")
    return folder


def logits(folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    """What transformers computes with the model of a folder, in float32."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        found: torch.Tensor = model(tokens).logits
    return found


def change_config(folder: Path, **changes: Any) -> None:
    """Change keys of a folder's config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
