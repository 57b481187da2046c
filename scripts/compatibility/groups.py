"""Megatron's options that cannot matter to where experts live, which replicas they have, or how tokens travel."""

from __future__ import annotations

# Groups of Megatron's parser -> why none of their options matters, but for those in the table.
WHOLE_GROUPS = {
    "options": "help",
    "network size": "shapes and kinds of layers, which the parts never see: they see tokens and experts",
    "regularization": "numbers that the optimizer reads; state moves with an expert whatever they are",
    "profiling": "measures, and changes nothing",
    "rl": "reinforcement learning, which this entry point refuses",
    "RNG and initialization": "initial values; experts in slots draw theirs in Megatron's order",
    "learning rate and weight decay": "numbers that the optimizer reads",
    "mixed precision": "casts outside the experts, or the loss scale; gradients are reduced by Megatron",
    "validation": "evaluation uses no replicas, and experts do not move in it",
    "data and dataloader": "which tokens there are",
    "tokenizer": "which tokens there are",
    "autoresume": "when a run ends",
    "biencoder": "retrieval models, which this entry point does not train",
    "vision": "vision models, which this entry point does not train",
    "mla": "shapes of attention",
    "experimental_attention_variant": "attention",
    "heterogeneous architecture": "layers without experts",
    "logging": "reports, and changes nothing; the parts count for themselves",
    "Logits Distillation": "the loss, or what is written beside it",
    "straggler": "measures, and changes nothing",
    "workload inspector": "measures, and changes nothing",
    "inference": "inference, which this entry point does not do",
    "one logger": "reports, and changes nothing",
    "In-process restart": "restarts the ranks' functions, which build everything again",
    "ft_package": "ends hanging ranks from outside",
    "rerun engine": "repeats a step; a step's replicas are those of its number",
    "msc": "where files are",
    "sft": "refused by this entry point",
    "fault injector": "ends ranks on purpose",
    "smartmoe": "the project's own options, checked against each other",
    "checkpointing": "experts are in logical order in every checkpoint, wherever they live",
}

# In other groups of the parser: subject -> (why its options do not matter, the options).
SUBJECTS: dict[str, tuple[str, str]] = {
    "sizes of the model": (
        "shapes, which the parts take from the built layers",
        "num_layers hidden_size num_attention_heads num_query_groups ffn_hidden_size kv_channels moe_ffn_hidden_size "
        "num_experts glu_linear_offset activation_func_clamp_value layernorm_epsilon layernorm_zero_centered_gamma "
        "normalization "
        "apply_residual_connection_post_layernorm fp32_residual_connection init_method_std embedding_init_method_std "
        "perform_initialization use_cpu_initialization init_model_with_meta_device use_mup mup_width_mult "
        "mup_base_hidden_size mup_embedding_mult mup_output_mult mup_base_head_dim mup_attn_scale_power hidden_dropout "
        "fused_residual_rmsnorm calculate_per_token_loss account_for_embedding_in_pipeline_split "
        "account_for_loss_in_pipeline_split mtp_standalone mtp_loss_scaling_factor mtp_hybrid_override_pattern",
    ),
    "attention": (
        "other layers than those with experts",
        "attention_backend flash_attention_version softmax_type attention_dropout add_qkv_bias rotary_interleaved "
        "qk_layernorm qk_l2_norm qk_clip qk_clip_alpha qk_clip_threshold attention_output_gate multi_latent_attention "
        "experimental_attention_variant dsa_indexer_n_heads dsa_indexer_head_dim dsa_indexer_topk "
        "dsa_indexer_topk_freq dsa_indexer_skip_topk_offset dsa_indexer_loss_coeff dsa_indexer_use_sparse_loss "
        "dsa_kernel_backend dsa_indexer_rope_interleaved dsa_indexer_rotate_activation dsa_indexer_scoring_relu "
        "dsa_indexer_k_norm_epsilon dsa_indexer_k_norm_fp32 linear_conv_kernel_dim linear_key_head_dim "
        "linear_value_head_dim linear_num_key_heads linear_num_value_heads apply_query_key_layer_scaling "
        "use_kitchen_attention kitchen_attention_backend mrope_section batch_invariant_mode",
    ),
    "state-space layers": (
        "other layers than those with experts",
        "is_hybrid_model mamba_state_dim mamba_head_dim mamba_num_groups mamba_num_heads "
        "use_mamba_mem_eff_path mlp_chunks_for_training mlp_chunks_for_prefill",
    ),
    "parallelism of the rest": (
        "communication of layers without experts, of the pipeline, or of the loss",
        "pipeline_model_parallel_comm_backend tensor_parallel_num_weight_shards "
        "expert_tensor_parallel_num_weight_shards hierarchical_context_parallel_sizes max_seqlen_per_dp_cp_rank "
        "hybrid_context_parallel tp_comm_overlap tp_comm_bulk_wgrad tp_comm_bulk_dgrad tp_comm_overlap_ag "
        "tp_comm_overlap_rs tp_comm_overlap_rs_dgrad tp_comm_split_ag tp_comm_split_rs tp_comm_bootstrap_backend "
        "tp_comm_overlap_cfg cross_entropy_loss_fusion cross_entropy_fusion_impl use_ring_exchange_p2p "
        "defer_embedding_wgrad_compute wgrad_deferral_limit overlap_p2p_comm_warmup_flush "
        "overlap_p2p_comm microbatch_group_size_per_vp_stage high_priority_a2a_comm_stream cp_comm_type "
        "decoder_first_pipeline_num_layers decoder_last_pipeline_num_layers model_parallel_size "
        "use_tp_pp_dp_mapping symmetric_ar_type",
    ),
    "process groups and communicators": (
        "how ranks find each other; the parts use Megatron's groups, and groups of their own with the same ranks",
        "distributed_backend distributed_timeout_minutes align_grad_reduce local_rank lazy_mpu_init "
        "nccl_communicator_config_path use_gloo_process_groups use_sharp sharp_enabled_group "
        "high_priority_stream_groups distributed_timeout_seconds_after_init flight_recorder_dump_path "
        "flight_recorder_trace_buffer_size flight_recorder_dump_on_timeout flight_recorder_include_stack_trace "
        "flight_recorder_include_only_active flight_recorder_extra_dump_on_exec disable_jit_fuser nccl_ub "
        "disable_symmetric_registration create_all_gather_group fake_process_group",
    ),
    "gradient buffers": (
        "cuts and sums of Megatron's buffers, whose layout is read from them",
        "ddp_num_buckets ddp_bucket_size ddp_pad_buckets_for_high_nccl_busbw "
        "ddp_reduce_scatter_with_fp32_accumulation ddp_param_name_patterns_for_fp32_local_accumulation "
        "ddp_average_in_collective overlap_param_gather_with_optimizer_step align_param_gather "
        "use_layer_wise_param_layout gradient_reduce_div_fusion gradient_accumulation_fusion",
    ),
    "FSDP": (
        "they belong to --use-megatron-fsdp and --use-torch-fsdp2, which are refused",
        "fsdp_manual_registration data_parallel_sharding_strategy outer_dp_sharding_strategy fsdp_double_buffer "
        "suggested_communication_unit_size keep_fp8_transpose_cache enable_full_sharding_in_hsdp "
        "torch_fsdp2_reshard_after_forward megatron_fsdp_main_params_dtype megatron_fsdp_main_grads_dtype "
        "megatron_fsdp_grad_comm_dtype megatron_fsdp_enable_fine_grained_param_gather "
        "megatron_fsdp_max_pool_double_buffer fsdp_db_use_persist_buf_on_alloc_fail",
    ),
    "fp8 and fp4": (
        "details of --fp8-format and --fp4-format",
        "fp8_quantizer_factory fp8_margin fp8_interval fp8_amax_history_len fp8_amax_compute_algo fp8_wgrad "
        "fp8_output_proj first_last_layers_bf16 num_layers_at_start_in_bf16 num_layers_at_end_in_bf16 fp4_recipe "
        "fp4_quantizer_factory fp4_param_gather te_precision_config_file disable_bf16_reduced_precision_matmul "
        "moe_router_padding_for_fp8",
    ),
    "precision-aware optimizer": (
        "details of --use-precision-aware-optimizer and of --optimizer-cpu-offload",
        "main_grads_dtype main_params_dtype exp_avg_dtype exp_avg_sq_dtype optimizer_offload_fraction "
        "use_torch_optimizer_for_cpu_offload overlap_cpu_optimizer_d2h_h2d pin_cpu_grads pin_cpu_params "
        "optimizer_cuda_graph dump_param_to_param_group_map",
    ),
    "recomputation and offloading of other modules": (
        "what is not an expert; the experts' modules are in the table",
        "distribute_saved_activations cpu_offloading_num_layers "
        "cpu_offloading_retain_pinned_cpu_buffers min_offloaded_tensor_size "
        "delay_offload_until_cuda_graph delta_offload_bytes_across_pp_ranks activation_offload_fraction "
        "moe_layer_recompute recompute_activations checkpoint_activations "
        "fine_grained_offloading_max_inflight_offloads moe_paged_stash_page_size "
        "moe_paged_stash_buffer_size_factor_cuda moe_paged_stash_buffer_size_factor_cpu",
    ),
    "dispatchers' details": (
        "they belong to options of the table",
        "moe_permute_fusion_into_hybridep moe_hybridep_pad_uneven_dispatch_inputs moe_flex_dispatcher_num_sms "
        "moe_deepep_num_sms moe_hybridep_num_sms moe_hybridep_num_blocks_permute "
        "moe_hybridep_num_blocks_unpermute moe_hybridep_num_sms_preprocessing "
        "moe_ncclep_zero_copy",
    ),
    "routers' and shared experts' details": (
        "they change what the router chooses or what shared experts compute, not who computes it",
        "moe_router_dtype moe_router_bias_update_rate moe_per_layer_logging use_grouped_gemm_for_shared_expert "
        "moe_shared_expert_glu_interleave_size use_grouped_gemm_for_dense_mlp moe_upcycling_granularity",
    ),
    "CUDA graphs' details": (
        "they belong to --cuda-graph-impl",
        "enable_cuda_graph cuda_graph_warmup_steps external_cuda_graph",
    ),
    "inference": (
        "inference, which this entry point does not do",
        "moe_pad_experts_for_cuda_graph_inference inference_cuda_graph_scope flash_decode nccl_all_reduce_for_prefill "
        "inference_fuse_tp_communication inference_disable_triton_nvls_kernels inference_grouped_gemm_backend "
        "inference_moe_disable_fused_quant_kernels inference_moe_token_dispatcher_type",
    ),
    "fusions of other modules": (
        "kernels of what is not an expert, or of the activation, which experts in slots take from Megatron",
        "masked_softmax_fusion bias_gelu_fusion bias_swiglu_fusion bias_dropout_fusion apply_rope_fusion rope_type "
        "use_flash_attn no_persist_layer_norm deterministic_mode clone_scatter_output_in_embedding",
    ),
    "the loop": (
        "how long Megatron trains, when it stops, checks or collects garbage",
        "micro_batch_size global_batch_size rampup_batch_size step_batch_size_schedule decrease_batch_size_if_needed "
        "empty_unused_memory_level check_weight_hash_across_dp_replicas_interval gpu_sniff_test_interval "
        "train_sync_interval train_iters train_samples exit_interval exit_duration_in_mins exit_signal_handler "
        "exit_signal exit_signal_handler_for_dataloader exit_signal_handler_for_training manual_gc "
        "manual_gc_interval manual_gc_eval iterations_to_skip batch_size check_for_nan_in_loss_and_grad "
        "check_for_large_grads result_rejected_tracker_filename dataloader_type deprecated_use_mcore_models",
    ),
    "how the model is described": (
        "other ways to give the options of the table",
        "enable_experimental spec hybrid_layer_pattern hybrid_override_pattern yaml_cfg config_logger_dir",
    ),
}
