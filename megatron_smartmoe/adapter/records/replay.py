"""`--smartmoe-replay-trace`: route as a recorded trace says. For benchmarks only: the trained model is meaningless.

A hook on each router keeps the shape and the graph of its output, and replaces its choice: every rank gets the trace's
counts per expert, scaled to its own tokens, and each token k different experts with weight 1 / k.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from megatron_smartmoe.adapter.hooks import Callback, Order
from megatron_smartmoe.adapter.run import Run
from megatron_smartmoe.runtime.replay import forced_map, scaled_counts
from megatron_smartmoe.spec.arrays import IntArray
from megatron_smartmoe.spec.trace import load_trace


class RoutingReplay(Callback):
    """Forces the routers of one rank.

    Args:
        path: of the trace. Its records are replayed in order, one an iteration, and begin again at its end; its layers
            that have assignments are the model's MoE layers in order, again from the first when the model has more.
    """

    order = Order.REPLAY

    def __init__(self, path: Path) -> None:
        self._trace = load_trace(path, field="--smartmoe-replay-trace")
        self._calls: dict[int, tuple[int, int]] = {}  # layer -> (iteration, micro-batches of it so far)

    def on_start(self, run: Run) -> None:
        """Put the hooks on the routers."""
        self._args, ranks = run.args, run.ranks
        if run.is_reporter:
            print(
                "smartmoe: WARNING: --smartmoe-replay-trace routes as a recorded trace says and ignores the routers. "
                "This run measures speed; the trained model is meaningless.",
                flush=True,
            )
            for note in self._trace.notes:
                print(f"smartmoe: --smartmoe-replay-trace: {note}", flush=True)
        counts = self._trace.counts
        groups_LGMRE = self._trace.groups(ranks.ep_size)[:, counts.any(axis=(0, *range(2, counts.ndim)))]
        counts_NLME = groups_LGMRE[:, :, ranks.edp_rank % groups_LGMRE.shape[2], :, ranks.ep_rank]
        micro_batches_N = [max(1, self._trace.num_micro_batches(record)) for record in range(self._trace.num_records)]
        for number, layer in run.layers:
            row = run.layer_numbers.index(number)
            # first of all hooks: whoever counts counts the forced choice, however early it came
            layer.router.register_forward_hook(self._hook(row, counts_NLME, micro_batches_N), prepend=True)

    def _hook(self, layer: int, counts_NLME: IntArray, micro_batches_N: list[int]) -> Any:
        def hook(router: torch.nn.Module, inputs: Any, output: tuple[torch.Tensor, torch.Tensor]) -> Any:
            probs_TE, map_TE = output
            iteration, top_k = self._args.curr_iteration, self._args.moe_router_topk
            record = iteration % len(counts_NLME)
            micro = self._micro_batch(layer, iteration) % micro_batches_N[record]
            counts_E = counts_NLME[record, layer % counts_NLME.shape[1], micro]
            scaled_E = scaled_counts(counts_E, len(map_TE), top_k)
            forced_TE = forced_map(scaled_E, len(map_TE)).to(map_TE.device)
            weights_TE = forced_TE.to(probs_TE.dtype) / top_k
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
