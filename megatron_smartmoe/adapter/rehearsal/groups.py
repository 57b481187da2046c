"""Process groups of a job whose other ranks do not exist: torch's fake ones."""

from __future__ import annotations

import functools
from argparse import Namespace
from typing import Any

import torch.distributed as dist
from megatron.core import mpu
from megatron.core.rerun_state_machine import destroy_rerun_state_machine
from megatron.training.initialize import initialize_megatron

from megatron_smartmoe.adapter.batch import embedding_ranks
from megatron_smartmoe.adapter.cpu.devices import replace


def use_fake_groups() -> None:
    """Make every further process group of this process a fake one, whatever backend is asked for."""
    from torch.testing._internal.distributed import fake_pg  # noqa: F401  # registers the backend

    new_group = dist.new_group

    @functools.wraps(new_group)
    def fake(ranks: Any = None, timeout: Any = None, backend: Any = None, *args: Any, **kwargs: Any) -> Any:
        named = {key: kwargs[key] for key in ("use_local_synchronization", "group_desc") if key in kwargs}
        return new_group(ranks, timeout, "fake", **named)

    replace(dist, new_group=fake)
    replace(dist.distributed_c10d, new_group=fake)


def become_rank(args: Namespace, rank: int) -> None:
    """Form the process groups as this rank has them, in place of those of an earlier rank."""
    if dist.is_initialized():
        if dist.get_rank() == rank:
            return
        mpu.destroy_model_parallel()
        dist.destroy_process_group()
        destroy_rerun_state_machine()
    args.rank = rank
    args.fake_process_group = True
    initialize_megatron(allow_no_cuda=True, get_embedding_ranks=embedding_ranks)
