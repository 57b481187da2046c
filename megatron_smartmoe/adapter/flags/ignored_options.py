"""Options that Megatron's parser takes and that would do nothing, or something else than they say: refused, or said.

The tables are complete for the tested release: a test walks the installed parser and its sources
(tests/megatron/test_ignored_options.py). An option whose value is the parser's default is not looked at.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from megatron_smartmoe.adapter.flags.parser import attribute, build_parser
from megatron_smartmoe.errors import ConfigError

# Parsed, and read by nothing in Megatron 0.19: by what they were for.
NEVER_READ = {
    "is ignored by Megatron 0.19, which trains with --global-batch-size from the first iteration": "rampup_batch_size",
    "is ignored by Megatron 0.19": (
        "apply_residual_connection_post_layernorm onnx_safe openai_gelu exit_signal_handler_for_dataloader "
        "dist_ckpt_save_pre_mcore_014 enable_full_sharding_in_hsdp inprocess_max_iterations "
        "inprocess_progress_watchdog_interval vocab_extra_ids"
    ),
    "is an option of reinforcement learning, and this entry point pretrains": (
        "rl_prompts_per_eval grpo_clamp_eps_lower grpo_clamp_eps_upper grpo_kl_beta grpo_entropy_term_weight "
        "grpo_filter_groups_with_same_reward langrl_env_config rl_default_temperature rl_default_top_p "
        "rl_default_top_k rl_importance_sampling_truncation_coef rl_sequence_packing_max_sequences_per_bin "
        "rl_sequence_packing_algo rl_verify_model_weights_swap rl_skip_bos_token rl_inference_parsers"
    ),
    "is an option of BERT and of retrieval models, and this entry point trains GPT": (
        "mask_prob short_seq_prob ict_head_size biencoder_projection_dim biencoder_shared_query_context_model ict_load "
        "bert_load titles_data_path query_in_block_prob use_one_sent_docs evidence_data_path "
        "retriever_report_topk_accuracies retriever_score_scaling block_data_path embedding_path indexer_batch_size "
        "indexer_log_interval output_bert_embeddings bert_embedder_type"
    ),
    "is an option of vision models, and this entry point trains GPT": (
        "num_classes num_channels classes_fraction data_per_class_fraction head_lr_mult vision_backbone_type "
        "swin_backbone_type mask_type mask_factor iter_per_epoch dino_local_img_size dino_local_crops_number "
        "dino_head_hidden_size dino_bottleneck_size dino_freeze_last_layer dino_norm_last_layer "
        "dino_warmup_teacher_temp dino_teacher_temp dino_warmup_teacher_temp_epochs"
    ),
    "is an option of distillation, and this entry point pretrains": (
        "logits_load_decode_threads logits_load_prefetch_factor logits_load_msc_prefetch_depth "
        "logits_load_kd_loss_alpha logits_load_ignore_errors"
    ),
    "is an option of inference, and this entry point trains": (
        "max_tokens_to_oom use_legacy_static_engine inference_max_requests inference_dynamic_batching "
        "inference_text_gen_server_logging inference_wandb_logging inference_coordinator_port inference_shards"
    ),
}
# Read, but by nothing that a pretraining run does.
_WITHOUT_EFFECT = {
    "--moe-enable-routing-replay": "records and replays where a program asks Megatron to, and pretraining does not",
}
# They ask a GPU, and there is none on CPU ranks.
_NEEDS_GPU = {
    "--log-straggler": "it reads temperature, power and clock of a GPU",
    "--record-memory-history": "it records CUDA's memory allocator",
    "--gpu-sniff-test-interval": "it tests a GPU",
}
# Without effect, and harmless: what they ask for happens anyway. Said once.
HARMLESS = {
    "--use-mcore-models": "Megatron's core models are the only ones since 0.17",
    "--use-dist-ckpt": "--ckpt-format decides",
    "--dist-ckpt-format": "--ckpt-format decides",
    "--ckpt-fully-parallel-save": "it is the default; --no-ckpt-fully-parallel-save switches it off",
    "--use-flash-attn": "--attention-backend decides, and auto takes flash attention where it is installed",
    "--disable-msc": "it is the default",
    "--fp8-interval": "TransformerEngine ignores it since 1.8",
}
# Old names that Megatron replaces itself, with the output that a user does not see.
RENAMED = {
    "--enable-cuda-graph": "--cuda-graph-impl local",
    "--external-cuda-graph": "--cuda-graph-impl transformer_engine",
    "--cuda-graph-scope": "--cuda-graph-modules",
    "--no-weight-decay-cond-type": "--apply-wd-to-qk-layernorm",
    "--hybrid-override-pattern": "--hybrid-layer-pattern",
    "--mtp-hybrid-override-pattern": "--hybrid-layer-pattern",
    "--moe-deepep-num-sms": "--moe-flex-dispatcher-num-sms",
    "--moe-hybridep-num-sms": "--moe-flex-dispatcher-num-sms",
    "--use-rotary-position-embeddings": "--position-embedding-type rope",
}


def check_ignored(args: argparse.Namespace, *, cpu: bool) -> None:
    """Refuse options that would be ignored, or that mean nothing in this run.

    Raises:
        ConfigError: the first of them.
    """
    for reason, names in NEVER_READ.items():
        for flag, value in _given(args, names.split()):
            way_out = "Remove it."
            if flag == "--rampup-batch-size":
                way_out = 'Remove it, or pass --step-batch-size-schedule, for example "0:4 1M:8" (tokens:batch size).'
            raise ConfigError(flag, value, reason, way_out)
    for flag, reason in _WITHOUT_EFFECT.items():
        if value := getattr(args, attribute(flag), False):
            raise ConfigError(flag, value, f"would do nothing: it {reason}", "Remove it.")

    for flag, reason in _NEEDS_GPU.items() if cpu else ():
        for _, value in _given(args, [attribute(flag)]):
            raise ConfigError(flag, value, f"is not possible on CPU ranks: {reason}", "Remove it.")
    if cpu and args.profile and not args.use_pytorch_profiler:
        rule = "is not possible on CPU ranks: it starts the CUDA profiler"
        raise ConfigError("--profile", True, rule, "Add --use-pytorch-profiler, or remove it.")


def remarks(args: argparse.Namespace) -> Iterator[str]:
    """A sentence for each option that has no effect, or that has another name by now."""
    dests = {flag: action.dest for flag, action in build_parser()._option_string_actions.items()}
    for flag, reason in HARMLESS.items():
        for _ in _given(args, [dests.get(flag, "")]):
            yield f"{flag} has no effect: {reason}."
    for flag, name in RENAMED.items():
        for _ in _given(args, [dests.get(flag, "")]):
            yield f"{flag} is the old name of {name}."


def _given(args: argparse.Namespace, names: list[str]) -> Iterator[tuple[str, object]]:
    """(flag, value) of those arguments that have another value than the parser's default."""
    actions = {action.dest: action for action in build_parser()._actions}
    for name in names:
        action = actions.get(name)  # another release may have dropped it
        if action is not None and (value := getattr(args, name, action.default)) != action.default:
            yield action.option_strings[0], value
