"""Start-up checks of Megatron's flags for saving and loading: pairs that Megatron refuses late, or drops.

Some of them are bare assertions, some end a run with a traceback at its first save, hours after the start, and some are
switched off with a warning among hundreds of lines. Here each is refused before any process group forms.
"""

from __future__ import annotations

import argparse
import importlib.util

from megatron_smartmoe.adapter.flags.parser import attribute
from megatron_smartmoe.errors import ConfigError

_RESILIENCY = "nvidia_resiliency_ext"


def check_checkpoint_options(args: argparse.Namespace) -> None:
    """Check the flags for saving and loading against each other.

    Raises:
        ConfigError: the first rule that is broken.
    """
    _check_intervals(args)
    _check_format(args)
    _check_background(args)
    _check_non_persistent(args)
    _check_layout(args)
    _check_load(args)


def _refuse_if(broken: bool, args: argparse.Namespace, flag: str, rule: str, way_out: str) -> None:
    if broken:
        raise ConfigError(flag, getattr(args, attribute(flag)), rule, way_out)


def _check_intervals(args: argparse.Namespace) -> None:
    way_out = "Pass --save-interval 1000, for example."
    is_missing = args.save is not None and args.save_interval is None
    _refuse_if(is_missing, args, "--save-interval", "is required with --save", way_out)
    for flag in ("--save-interval", "--save-retain-interval", "--non-persistent-save-interval"):
        value = getattr(args, attribute(flag))
        _refuse_if(value is not None and value < 1, args, flag, "must be at least 1", f"Pass {flag} 1000, for example.")


def _check_format(args: argparse.Namespace) -> None:
    kind, way_out = args.ckpt_format, "Pass --ckpt-format torch_dist, or leave it out."
    for needed, flag in (("torch_dcp", "--use-torch-fsdp2"), ("fsdp_dtensor", "--use-megatron-fsdp")):
        is_broken = kind == needed and not getattr(args, attribute(flag), False)
        _refuse_if(is_broken, args, "--ckpt-format", f"needs {flag}", way_out)
    if args.ckpt_convert_format is not None:
        for flag in ("--ckpt-convert-save", "--load"):
            is_missing = getattr(args, attribute(flag)) is None
            _refuse_if(is_missing, args, flag, "is required with --ckpt-convert-format", f"Add {flag} DIR.")


def _check_background(args: argparse.Namespace) -> None:
    """Saves in the background."""
    worker = "--use-persistent-ckpt-worker"
    if not args.async_save:
        rule = "has no effect without --async-save"
        _refuse_if(args.use_persistent_ckpt_worker, args, worker, rule, "Add --async-save, or remove it.")
        return
    rule = f"is not supported with --ckpt-format {args.ckpt_format}"
    way_out = "Pass --ckpt-format torch_dist, or remove it."
    _refuse_if(args.ckpt_format == "torch", args, "--async-save", rule, way_out)
    rule = f"needs {worker}: Megatron would save synchronously"
    _refuse_if(not args.use_persistent_ckpt_worker, args, "--async-save", rule, f"Add {worker}, or remove it.")
    rule = "needs the package nvidia-resiliency-ext, which is not installed"
    is_missing = args.async_strategy == "nvrx" and importlib.util.find_spec(_RESILIENCY) is None
    _refuse_if(is_missing, args, "--async-strategy", rule, "Pass --async-strategy mcore, or install it.")


def _check_non_persistent(args: argparse.Namespace) -> None:
    """Checkpoints that replace each other, between the ones that stay."""
    flag, kind = "--non-persistent-ckpt-type", args.non_persistent_ckpt_type
    _refuse_if(kind == "in_memory", args, flag, "is not supported by Megatron yet", "Pass global, or remove it.")
    if kind == "local":
        rule = "needs the package nvidia-resiliency-ext, which is not installed"
        _refuse_if(importlib.util.find_spec(_RESILIENCY) is None, args, flag, rule, "Pass global, or install it.")
        rule = "is required with --non-persistent-ckpt-type local"
        is_missing = args.non_persistent_local_ckpt_dir is None
        _refuse_if(is_missing, args, "--non-persistent-local-ckpt-dir", rule, "Add it, with a directory of the node.")
    if args.non_persistent_save_interval is None:
        return
    flag = "--non-persistent-save-interval"
    _refuse_if(kind is None, args, flag, "needs a type", "Add --non-persistent-ckpt-type global, or remove it.")
    _refuse_if(args.save is None, args, flag, "has no effect without --save", "Add --save DIR, or remove it.")
    rule = "is not supported with --ckpt-format torch"
    is_legacy = kind == "global" and args.ckpt_format == "torch"
    _refuse_if(is_legacy, args, flag, rule, "Pass --ckpt-format torch_dist, or remove it.")
    if kind != "local":
        return
    rule = "is not supported with --non-persistent-ckpt-type local"
    flag = "--dist-ckpt-optim-fully-reshardable"
    _refuse_if(args.dist_ckpt_optim_fully_reshardable, args, flag, rule, "Pass global, or remove it.")


def _check_layout(args: argparse.Namespace) -> None:
    """Prediction blocks in a later chunk of the first pipeline rank have an embedding of their own there.

    Megatron's fully parallel save takes the two embeddings for one, and both are written: it stops at the first save.
    """
    layout, num_stages = args.pipeline_model_parallel_layout, args.pipeline_model_parallel_size
    is_parallel = (
        args.ckpt_fully_parallel_save and args.ckpt_format == "torch_dist" and _ranks_that_share_saves(args) > 1
    )
    if args.save is None or not layout or not is_parallel:
        return
    from megatron.core.transformer.enums import LayerType  # the facade comes before Megatron
    from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

    try:
        later_chunks = PipelineParallelLayerLayout.parse_str_to_list(layout)[num_stages::num_stages]
    except AssertionError:  # no layout, which Megatron's own validation says
        return
    is_broken = any(LayerType.mtp in chunk for chunk in later_chunks)
    rule = "has prediction blocks (m) on the first pipeline rank, which then has two embeddings, and Megatron's fully "
    rule += "parallel save stops at them"
    way_out = "Add --no-ckpt-fully-parallel-save, or move them to the last pipeline rank."
    _refuse_if(is_broken, args, "--pipeline-model-parallel-layout", rule, way_out)


def _ranks_that_share_saves(args: argparse.Namespace) -> int:
    """The size of the groups whose ranks divide a save among themselves."""
    ranks = args.world_size // args.pipeline_model_parallel_size
    if args.ckpt_fully_parallel_save_process_group == "dp":
        return int(ranks // args.tensor_model_parallel_size)
    expert_tp = args.expert_tensor_parallel_size or args.tensor_model_parallel_size
    return int(ranks // (args.expert_model_parallel_size * expert_tp))


def _check_load(args: argparse.Namespace) -> None:
    _refuse_if(
        bool(args.ckpt_step) and args.load is None,
        args,
        "--ckpt-step",
        "has no effect without --load",
        "Add --load DIR.",
    )
    rule = "needs --no-load-optim: the optimizer's own state would replace what it does"
    is_broken = args.load_main_params_from_ckpt and not args.no_load_optim
    _refuse_if(is_broken, args, "--load-main-params-from-ckpt", rule, "Add --no-load-optim, or remove it.")
    rule = "is required with --use-checkpoint-args"
    is_missing = args.use_checkpoint_args and args.load is None and args.pretrained_checkpoint is None
    _refuse_if(is_missing, args, "--load", rule, "Add --load DIR, or --pretrained-checkpoint DIR.")
    iteration = getattr(args, "override_ckpt_iteration", None)
    if iteration is not None and args.finetune:
        rule = "is not supported with --finetune, which starts from iteration 0"
        raise ConfigError("--override-ckpt-iteration", iteration, rule, "Remove one of the two.")
