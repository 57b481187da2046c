"""Arguments as Megatron's parser leaves them, for tests that have no parser."""

from __future__ import annotations

from typing import Any

# What Megatron's parser leaves where nothing is said.
DEFAULTS: dict[str, Any] = {
    **dict.fromkeys(
        "ffn_hidden_size kv_channels moe_ffn_hidden_size moe_shared_expert_intermediate_size mtp_num_layers "
        "moe_router_num_groups moe_router_group_topk moe_router_topk_scaling_factor moe_expert_capacity_factor "
        "vocab_size".split()
    ),
    **dict.fromkeys(
        "group_query_attention swiglu quick_geglu add_qkv_bias qk_layernorm untie_embeddings_and_output_weights "
        "multi_latent_attention moe_router_pre_softmax moe_router_enable_expert_bias".split(),
        False,
    ),
    "num_query_groups": 1,
    "add_bias_linear": True,
    "normalization": "LayerNorm",
    "position_embedding_type": "learned_absolute",
    "rotary_base": 10000,
    "attention_dropout": 0.1,
    "hidden_dropout": 0.1,
    "moe_layer_freq": 1,
    "moe_router_topk": 2,
    "moe_router_score_function": "softmax",
    "moe_router_load_balancing_type": "aux_loss",
    "moe_aux_loss_coeff": 0.0,
}
SIZES = {
    "num_layers": 4,
    "hidden_size": 96,
    "num_attention_heads": 4,
    "seq_length": 64,
    "num_experts": 8,
    "global_batch_size": 16,
}
VALUES = {**DEFAULTS, **SIZES}  # a model's

# Where nothing is said of how a model is distributed.
LAUNCH: dict[str, Any] = {
    **dict.fromkeys(
        "expert_tensor_parallel_size pipeline_model_parallel_layout num_layers_per_virtual_pipeline_stage "
        "num_virtual_stages_per_pipeline_rank recompute_granularity recompute_modules smartmoe_replicas".split()
    ),
    **dict.fromkeys(
        "use_distributed_optimizer overlap_grad_reduce overlap_param_gather bf16 fp16 grad_reduce_in_bf16 "
        "accumulate_allreduce_grads_in_fp32 smartmoe".split(),
        False,
    ),
    "tensor_model_parallel_size": 1,
    "pipeline_model_parallel_size": 1,
    "expert_model_parallel_size": 1,
    "context_parallel_size": 1,
    "moe_latent_size": None,
    "micro_batch_size": 1,
    "transformer_impl": "transformer_engine",
    "smartmoe_gate": "top-k",
    "smartmoe_overlap_degree": "1",
    "smartmoe_dispatch": "flat",
    "smartmoe_spare_slots": 0,
    "smartmoe_homes": "on",
    "smartmoe_homes_interval": 100,
}
