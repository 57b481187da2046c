"""Which device a process trains on, decided before Megatron is imported, since the CPU facade has to be there first;
and whether this Megatron is one for this project's own entry."""

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
        CompatError: a GPU was asked for and there is none, or there are some and torch cannot use them.
    """
    if asked == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch looks: nothing below may see the GPU
    if with_filters:
        log_filters.install()
    import torch

    if torch.cuda.is_available():
        return False
    if asked != "cpu":
        from megatron_smartmoe.adapter.gpus import refuse_unusable_gpus

        refuse_unusable_gpus(asked)
    if asked == "cuda":
        raise CompatError(
            "--smartmoe-device cuda: torch sees no CUDA device here. Leave the flag out to train on the CPU."
        )
    from megatron_smartmoe.adapter import cpu

    cpu.install()
    return True


def refuse_old_megatron() -> None:
    """Megatron's releases up to 0.18 are for scripts of their own: this project's entry calls functions of later ones.

    Raises:
        CompatError: they are missing.
    """
    import megatron.core
    from megatron.training import argument_utils

    if not hasattr(argument_utils, "gpt_config_from_args"):
        raise CompatError(
            f"this project's own entry needs megatron-core 0.19 or later, and {megatron.core.__version__} is what is "
            "imported. Train with Megatron's own script and --smartmoe (docs/integrate.md), or install a later "
            "release: pip install 'megatron-core>=0.19'"
        )
