"""Megatron's MoE layers in a built model, and the counters on their routers."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer.cuda_graphs import is_graph_capturing, is_graph_warmup
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_smartmoe.adapter.moe.graphs import holds_experts
from megatron_smartmoe.runtime.counts import ExpertCounts, PassCounts
from megatron_smartmoe.runtime.recent_counts import RecentCounts

_COUNTERS = "smartmoe_counters"  # of a router: who counts its tokens


def moe_layers(model_chunks: list[torch.nn.Module]) -> Iterator[tuple[int, MoELayer]]:
    """(layer number counted from 0 over the whole model, layer) of every MoE layer on this rank.

    Layers of prediction blocks (MTP) follow those of the decoder; Megatron numbers them from 1 again.
    """
    for chunk in model_chunks:
        for module in chunk.modules():
            if isinstance(module, MoELayer):
                yield module.layer_number - 1 + is_prediction(module) * module.config.num_layers, module


def is_prediction(layer: torch.nn.Module) -> bool:
    """Whether a layer, or a MoE layer, belongs to a prediction block (MTP)."""
    return bool(getattr(layer, "is_mtp_layer", False))


def passes_per_micro_batch(layer: MoELayer) -> int:
    """How often a micro-batch goes through a layer: several times if it is the layer of all prediction depths."""
    config = layer.config
    is_repeated = is_prediction(layer) and getattr(config, "mtp_use_repeated_layer", False)
    return int(config.mtp_num_layers) if is_repeated else 1


def all_layer_numbers(numbers: list[int]) -> list[int]:
    """The numbers of all MoE layers of the model, whichever stage they are on. A collective call of all ranks.

    Args:
        numbers: the numbers of this rank's layers.
    """
    gathered: list[list[int]] = [[]] * dist.get_world_size()
    dist.all_gather_object(gathered, numbers)
    return sorted({number for of_rank in gathered for number in of_rank})


def count_tokens(layers: Iterable[tuple[int, MoELayer]], counts: ExpertCounts | PassCounts | RecentCounts) -> None:
    """Have the routers of `layers`, (number, layer) each, add what they route in training to `counts`.

    A pass without gradients (evaluation, the first pass of recomputation) is not counted, so each token counts once.
    A router adds its map up once, for all that count its tokens: those that experts compute, after dropping by capacity
    and before padding to it. Where a CUDA graph has the router, its tokens are counted behind each replay; where it has
    the experts too, by the replay.
    """
    for number, layer in layers:
        _counters_of(layer).append(functools.partial(counts.add, number))


def without_padding(probs_TE: torch.Tensor, routing_map_TE: torch.Tensor) -> torch.Tensor:
    """What tokens chose, of a router's map that is padded to capacity: what pads an expert has probability 0."""
    return routing_map_TE & (probs_TE != 0)


def tokens_of_experts(config: TransformerConfig, probs_TE: torch.Tensor, chosen_TE: torch.Tensor) -> torch.Tensor:
    """The tokens of each expert, `[E]`, without what pads it to capacity."""
    if config.moe_pad_expert_input_to_capacity:
        chosen_TE = without_padding(probs_TE, chosen_TE)
    return chosen_TE.sum(dim=0)


def _counters_of(layer: MoELayer) -> list[Callable[[torch.Tensor], None]]:
    """Who counts the tokens of a layer's router; the first call puts the counter on it."""
    router = layer.router
    counters: list[Callable[[torch.Tensor], None]] | None = vars(router).get(_COUNTERS)
    if counters is None:
        counters = []
        setattr(router, _COUNTERS, counters)
        router.register_forward_hook(functools.partial(_count, counters))
        layer.register_forward_pre_hook(functools.partial(_count_replayed, counters))
    return counters


def _count_replayed(counters: Iterable[Callable[[torch.Tensor], None]], layer: MoELayer, inputs: Any) -> None:
    """Count what a CUDA graph has routed: Megatron hands it to the layer, and calls no router."""
    graphed = layer.cudagraph_tensor_store
    if graphed.routing_map is not None:
        _count(counters, layer.router, inputs, (graphed.probs, graphed.routing_map))
    elif graphed.probs is not None and torch.is_grad_enabled():  # it has the preprocessing too, and leaves no map
        _add(counters, layer.token_dispatcher.chosen_E)


def _count(
    counters: Iterable[Callable[[torch.Tensor], None]],
    router: Any,
    inputs: Any,
    output: tuple[torch.Tensor, torch.Tensor],
) -> None:
    if torch.is_grad_enabled() and _trains(router.config, on_cuda=output[0].is_cuda):
        _add(counters, tokens_of_experts(router.config, *output))


def _trains(config: TransformerConfig, *, on_cuda: bool) -> bool:
    """Whether what a router computes now trains: not in the runs before a capture, nor while a graph is captured.

    Where a graph holds the experts too, the counting becomes part of it and takes place in each replay.
    """
    if on_cuda and torch.cuda.is_current_stream_capturing():
        return holds_experts(config)
    return not (is_graph_capturing() or is_graph_warmup())


def _add(counters: Iterable[Callable[[torch.Tensor], None]], counts_E: torch.Tensor) -> None:
    for add in counters:
        add(counts_E)
