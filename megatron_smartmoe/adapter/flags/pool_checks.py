"""Start-up checks of `--smartmoe-pool`: what it needs, and that every setting in it is possible for this launch."""

from __future__ import annotations

import argparse

from megatron_smartmoe.adapter.flags.overlap_checks import check_companions
from megatron_smartmoe.adapter.flags.pool_arguments import AUTO, FLAG, INTERVAL_FLAG
from megatron_smartmoe.adapter.flags.pool_settings import homes_interval, may_cut, pool_settings
from megatron_smartmoe.adapter.flags.replica_checks import check_copies
from megatron_smartmoe.errors import ConfigError
from megatron_smartmoe.planner.pool import PoolSetting

_MODES = ("off", "history", "exact")


def check_pool(args: argparse.Namespace) -> None:
    """Check the pool against the launch; after `check_replicas` and `check_overlap`.

    Raises:
        ConfigError: the first rule that is broken.
    """
    value, ranks = args.smartmoe_pool, args.expert_model_parallel_size
    if args.smartmoe_pool_interval < 1:
        rule = "must be at least 1"
        raise ConfigError(INTERVAL_FLAG, args.smartmoe_pool_interval, rule, "Leave it out for its default.")
    if value is None:
        return
    if not args.smartmoe:
        raise ConfigError(FLAG, value, "needs --smartmoe", "Add --smartmoe, or leave it out.")
    if ranks == 1:
        rule = "needs expert parallelism: on one rank there is nothing to balance or to overlap"
        raise ConfigError(FLAG, value, rule, "Pass --expert-model-parallel-size, or leave it out.")
    if args.mtp_num_layers:
        rule = f"does not go with {FLAG}: layers of multi-token prediction share their numbers with others"
        raise ConfigError("--mtp-num-layers", args.mtp_num_layers, rule, "Leave one of the two out.")
    settings = pool_settings(args)
    if value == AUTO and len(settings) == 1:
        rule = "leaves nothing to choose: homes stay, there are no spare slots and nothing is cut"
        way_out = "Add --smartmoe-spare-slots 1 or --smartmoe-overlap-degree auto, or leave it out."
        raise ConfigError(FLAG, value, rule, way_out)
    for setting in settings:
        _check_setting(setting, args)
    if any(setting.replicas != "off" for setting in settings):
        check_copies(args)
    if may_cut(args):
        check_companions(args)


def _check_setting(setting: PoolSetting, args: argparse.Namespace) -> None:
    """One entry of the file, by its name."""
    ranks, slots, interval = args.expert_model_parallel_size, args.smartmoe_spare_slots, homes_interval(args)
    asked = setting.homes_interval
    change = "Change the flag, or take the entry out of the file."
    for wrong, rule, way_out in (
        (setting.replicas not in _MODES, f"its replicas must be one of {', '.join(_MODES)}", "Plan the pool again."),
        (
            (setting.spare_slots == 0) != (setting.replicas == "off"),
            "copies need spare slots, and spare slots copies: K0 goes with off",
            "Plan the pool again.",
        ),
        (
            not 0 <= setting.spare_slots <= slots,
            f"uses {setting.spare_slots} spare slots, and --smartmoe-spare-slots is {slots}",
            change,
        ),
        (
            not 1 <= setting.overlap_degree <= ranks,
            f"cuts into {setting.overlap_degree} pieces: from 1 to {ranks}, the expert-parallel ranks, are possible",
            "Plan the pool for this launch, or take the entry out of the file.",
        ),
        (
            asked not in (0, interval),
            f"looks at the homes every {asked} iterations, and the flags say "
            + (f"--smartmoe-homes-interval {interval}" if interval else "--smartmoe-homes off"),
            change,
        ),
    ):
        if wrong:
            raise ConfigError(f"{FLAG}, entry", setting.key, rule, way_out)
