"""Process groups of the project's own messages, which travel beside Megatron's collectives and beside the GEMMs."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as dist

MESSAGE_CTAS = 8  # most blocks of a message's kernel, a quarter of NCCL's: an estimate, the rest is left to the GEMMs


def new_message_group(ranks: Sequence[int], *, timeout: timedelta, description: str) -> dist.ProcessGroup:
    """A group for sends and receives beside a running computation. A collective call of all ranks of the job.

    With NCCL its kernels take few of the GPU's multiprocessors, and its stream is one of high priority, so that a
    message which is ready does not wait for the GEMM that it runs beside.

    Args:
        ranks: Its members.
        timeout: Of its operations.
        description: What error messages and the flight recorder call it.
    """
    group: dist.ProcessGroup = dist.new_group(
        list(ranks), timeout=timeout, pg_options=nccl_options(dist.get_backend(), timeout), group_desc=description
    )
    return group


def nccl_options(backend: str, timeout: timedelta) -> Any:
    """NCCL's options for such a group; None with another backend."""
    if backend != "nccl":
        return None
    options = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)
    options._timeout = timeout  # new_group warns when it differs from its own
    options.config.max_ctas = MESSAGE_CTAS
    return options
