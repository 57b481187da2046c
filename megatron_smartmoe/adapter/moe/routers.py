"""Megatron's MoE layers in a built model, and the counters on their routers."""

from __future__ import annotations

from collections.abc import Container, Iterator
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from megatron.core.transformer.moe.moe_layer import MoELayer

from megatron_smartmoe.runtime.counts import ExpertCounts
from megatron_smartmoe.runtime.recent_counts import RecentCounts


def moe_layers(model_chunks: list[torch.nn.Module]) -> Iterator[tuple[int, MoELayer]]:
    """(layer number counted from 0 over the whole model, layer) of every MoE layer on this rank."""
    for chunk in model_chunks:
        for module in chunk.modules():
            if isinstance(module, MoELayer):
                yield module.layer_number - 1, module


def all_layer_numbers(numbers: list[int]) -> list[int]:
    """The numbers of all MoE layers of the model, whichever stage they are on. A collective call of all ranks.

    Args:
        numbers: the numbers of this rank's layers.
    """
    gathered: list[list[int]] = [[]] * dist.get_world_size()
    dist.all_gather_object(gathered, numbers)
    return sorted({number for of_rank in gathered for number in of_rank})


def source_rank() -> int:
    """The index of this rank's tokens in a routing trace: expert-parallel groups of its stage, one after another.

    Ranks that share their tokens (expert tensor parallelism) have the same index.
    """
    ep_size, ep_rank = mpu.get_expert_model_parallel_world_size(), mpu.get_expert_model_parallel_rank()
    return int(mpu.get_expert_data_parallel_rank() * ep_size + ep_rank)


def count_tokens(
    model_chunks: list[torch.nn.Module],
    counts: ExpertCounts | RecentCounts,
    layers: Container[int] | None = None,
) -> None:
    """Have every router add what it routes in training to `counts`.

    A pass without gradients (evaluation, the first pass of recomputation) is not counted, so each token counts once.

    Args:
        model_chunks: this rank's part of the model.
        counts: receives the routing map of each micro-batch of each layer.
        layers: numbers of the layers to count; None for all.
    """

    def hook_for(layer: int) -> Any:
        def hook(router: torch.nn.Module, inputs: Any, output: tuple[torch.Tensor, torch.Tensor]) -> None:
            if torch.is_grad_enabled():
                counts.add(layer, output[1])

        return hook

    for layer, module in moe_layers(model_chunks):
        if layers is None or layer in layers:
            module.router.register_forward_hook(hook_for(layer))
