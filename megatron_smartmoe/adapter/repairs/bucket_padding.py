"""Optimizer state of several gradient buckets, saved with --dist-ckpt-optim-fully-reshardable.

`DistributedOptimizer.sharded_param_state_fully_reshardable` concatenates the buckets of a buffer without the padding at
their ends, and then cuts the parameters out of that at their offsets in the buffer, which count the padding. So each
parameter behind a padded bucket gets main weights and moments that start too late, and the last ones end in zeros.
Several buckets come with --overlap-grad-reduce, and padding with every bucket whose size is not a multiple of 128 and
of the data-parallel size. Upstream repaired this in pull request 5077; megatron-core 0.19.2 still has it.

The method reads the offsets from nowhere but `buffer.param_index_map`. The repair therefore calls it with the same
optimizer whose buffers show a map without the padding: no line of Megatron is repeated here, nothing is copied, and the
optimizer itself stays as it is. Whether a Megatron needs it is found by calling the method on two parameters of a few
elements, since forks and backports have no version to go by.
"""

from __future__ import annotations

import argparse
import functools
import logging
from collections.abc import Callable
from enum import Enum
from types import SimpleNamespace
from typing import Any

import torch

from megatron_smartmoe.errors import ConfigError

METHOD = "sharded_param_state_fully_reshardable"  # of DistributedOptimizer
Method = Callable[..., Any]


class Verdict(Enum):
    """What a Megatron does with the padding between buckets."""

    RIGHT = "offsets without padding"
    FAULTY = "offsets with padding, which `repair` removes"
    UNKNOWN = "neither"


def check_bucket_padding(args: argparse.Namespace) -> None:
    """Refuse to save optimizer state with a method that is neither right nor faulty in the known way.

    Raises:
        ConfigError: the flags lead to that method.
    """
    saves_state = args.ckpt_format == "torch_dist" and not args.no_save_optim
    if not (saves_state and args.use_distributed_optimizer and args.dist_ckpt_optim_fully_reshardable):
        return
    if not is_sound():
        rule = (
            "with --use-distributed-optimizer, this Megatron may save wrong main weights and moments of all parameters "
            "behind the first gradient bucket, in a way that is not known here"
        )
        way_out = "Remove the flag, or use megatron-core 0.19.2 (pip install megatron-core==0.19.2)."
        raise ConfigError("--dist-ckpt-optim-fully-reshardable", True, rule, way_out)


def is_sound() -> bool:
    """Whether this Megatron saves such state right, with the repair or without."""
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    return verdict(getattr(DistributedOptimizer, METHOD, None)) is not Verdict.UNKNOWN


def verdict(method: Method | None) -> Verdict:
    """What `method` does; FAULTY only where the repair has been seen to help."""
    found = _try(method) if method is not None else Verdict.UNKNOWN
    if method is not None and found is Verdict.FAULTY and _try(repair(method)) is not Verdict.RIGHT:
        return Verdict.UNKNOWN
    return found


def repair(method: Method) -> Method:
    """`method` with offsets that leave out the padding at the end of each bucket."""

    @functools.wraps(method)
    def repaired(optimizer: Any, *args: Any, **kwargs: Any) -> Any:
        buffers = [_With(buffer, param_index_map=_without_padding(buffer)) for buffer in optimizer.buffers]
        return method(_With(optimizer, buffers=buffers), *args, **kwargs)

    return repaired


class _With:
    """An object that shows some attributes otherwise; methods of the object itself see no difference."""

    def __init__(self, original: Any, **attributes: Any) -> None:
        self.__dict__.update(attributes)
        self._original = original

    def __getattr__(self, name: str) -> Any:  # called for what __init__ did not set
        return getattr(self._original, name)


def _without_padding(buffer: Any) -> dict[Any, tuple[int, int, int]]:
    """`param_index_map` of the buffer with its buckets moved together."""
    shifts, padding = [], 0  # elements of padding in front of each bucket
    for bucket in buffer.buckets:
        shifts.append(padding)
        padding += bucket.grad_data.numel() - bucket.numel_unpadded
    return {
        parameter: (start - shifts[bucket], stop - shifts[bucket], bucket)
        for parameter, (start, stop, bucket) in buffer.param_index_map.items()
    }


def _try(method: Method) -> Verdict:
    """Call `method` on a buffer of two buckets: 3 elements and 1 of padding, then 2 elements.

    Without the padding the second parameter is elements 3 and 4 of five; at its offset in the buffer, 4, only one is
    left, and a zero is appended.
    """
    from megatron.core.dist_checkpointing import ShardedTensor

    first, second = torch.zeros(3), torch.zeros(2)
    buckets = [
        SimpleNamespace(bucket_id=0, offset=0, numel_unpadded=3, grad_data=torch.zeros(4)),
        SimpleNamespace(bucket_id=1, offset=4, numel_unpadded=2, grad_data=torch.zeros(2)),
    ]
    buffer = SimpleNamespace(
        param_index_map={first: (0, 3, 0), second: (4, 6, 1)}, numel=6, numel_unpadded=5, buckets=buckets
    )
    dtype = (torch.float32, torch.float32)
    state = {0: {dtype: {"param": torch.arange(5.0), "numel_unpadded": 5}}, "buckets_coalesced": True}
    optimizer = SimpleNamespace(
        buffers=[buffer],
        gbuf_ranges=[{dtype: [{"param_map": {}}, {"param_map": {}}]}],
        get_parameter_state_dp_zero=lambda **_: state,
    )
    model = {name: ShardedTensor.from_rank_offsets(name, data) for name, data in (("1", first), ("2", second))}
    logger = logging.getLogger("megatron.core.optimizer.distrib_optimizer")
    was_disabled = logger.disabled
    try:
        logger.disabled = True  # a faulty one warns of the zero
        saved = method(optimizer, model, is_loading=False, metadata={})
        values = tuple(tuple(saved[i]["param"].data.tolist()) for i in (0, 1))
    except Exception:  # whatever this Megatron stumbles over: it is not one that is known
        return Verdict.UNKNOWN
    finally:
        logger.disabled = was_disabled
    known: dict[object, Verdict] = {((0, 1, 2), (3, 4)): Verdict.RIGHT, ((0, 1, 2), (4, 0)): Verdict.FAULTY}
    return known.get(values, Verdict.UNKNOWN)
