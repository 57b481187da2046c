"""Start-up checks of what a run begins and ends with: the split of its data, its schedules, the checkpoint to load."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from megatron_smartmoe.adapter.cost_inputs import machine_line
from megatron_smartmoe.checkpoint.directory import TRACKER
from megatron_smartmoe.errors import ConfigError

_SPLIT_EXAMPLE = "For example --split 99,1,0: shares of training, validation and test."


def check_start(args: argparse.Namespace) -> None:
    """Check the split, the evaluation, the schedules, the layers with experts, and that there is what --load names.

    Raises:
        ConfigError: the first rule that is broken.
    """
    _check_evaluation(args, _check_split(args))
    _check_warmup(args)
    _check_expert_layers(args)
    _check_load(args)


def _check_split(args: argparse.Namespace) -> list[float] | None:
    """The shares of the split; None without one."""
    if args.split is None:
        return None
    try:
        shares = [float(part) for part in args.split.split(",")]
    except ValueError:
        rule = "must be one to three numbers with commas between them"
        raise ConfigError("--split", args.split, rule, _SPLIT_EXAMPLE) from None
    if len(shares) > 3:
        raise ConfigError("--split", args.split, "must be at most three numbers", _SPLIT_EXAMPLE)
    if any(not math.isfinite(share) or share < 0 for share in shares):
        raise ConfigError("--split", args.split, "must be numbers that are not negative", _SPLIT_EXAMPLE)
    if not any(shares):
        raise ConfigError("--split", args.split, "leaves nothing for training, validation or test", _SPLIT_EXAMPLE)
    if shares[0] == 0 and not args.skip_train:
        raise ConfigError("--split", args.split, "leaves nothing for training", _SPLIT_EXAMPLE)
    return [*shares, 0.0, 0.0][:3]


def _check_evaluation(args: argparse.Namespace, shares: list[float] | None) -> None:
    """An evaluation has data; a number of iterations lies between two of them."""
    if args.eval_interval is None or args.eval_interval < 1:
        rule = "must be at least 1: Megatron needs it also with --eval-iters 0"
        raise ConfigError("--eval-interval", args.eval_interval, rule, "For example --eval-interval 1000.")
    own_data = args.valid_data_path or args.per_split_data_args_path or args.mock_data
    if not args.eval_iters or args.full_validation or own_data:
        return
    if shares is not None and shares[1] == 0:
        rule = f"leaves no data for the validation that --eval-iters {args.eval_iters} asks for"
        way_out = "Pass a --split with a second number, for example 99,1,0, or --eval-iters 0."
        raise ConfigError("--split", args.split, rule, way_out)
    if args.train_data_path:
        rule = "has no data: --train-data-path comes without --valid-data-path"
        raise ConfigError("--eval-iters", args.eval_iters, rule, "Pass --valid-data-path, or --eval-iters 0.")


def _check_warmup(args: argparse.Namespace) -> None:
    """The warm-up ends before the decay does, or Megatron's scheduler stops in an assertion."""
    for unit in ("iters", "samples"):
        total = getattr(args, f"train_{unit}")
        warmup, decay = getattr(args, f"lr_warmup_{unit}"), getattr(args, f"lr_decay_{unit}")
        if not total or args.skip_train or args.lr_warmup_fraction is not None:
            continue
        end, name = (decay, f"--lr-decay-{unit}") if decay else (total, f"--train-{unit}")
        if warmup >= end:
            flag = f"--lr-warmup-{unit}"
            rule = f"must be less than {name} = {end}, when the learning rate has decayed"
            way_out = f"Pass {flag} {end // 10}, for example, or --lr-warmup-fraction 0.1 in its place."
            raise ConfigError(flag, warmup, rule, way_out)


def _check_expert_layers(args: argparse.Namespace) -> None:
    """--moe-layer-freq has an entry per layer, and an experts' layer where experts are to be balanced."""
    pattern = args.moe_layer_freq
    if args.num_experts is None or not isinstance(pattern, list) or args.use_checkpoint_args:
        return
    if args.num_layers is not None and len(pattern) != args.num_layers:
        rule = f"has {len(pattern)} entries, and --num-layers is {args.num_layers}"
        way_out = "Pass an entry per layer, 1 for a layer with experts, for example "
        way_out += f'"([0]*1+[1]*{max(1, args.num_layers - 1)})".'
        raise ConfigError("--moe-layer-freq", pattern, rule, way_out)
    if args.smartmoe and not any(pattern):
        rule = "has no layer with experts, and --smartmoe balances experts"
        raise ConfigError("--moe-layer-freq", pattern, rule, "Make an entry 1, or remove --smartmoe.")


def _check_load(args: argparse.Namespace) -> None:
    """There is a checkpoint to load, unless this is the first start of a run that saves there."""
    if args.load is None or _has_checkpoint(args) or is_first_start(args):
        return
    folder = Path(args.load)
    rule = f"has no checkpoint: there is no {TRACKER} in it" if folder.is_dir() else "is not a directory"
    way_out = "Pass the folder that --save named, or remove --load to start from iteration 0."
    raise ConfigError("--load", args.load, rule, way_out)


def is_first_start(args: argparse.Namespace) -> bool:
    """Whether --load names the folder that --save will fill: the first start of a run that can be resumed."""
    same = args.load is not None and args.save is not None and Path(args.load).absolute() == Path(args.save).absolute()
    return same and not _has_checkpoint(args)


def start_lines(args: argparse.Namespace) -> tuple[str, ...]:
    """What to say about the start of a run: where the prices come from, and that there is nothing to load yet."""
    prices = machine_line(args)
    lines = () if prices is None else (prices,)
    if not is_first_start(args):
        return lines
    return (*lines, f"there is no checkpoint in {args.load} yet: training starts from iteration 0 and saves there")


def _has_checkpoint(args: argparse.Namespace) -> bool:
    remote = "://" in str(args.load)
    return remote or bool(args.ckpt_step) or (Path(args.load) / TRACKER).is_file()
