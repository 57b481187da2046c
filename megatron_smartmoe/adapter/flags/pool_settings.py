"""The settings that a run may switch between, from its flags alone: they are known before anything is built."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import cast

from megatron_smartmoe.adapter.flags.smartmoe_arguments import AUTO, MOST_CHUNKS, POOL, replicas_mode
from megatron_smartmoe.planner.pool import Pool, PoolSetting, pool_settings
from megatron_smartmoe.spec.parallel import Replicas


def settings_of_pool(args: argparse.Namespace) -> tuple[PoolSetting, ...]:
    """The settings that --smartmoe-pool stands for; none without it.

    Raises:
        ConfigError: its file cannot be read.
    """
    if args.smartmoe_pool is None:
        return ()
    if args.smartmoe_pool != AUTO:
        return Pool.load(Path(args.smartmoe_pool), POOL).settings
    return pool_settings(
        homes_interval=homes_interval(args), spare_slots=args.smartmoe_spare_slots, overlap_degrees=_degrees(args)
    )


def starting_setting(args: argparse.Namespace, overlap_degree: int) -> PoolSetting:
    """The setting that the other flags describe.

    Args:
        args: as parsed.
        overlap_degree: the degree that was chosen, where the flag is auto.
    """
    mode = cast(Replicas, replicas_mode(args))
    return PoolSetting(
        homes_interval=homes_interval(args),
        spare_slots=0 if mode == "off" else args.smartmoe_spare_slots,
        replicas=mode,
        overlap_degree=overlap_degree,
    )


def homes_interval(args: argparse.Namespace) -> int:
    """Iterations from one re-evaluation of expert placement to the next; 0 when experts do not move."""
    return 0 if args.smartmoe_homes == "off" else int(args.smartmoe_homes_interval)


def modes_of(args: argparse.Namespace) -> frozenset[str]:
    """All ways in which this run may plan replicas, with `off` if it may have none."""
    return frozenset({replicas_mode(args), *(setting.replicas for setting in settings_of_pool(args))})


def may_overlap(args: argparse.Namespace) -> bool:
    """Whether the pool has a setting that splits all-to-alls, so that the layers must support both."""
    return any(setting.overlap_degree > 1 for setting in settings_of_pool(args))


def _degrees(args: argparse.Namespace) -> list[int]:
    """1, and powers of two unless --smartmoe-overlap-degree is 1."""
    given, ranks = args.smartmoe_overlap_degree, args.expert_model_parallel_size
    if given == "1":
        return [1]
    asked = set() if given == AUTO else {int(given)}
    most = min(MOST_CHUNKS, ranks)
    return sorted({1, *asked, *(2**power for power in range(1, most.bit_length()))})
