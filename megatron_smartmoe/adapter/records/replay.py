"""`--smartmoe-replay-trace`: route as a recorded trace says. For benchmarks: what is learned this way is useless.

A hook on each router keeps its output's shape and graph, and replaces what it chose: every rank gets the trace's
counts per expert, scaled to its own tokens, and each token k different experts with weight 1 / k.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state as mpu
from megatron.core.utils import unwrap_model
from megatron.training import get_args

from megatron_smartmoe.adapter.hooks import after
from megatron_smartmoe.adapter.moe.routers import moe_layers
from megatron_smartmoe.runtime.replay import forced_map, scaled_counts
from megatron_smartmoe.spec.arrays import IntArray
from megatron_smartmoe.spec.trace import load_trace


class RoutingReplay:
    """Forces the routers of one rank.

    Args:
        path: of the trace. Its records are replayed in order, one an iteration, and begin again at its end; its layers
            are the model's MoE layers in order, again from the first when the model has more.
    """

    def __init__(self, path: Path) -> None:
        self._trace = load_trace(path)
        self._calls: dict[int, tuple[int, int]] = {}  # layer -> (iteration, micro-batches of it so far)

    def listen(self) -> None:
        """Hook into Megatron's loop; before anything that counts what is routed."""
        import megatron.training.training as training

        after(training, "setup_model_and_optimizer", self.on_model)

    def on_model(self, result: tuple[list[torch.nn.Module], Any, Any], *args: Any, **kwargs: Any) -> None:
        """After `setup_model_and_optimizer`: put the hooks on the routers."""
        options = get_args()
        if options.rank == 0:
            print(
                "smartmoe: WARNING: --smartmoe-replay-trace routes as a recorded trace says and ignores the routers. "
                "This run measures speed; what it learns is useless.",
                flush=True,
            )
        groups_LGMRE = self._trace.groups(mpu.get_expert_model_parallel_world_size())
        group = mpu.get_expert_data_parallel_rank() % groups_LGMRE.shape[2]
        counts_NLME = groups_LGMRE[:, :, group, :, mpu.get_expert_model_parallel_rank()]
        for number, layer in moe_layers(unwrap_model(result[0])):
            layer.router.register_forward_hook(self._hook(number, counts_NLME))

    def _hook(self, layer: int, counts_NLME: IntArray) -> Any:
        def hook(router: torch.nn.Module, inputs: Any, output: tuple[torch.Tensor, torch.Tensor]) -> Any:
            probs_TE, map_TE = output
            options = get_args()
            record = options.curr_iteration % len(counts_NLME)
            micro = self._micro_batch(layer, options.curr_iteration) % counts_NLME.shape[2]
            counts_E = counts_NLME[record, layer % counts_NLME.shape[1], micro]
            scaled_E = scaled_counts(counts_E, len(map_TE), options.moe_router_topk)
            forced_TE = forced_map(scaled_E, len(map_TE)).to(map_TE.device)
            weights_TE = forced_TE.to(probs_TE.dtype) / options.moe_router_topk
            # the routers stay in the graph: the overlapped gradient reduction expects each parameter's gradient
            return probs_TE * 0 + weights_TE, forced_TE

        return hook

    def _micro_batch(self, layer: int, iteration: int) -> int:
        """How many micro-batches of this iteration the layer has routed before."""
        if not self._trace.has_micro_batches:
            return 0
        seen, micro = self._calls.get(layer, (iteration, -1))
        micro = micro + 1 if seen == iteration else 0
        self._calls[layer] = (iteration, micro)
        return micro
