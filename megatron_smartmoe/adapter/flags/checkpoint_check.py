"""Start-up checks of the checkpoint that will be loaded: whether it is whole, and whether its state fits this run."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_smartmoe.adapter.flags.parser import attribute
from megatron_smartmoe.adapter.flags.resume import check_files, checkpoint_to_load, what_is_there
from megatron_smartmoe.adapter.gates.table import (
    GATE,
    RESIDUALS,
    TOP_K,
    ZERO_EXPERTS,
    extra_parameters,
)
from megatron_smartmoe.checkpoint.directory import RELEASE
from megatron_smartmoe.checkpoint.manifest import read_manifest
from megatron_smartmoe.checkpoint.rank_files import RANK_FILE
from megatron_smartmoe.checkpoint.torch_dist import is_torch_dist, read_common
from megatron_smartmoe.errors import CheckpointError, ConfigError, shown
from megatron_smartmoe.spec.placement import Placement
from megatron_smartmoe.spec.readers.torch_save import read_saved

_LEGACY_SIZES = (
    "--tensor-model-parallel-size",
    "--pipeline-model-parallel-size",
    "--expert-model-parallel-size",
    "--expert-tensor-parallel-size",
)
# Arguments of the run that saved a checkpoint which are compared with this run's, and their defaults.
_LOOKED_AT: dict[str, int | bool | None] = {
    "expert_model_parallel_size": 1,
    "expert_tensor_parallel_size": None,
    "tensor_model_parallel_size": 1,
    "pipeline_model_parallel_size": 1,
    "use_distributed_optimizer": False,
    "dist_ckpt_optim_fully_reshardable": False,
    "no_save_optim": False,
}


def check_load(args: argparse.Namespace) -> tuple[str, ...]:
    """Check the checkpoint that --load names, and its state against the flags; it need not exist.

    Returns:
        What was checked and what is done about damage, in lines to print.

    Raises:
        ConfigError: see `check_files` and `_check_state`.
    """
    lines = check_files(args)
    check_state(args)
    return lines


def check_state(args: argparse.Namespace) -> None:
    """Check that the format, the optimizer state and the schedule can be loaded.

    With expert parallelism Megatron has two optimizers, one of them for the experts; without it, one. The state of two
    cannot be loaded into one or the reverse (weights can), and Megatron fails late, with a traceback on every rank.

    Raises:
        ConfigError: the format cannot be read with these flags; or there is no optimizer state, and no flag says to do
            without; or the optimizer state was saved with expert parallelism and this run has none, or the reverse; or
            its buffers are those of other experts; or it was saved with a gate of other parameters; or with other
            experts that cost nothing; or the learning-rate schedule differs and no flag decides which one to use.
    """
    folder = checkpoint_to_load(args)
    if folder is None or folder.name == RELEASE:
        return
    is_sharded = is_torch_dist(folder)
    saved = saved_arguments(folder) if is_sharded else _legacy_arguments(folder)
    if saved is None:
        return
    _check_format(args, saved, folder, is_sharded=is_sharded)
    _check_left_out(args, saved, folder, is_sharded=is_sharded)
    _check_zero_experts(args, saved, folder)
    if args.num_experts is None or args.finetune or args.no_load_optim:
        return
    here, there = args.expert_model_parallel_size, saved.expert_model_parallel_size
    if (here > 1) != (there > 1):
        rule = (
            f"the optimizer state in {folder} was saved at {there}, and cannot be loaded at {here}, because experts "
            "have an optimizer of their own only above 1"
        )
        way_out = (
            f"Pass --expert-model-parallel-size {there}, --no-load-optim for the weights alone, or load what this "
        )
        way_out += f"writes: smartmoe convert {folder} NEW --to megatron --ep {here}"
        raise ConfigError("--expert-model-parallel-size", here, rule, way_out)
    _check_layout(args, saved, folder)
    _check_gate_state(args, saved, folder)
    if not args.override_opt_param_scheduler and not args.use_checkpoint_opt_param_scheduler:
        _check_schedule(args, saved, folder)


def _check_format(args: argparse.Namespace, saved: argparse.Namespace, folder: Path, *, is_sharded: bool) -> None:
    """The legacy format is read at the sizes that it was saved at, and torch_dist is not read as the legacy format."""
    if is_sharded:
        if args.ckpt_format == "torch":
            rule = f"cannot read {folder}, which is in torch_dist format"
            way_out = "Pass --ckpt-format torch_dist, or convert it first (--ckpt-convert-format torch)."
            raise ConfigError("--ckpt-format", args.ckpt_format, rule, way_out)
        return
    for flag in _LEGACY_SIZES:
        here, there = getattr(args, attribute(flag)), getattr(saved, attribute(flag), None)
        if there is not None and here is not None and here != there:
            rule = f"{folder} is in Megatron's torch format, saved at {there}, and is read at the same sizes only"
            way_out = f"Pass {flag} {there}, or convert it at its own sizes (--ckpt-convert-format torch_dist)."
            raise ConfigError(flag, here, rule, way_out)
    here_is, there_is = _experts(args), _experts(saved)
    if args.num_experts is not None and here_is != there_is and not (args.finetune or args.no_load_optim):
        rule = (
            f"the optimizer state in {folder} is in Megatron's torch format for {there_is}, and this run has {here_is}"
        )
        way_out = "Pass --no-load-optim for the weights alone, or save with --ckpt-format torch_dist."
        raise ConfigError("--load", args.load, rule, way_out)


def _check_left_out(args: argparse.Namespace, saved: argparse.Namespace, folder: Path, *, is_sharded: bool) -> None:
    """What a save has left out has to be left out by the load, where Megatron would end with a KeyError."""
    for left_out, flag, what, instead in (
        ("no_save_optim", "--no-load-optim", "optimizer state (--no-save-optim)", "moments"),
        ("no_save_rng", "--no-load-rng", "random states (--no-save-rng)", "random states"),
    ):
        if left_out == "no_save_rng" and is_sharded:  # Megatron finds that out by itself
            continue
        if getattr(saved, left_out, False) and not (args.finetune or getattr(args, attribute(flag))):
            rule = f"is required: {folder} was saved without {what}"
            raise ConfigError(flag, False, rule, f"Add {flag}: training resumes with new {instead}.")


def _legacy_arguments(folder: Path) -> argparse.Namespace | None:
    """The arguments in the first file of a checkpoint in Megatron's torch format, if they are in there."""
    first = min(folder.glob(f"mp_rank_*/{RANK_FILE}"), default=None)
    if first is None:
        return None
    try:
        content = read_saved(first, str(first))
    except CheckpointError as error:
        way_out = f"Restore the file. {what_is_there(folder.parent, damaged=folder)}"
        raise ConfigError("--load", str(folder.parent), str(error), way_out) from None
    saved = content.get("args") if isinstance(content, dict) else None
    return saved if isinstance(saved, argparse.Namespace) else None


def _check_layout(args: argparse.Namespace, saved: argparse.Namespace, folder: Path) -> None:
    """Unless it was saved fully reshardable, the distributed optimizer's state is the raw bytes of its buffers."""
    raw = saved.use_distributed_optimizer and not saved.dist_ckpt_optim_fully_reshardable
    if not (raw and args.use_distributed_optimizer):
        return
    here, there = _experts(args), _experts(saved)
    if here != there:
        rule = f"the optimizer state in {folder} is saved buffer by buffer for {there}, and this run has {here}"
        way_out = "Save with --dist-ckpt-optim-fully-reshardable, or pass --no-load-optim for the weights alone."
        raise ConfigError("--load", args.load, rule, way_out)


def _check_gate_state(args: argparse.Namespace, saved: argparse.Namespace, folder: Path) -> None:
    """The optimizer's state is that of all parameters, and some gates have parameters of their own."""
    if extra_parameters(args) == extra_parameters(saved):
        return
    here, there = args.smartmoe_gate, getattr(saved, "smartmoe_gate", TOP_K)
    if here == there:
        flag, here, there = RESIDUALS, args.smartmoe_gate_residuals, getattr(saved, attribute(RESIDUALS), "off")
    else:
        flag = GATE
    rule = f"the optimizer state in {folder} was saved with {flag} {there}, whose routers have other parameters"
    raise ConfigError(flag, here, rule, f"Pass --no-load-optim for the weights alone, or {flag} {there}.")


def _check_zero_experts(args: argparse.Namespace, saved: argparse.Namespace, folder: Path) -> None:
    """Experts that cost nothing have rows in the router, which a checkpoint with others does not fit."""
    if not args.smartmoe_gate == getattr(saved, "smartmoe_gate", TOP_K) == "moe++":
        return
    here, there = args.smartmoe_zero_experts, getattr(saved, attribute(ZERO_EXPERTS), args.smartmoe_zero_experts)
    if here != there:
        rule = f"the routers in {folder} have rows for {there}"
        raise ConfigError(ZERO_EXPERTS, here, rule, f"Pass {ZERO_EXPERTS} {there}.")


def _experts(args: argparse.Namespace) -> str:
    """Which implementation the experts' parameters belong to."""
    slotted = getattr(args, "smartmoe", False) and args.smartmoe_experts == "grouped_mm"
    return "slotted experts (--smartmoe)" if slotted else "Megatron's own experts"


def _check_schedule(args: argparse.Namespace, saved: argparse.Namespace, folder: Path) -> None:
    """Megatron's scheduler asserts that what it computes from these flags equals what is in the checkpoint."""
    for flag in ("--train-iters", "--train-samples", "--global-batch-size", "--lr", "--min-lr", "--lr-decay-style"):
        name = attribute(flag)
        here, there = getattr(args, name), getattr(saved, name, None)
        if here is not None and there is not None and here != there:
            rule = f"the learning-rate schedule in {folder} was made with {there!r}"
            way_out = "Add --override-opt-param-scheduler for the schedule of these flags, or "
            raise ConfigError(flag, here, rule, way_out + "--use-checkpoint-opt-param-scheduler for the saved one.")


def saved_placement(args: argparse.Namespace) -> Placement | None:
    """The expert placement of the run that saved the checkpoint which --load names, if it is in there."""
    folder = latest_checkpoint(args)
    saved = saved_arguments(folder) if folder is not None else None
    content = getattr(saved, "smartmoe_placement", None)
    return Placement.from_json(content) if content is not None else None


def latest_checkpoint(args: argparse.Namespace) -> Path | None:
    """`checkpoint_to_load` if it is a torch_dist checkpoint of an iteration."""
    folder = checkpoint_to_load(args)
    return folder if folder is not None and folder.name != RELEASE and is_torch_dist(folder) else None


def saved_arguments(folder: Path) -> argparse.Namespace | None:
    """The arguments of the run that saved a checkpoint, if they are in there. Runs nothing that the checkpoint says.

    Those in the manifest are used where there is one: reading the index of a checkpoint of a hundred thousand chunks
    takes seconds. Those that are looked at here have their types; one that an older release did not save has its
    default.

    Raises:
        ConfigError: they cannot be read, or one of them has another type.
    """
    try:
        manifest = read_manifest(folder)
        if manifest is not None and manifest.arguments:
            placement = {} if manifest.placement is None else {"smartmoe_placement": dict(manifest.placement)}
            saved: object = argparse.Namespace(**{**manifest.arguments, **placement})
        else:
            saved = read_common(folder).get("args")
    except CheckpointError as error:
        way_out = f"Restore the file. {what_is_there(folder.parent, damaged=folder)}"
        raise ConfigError("--load", str(folder.parent), str(error), way_out) from None
    if not isinstance(saved, argparse.Namespace):
        return None
    for name, default in _LOOKED_AT.items():
        value = getattr(saved, name, default)
        is_size = type(default) is int or name == "expert_tensor_parallel_size"
        if value is not None and (type(value) is not (int if is_size else bool) or (is_size and value < 1)):
            rule = f"its arguments are damaged: {name} = {shown(value)}"
            raise ConfigError("--load", str(folder), rule, what_is_there(folder.parent, damaged=folder))
        setattr(saved, name, default if value is None else value)
    return saved
