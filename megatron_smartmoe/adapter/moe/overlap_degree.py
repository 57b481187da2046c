"""The overlap degree of a run: the flag's number, or the smallest one whose predicted time is nearly the shortest.

The prediction is the planner's (`cost.step.moe`), for this run's sizes on this machine's cluster file, with an even
load: the real one is not known at start-up. Rank 0 chooses for all, because ranks that split their all-to-alls
differently would wait for each other for ever.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch.distributed as dist

from megatron_smartmoe.adapter.cost_inputs import launch_of_run, machine_of_job, model_of_run, nodes_of_group
from megatron_smartmoe.adapter.flags.smartmoe_arguments import AUTO, MOST_CHUNKS
from megatron_smartmoe.adapter.measured_prices import measure_if_unknown
from megatron_smartmoe.cost.moe_layer import LayerFlow
from megatron_smartmoe.cost.step.constants import StepConstants, layer_constants
from megatron_smartmoe.cost.step.dense import tokens_of
from megatron_smartmoe.cost.step.moe import moe_times
from megatron_smartmoe.spec.cluster import ClusterSpec
from megatron_smartmoe.spec.model import ModelSpec
from megatron_smartmoe.spec.parallel import ParallelSpec
from megatron_smartmoe.spec.placement import Placement

NEARLY = 0.01  # share of the shortest time that a smaller degree may be slower; an estimate


class OverlapDegree:
    """The degree, chosen at the first call, which all ranks of the job make once.

    Args:
        args: Megatron's arguments, after validation.
    """

    def __init__(self, args: Namespace) -> None:
        self._args = args
        self._chosen: int | None = None

    def __call__(self) -> int:
        """The degree, on every rank the same."""
        if self._chosen is None:
            measure_if_unknown(self._args)  # here, because all ranks come here, and the model has no memory yet
            self._chosen = _choose(self._args)
        return self._chosen


def _choose(args: Namespace) -> int:
    if args.smartmoe_overlap_degree != AUTO:
        return int(args.smartmoe_overlap_degree)
    ranks = args.expert_model_parallel_size
    if ranks == 1:
        return 1
    num_nodes = nodes_of_group(ranks)
    chosen = [1]
    if dist.get_rank() == 0:
        seconds = predicted_seconds(args, machine_of_job(args), num_nodes)
        chosen = [fewest_chunks(seconds)]
        print(f"smartmoe: {explain(chosen[0], seconds)}", flush=True)
    dist.broadcast_object_list(chosen, src=0)
    return chosen[0]


def fewest_chunks(seconds: Mapping[int, float]) -> int:
    """The smallest degree that is nearly the fastest: a predicted gain below 1% is not worth more launches."""
    return min(degree for degree, each in seconds.items() if each <= min(seconds.values()) * (1 + NEARLY))


def explain(chosen: int, seconds: Mapping[int, float]) -> str:
    """One line: the choice and the prediction for each degree."""
    predicted = ", ".join(f"{degree}: {each * 1e3:.3f}" for degree, each in seconds.items())
    return (
        f"overlap degree {chosen}, the fewest chunks within {NEARLY:.0%} of the shortest predicted time; predicted ms "
        f"of a MoE layer, forward and backward, with an even load: {predicted}"
    )


def predicted_seconds(args: Namespace, cluster: ClusterSpec, num_nodes: int) -> dict[int, float]:
    """Seconds of one MoE layer and micro-batch by overlap degree.

    Args:
        args: Megatron's arguments, after validation.
        cluster: the machine.
        num_nodes: nodes of an expert-parallel group.
    """
    model, spec, constants = model_of_run(args), launch_of_run(args), StepConstants.of(cluster)
    flow, seconds = even_flow(model, spec, num_nodes), {}
    for degree in range(1, min(spec.ep, MOST_CHUNKS) + 1):
        overlapped = replace(spec, overlap_degree=degree)
        prices = layer_constants(cluster, model, overlapped, constants)
        seconds[degree] = moe_times([flow], prices, model, overlapped, cluster, constants).total_s
    return seconds


def even_flow(model: ModelSpec, spec: ParallelSpec, num_nodes: int) -> LayerFlow:
    """The traffic of one MoE layer and micro-batch with an even load, on experts in logical order.

    Args:
        model: the model.
        spec: the launch.
        num_nodes: nodes of an expert-parallel group.
    """
    assignments = tokens_of(model, spec) / spec.tp * model.moe.top_k  # of a rank
    counts_RE = np.full((spec.ep, model.moe.experts), assignments / model.moe.experts)
    homes = Placement.contiguous(num_layers=1, num_experts=model.moe.experts, num_ranks=spec.ep, spare_slots=0)
    return LayerFlow.equal_split(counts_RE, homes.slots_LRS[0], num_nodes)
