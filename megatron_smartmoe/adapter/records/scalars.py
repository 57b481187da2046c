"""Scalars and histograms through Megatron's own TensorBoard and W&B writers, on the rank that has them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron.training import get_tensorboard_writer, get_wandb_writer


def write_scalars(scalars: Mapping[str, float], iteration: int) -> None:
    """Write a value of each curve."""
    if (writer := get_tensorboard_writer()) is not None:
        for name, value in scalars.items():
            writer.add_scalar(name, value, iteration)
    if (wandb := get_wandb_writer()) is not None:
        wandb.log(dict(scalars), iteration)


def write_histograms(values: Mapping[str, Any], iteration: int) -> None:
    """Write histograms of arrays."""
    if (writer := get_tensorboard_writer()) is not None:
        for name, array in values.items():
            writer.add_histogram(name, array, iteration)
    if (wandb := get_wandb_writer()) is not None:
        wandb.log({name: wandb.Histogram(array) for name, array in values.items()}, iteration)
