"""Between how many nodes a run's tokens are sent once: 1 for a flat dispatch, by flag or by predicted time.

The prediction is the planner's (`cost.step.moe`), for this run's sizes on this machine's cluster file, with an even
load: the real one is not known at start-up. Rank 0 chooses for all, because ranks that exchange in different ways would
wait for each other for ever.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from dataclasses import replace

import torch.distributed as dist

from megatron_smartmoe.adapter.cost_inputs import (
    launch_of_run,
    machine_of_job,
    model_of_run,
    nodes_of_group,
    use_dispatch,
)
from megatron_smartmoe.adapter.flags.smartmoe_checks import on_one_node
from megatron_smartmoe.adapter.measured_prices import measure_if_unknown
from megatron_smartmoe.adapter.moe.overlap_degree import even_flow
from megatron_smartmoe.cost.step.constants import StepConstants, layer_constants
from megatron_smartmoe.cost.step.moe import moe_times
from megatron_smartmoe.errors import CompatError
from megatron_smartmoe.planner.flags import DISPATCH
from megatron_smartmoe.spec.cluster import ClusterSpec
from megatron_smartmoe.spec.parallel import DISPATCHES, FLAT, HIERARCHICAL

WORTH = 0.01  # share of the time that a hierarchical dispatch must save; an estimate


class DispatchNodes:
    """The number of nodes, found at the first call, which all ranks of the job make once.

    Args:
        args: Megatron's arguments, after validation.
    """

    def __init__(self, args: Namespace) -> None:
        self._args = args
        self._found: int | None = None

    def __call__(self) -> int:
        """The number of nodes, on every rank the same; 1 for a flat dispatch.

        Raises:
            CompatError: the flag asks for a hierarchical dispatch, and the group lies on one node.
        """
        if self._found is None:
            self._found = 1 if self._args.smartmoe_dispatch == FLAT else _find(self._args)
            use_dispatch(HIERARCHICAL if self._found > 1 else FLAT)
        return self._found


def _find(args: Namespace) -> int:
    ranks = args.expert_model_parallel_size
    nodes = nodes_of_group(ranks)
    if args.smartmoe_dispatch == HIERARCHICAL:
        if nodes == 1:
            raise CompatError(f"{DISPATCH} = {HIERARCHICAL!r}: {on_one_node(ranks)}. Pass {FLAT}, or remove it.")
        return nodes
    measure_if_unknown(args)
    chosen = [1]
    if dist.get_rank() == 0:
        seconds = {} if nodes == 1 else predicted_seconds(args, machine_of_job(args), nodes)
        print(f"smartmoe: {explain(ranks, seconds)}", flush=True)
        chosen = [nodes if pays_off(seconds) else 1]
    dist.broadcast_object_list(chosen, src=0)
    return chosen[0]


def pays_off(seconds: Mapping[str, float]) -> bool:
    """Whether the hierarchical dispatch is predicted to save enough; without predictions it does not."""
    return bool(seconds) and seconds[HIERARCHICAL] < seconds[FLAT] * (1 - WORTH)


def explain(ranks: int, seconds: Mapping[str, float]) -> str:
    """One line: the choice and why.

    Args:
        ranks: of the expert-parallel group.
        seconds: predicted for each dispatch; none where the group lies on one node.
    """
    if not seconds:
        return f"dispatch {FLAT}: {on_one_node(ranks)}"
    chosen, saves = (HIERARCHICAL, "saves at least") if pays_off(seconds) else (FLAT, "does not save")
    predicted = ", ".join(f"{dispatch}: {each * 1e3:.3f}" for dispatch, each in seconds.items())
    return (
        f"dispatch {chosen}: sending a token once for each node {saves} {WORTH:.0%} of the predicted time; predicted "
        f"ms of a MoE layer, forward and backward, with an even load: {predicted}"
    )


def predicted_seconds(args: Namespace, cluster: ClusterSpec, num_nodes: int) -> dict[str, float]:
    """Seconds of one MoE layer and micro-batch by dispatch.

    Args:
        args: Megatron's arguments, after validation.
        cluster: the machine.
        num_nodes: nodes of an expert-parallel group.
    """
    model, spec, constants = model_of_run(args), launch_of_run(args), StepConstants.of(cluster)
    flow, seconds = even_flow(model, spec, num_nodes), dict[str, float]()
    for dispatch in DISPATCHES:
        dispatched = replace(spec, dispatch=dispatch)
        prices = layer_constants(cluster, model, dispatched, constants)
        seconds[dispatch] = moe_times([flow], prices, model, dispatched, cluster, constants).total_s
    return seconds
