"""The overlap degree of a run: the flag's number, or the smallest that is predicted to be nearly the fastest.

The prediction is the planner's (`cost.step.moe`), for this run's sizes on this machine's cluster file, with an even
load: what the load will be is not known at start-up. Rank 0 chooses for all, because ranks that cut their all-to-alls
differently would wait for each other for ever.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping

import numpy as np
import torch.distributed as dist

from megatron_smartmoe.adapter.flags.overlap_checks import AUTO, MOST_PIECES
from megatron_smartmoe.adapter.machine import machine, nodes_of_group
from megatron_smartmoe.cost.moe_layer import LayerFlow
from megatron_smartmoe.cost.step.constants import StepConstants, layer_constants
from megatron_smartmoe.cost.step.moe import moe_times
from megatron_smartmoe.spec.cluster import ClusterSpec
from megatron_smartmoe.spec.model import ModelSpec, MoESpec
from megatron_smartmoe.spec.parallel import ParallelSpec
from megatron_smartmoe.spec.placement import Placement

NEARLY = 0.01  # of the best time


class OverlapDegree:
    """Says the degree; chooses it at the first call, which all ranks of the job make once.

    Args:
        options: Megatron's arguments, after validation.
    """

    def __init__(self, options: Namespace) -> None:
        self._options = options
        self._chosen: int | None = None

    def __call__(self) -> int:
        """The degree, on every rank the same."""
        if self._chosen is None:
            self._chosen = self._choose()
        return self._chosen

    def _choose(self) -> int:
        options = self._options
        if options.smartmoe_overlap_degree != AUTO:
            return int(options.smartmoe_overlap_degree)
        ranks = options.expert_model_parallel_size
        if ranks == 1:
            return 1
        num_nodes = nodes_of_group(ranks)
        chosen = [1]
        if dist.get_rank() == 0:
            seconds = predicted_seconds(options, machine(options), num_nodes)
            chosen = [fewest_pieces(seconds)]
            print(f"smartmoe: {explain(chosen[0], seconds)}", flush=True)
        dist.broadcast_object_list(chosen, src=0)
        return chosen[0]


def fewest_pieces(seconds: Mapping[int, float]) -> int:
    """The smallest degree that is nearly the best: what a prediction says of the last percent is not worth a launch."""
    return min(degree for degree, each in seconds.items() if each <= min(seconds.values()) * (1 + NEARLY))


def explain(chosen: int, seconds: Mapping[int, float]) -> str:
    """One line: the choice and what was predicted for each degree."""
    tried = ", ".join(f"{degree}: {each * 1e3:.3f}" for degree, each in seconds.items())
    return (
        f"overlap degree {chosen}, the fewest pieces within {NEARLY:.0%} of the best; predicted ms of a MoE layer, "
        f"forward and backward, at even load: {tried}"
    )


def predicted_seconds(options: Namespace, cluster: ClusterSpec, num_nodes: int) -> dict[int, float]:
    """Seconds of one MoE layer and micro-batch for each degree that is possible."""
    ranks, experts = options.expert_model_parallel_size, options.num_experts
    tensor, context = options.tensor_model_parallel_size, options.context_parallel_size
    tokens = options.micro_batch_size * options.seq_length // (tensor * context)  # of a rank
    counts_RE = np.full((ranks, experts), tokens * options.moe_router_topk / experts)
    homes = Placement.contiguous(num_layers=1, num_experts=experts, num_ranks=ranks, spare_slots=0)
    flow = LayerFlow.equal_split(counts_RE, homes.slots_LRS[0], num_nodes)
    model, constants = run_model(options), StepConstants.of(cluster)
    seconds = {}
    for degree in range(1, min(ranks, MOST_PIECES) + 1):
        spec = run_parallel(options, degree)
        prices = layer_constants(cluster, model, spec, constants)
        seconds[degree] = moe_times([flow], prices, model, spec, cluster, constants).total_s
    return seconds


def run_model(options: Namespace) -> ModelSpec:
    """The model as far as its MoE layers' time knows it."""
    return ModelSpec(
        name="this run",
        layers=options.num_layers,
        hidden=options.moe_latent_size or options.hidden_size,
        heads=options.num_attention_heads,
        query_groups=options.num_attention_heads,
        head_dim=options.hidden_size // options.num_attention_heads,
        ffn=options.ffn_hidden_size,
        vocab=1,  # not a matter of the layers
        seq_length=options.seq_length,
        moe=MoESpec(experts=options.num_experts, top_k=options.moe_router_topk, ffn=options.moe_ffn_hidden_size),
        global_batch=options.global_batch_size,
        gated=options.swiglu,
    )


def run_parallel(options: Namespace, degree: int) -> ParallelSpec:
    """How this run is spread, as far as its MoE layers' time knows it."""
    return ParallelSpec(
        gpus=options.world_size,
        tp=options.tensor_model_parallel_size,
        pp=options.pipeline_model_parallel_size,
        cp=options.context_parallel_size,
        ep=options.expert_model_parallel_size,
        etp=options.expert_tensor_parallel_size,
        micro_batch=options.micro_batch_size,
        global_batch=options.global_batch_size,
        overlap_degree=degree,
        precision="fp32" if options.params_dtype.itemsize == 4 else "bf16",
    )
