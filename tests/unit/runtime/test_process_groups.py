"""What the groups of the project's own messages ask NCCL for."""

from __future__ import annotations

from datetime import timedelta

import pytest
import torch.distributed as dist

from megatron_smartmoe.runtime.process_groups import MESSAGE_CTAS, nccl_options


@pytest.mark.skipif(not dist.is_nccl_available(), reason="this torch has no NCCL: its options cannot be made")
def test_options_of_nccl() -> None:
    options = nccl_options("nccl", timedelta(minutes=7))
    assert options.is_high_priority_stream
    assert options._timeout == timedelta(minutes=7)
    assert options.config.max_ctas == MESSAGE_CTAS < 32


def test_gloo_has_none() -> None:
    assert nccl_options("gloo", timedelta(minutes=7)) is None
