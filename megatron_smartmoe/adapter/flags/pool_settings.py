"""Which settings a run may switch between: from its flags alone, so that it is known before anything is built."""

from __future__ import annotations

import argparse
from itertools import product
from pathlib import Path
from typing import cast

from megatron_smartmoe.adapter.flags import overlap_checks
from megatron_smartmoe.adapter.flags.pool_arguments import AUTO, FLAG
from megatron_smartmoe.adapter.flags.replica_arguments import replicas_mode
from megatron_smartmoe.planner.pool import Pool, PoolSetting
from megatron_smartmoe.spec.parallel import Replicas


def pool_settings(args: argparse.Namespace) -> tuple[PoolSetting, ...]:
    """The settings that --smartmoe-pool names; none without it.

    Raises:
        ConfigError: its file cannot be read.
    """
    if args.smartmoe_pool is None:
        return ()
    if args.smartmoe_pool != AUTO:
        return Pool.load(Path(args.smartmoe_pool), FLAG).settings
    modes: list[tuple[int, Replicas]] = [(0, "off")]
    for used in range(1, args.smartmoe_spare_slots + 1):
        modes += [(used, "history"), (used, "exact")]
    return tuple(
        PoolSetting(homes_interval=interval, spare_slots=used, replicas=mode, overlap_degree=degree)
        for interval, (used, mode), degree in product(sorted({0, homes_interval(args)}), modes, _degrees(args))
    )


def starting_setting(args: argparse.Namespace, overlap_degree: int) -> PoolSetting:
    """What the other flags say.

    Args:
        args: as parsed.
        overlap_degree: as chosen, where the flag says auto.
    """
    mode = cast(Replicas, replicas_mode(args))
    return PoolSetting(
        homes_interval=homes_interval(args),
        spare_slots=0 if mode == "off" else args.smartmoe_spare_slots,
        replicas=mode,
        overlap_degree=overlap_degree,
    )


def homes_interval(args: argparse.Namespace) -> int:
    """Iterations between two looks at the homes; 0 when they stay."""
    return 0 if args.smartmoe_homes == "off" else int(args.smartmoe_homes_interval)


def modes_of(args: argparse.Namespace) -> frozenset[str]:
    """How copies may come to be planned in this run, `off` among them."""
    return frozenset({replicas_mode(args), *(setting.replicas for setting in pool_settings(args))})


def may_cut(args: argparse.Namespace) -> bool:
    """Whether the pool has a setting with cut all-to-alls, so that the layers must be able to do both."""
    return any(setting.overlap_degree > 1 for setting in pool_settings(args))


def _degrees(args: argparse.Namespace) -> list[int]:
    """1, and powers of two where the flags let all-to-alls be cut."""
    asked, ranks = args.smartmoe_overlap_degree, args.expert_model_parallel_size
    if asked == "1":
        return [1]
    given = set() if asked == overlap_checks.AUTO else {int(asked)}
    most = min(overlap_checks.MOST_PIECES, ranks)
    return sorted({1, *given, *(2**power for power in range(1, most.bit_length()))})
