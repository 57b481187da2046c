"""Which device a process trains on; decided before Megatron is imported, since the CPU facade has to be there first."""

from __future__ import annotations

import os

from megatron_smartmoe.adapter import log_filters
from megatron_smartmoe.errors import CompatError


def choose_device(asked: str, *, with_filters: bool = True) -> bool:
    """Load the CPU facade when there is no GPU, or when asked. Returns whether this run is on the CPU.

    Args:
        asked: value of --smartmoe-device.
        with_filters: filter messages that Megatron and torch print at every start.

    Raises:
        CompatError: a GPU was asked for and there is none.
    """
    if asked == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch looks: nothing below may see the GPU
    if with_filters:
        log_filters.install()
    import torch

    if torch.cuda.is_available():
        return False
    if asked == "cuda":
        raise CompatError(
            "--smartmoe-device cuda: torch sees no CUDA device here. Leave the flag out to train on the CPU."
        )
    from megatron_smartmoe.adapter import cpu

    cpu.install()
    return True
