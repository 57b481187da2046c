"""`--smartmoe-record-trace`: the routing of a run as a trace, from stock Megatron's layers as well as from ours."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from megatron_smartmoe.adapter.hooks import Callback, Order
from megatron_smartmoe.adapter.moe.routers import count_tokens
from megatron_smartmoe.adapter.run import Run
from megatron_smartmoe.runtime.counts import ExpertCounts
from megatron_smartmoe.runtime.trace_buffer import Place, TraceBuffer
from megatron_smartmoe.spec.trace import RoutingTrace


class TraceRecorder(Callback):
    """Counts every iteration, and writes the trace after each full window, after each checkpoint, and at the end.

    Args:
        path: the `.npz` file; replaced as a whole, so that a reader never sees half a trace.
    """

    order = Order.TRACE

    def __init__(self, path: Path) -> None:
        self._path = path
        self._iterations: list[int] = []
        self._parts: list[NDArray[np.int64]] = []

    def on_start(self, run: Run) -> None:
        """Put counters on the routers."""
        self._run, device = run, torch.cuda.current_device()
        layers = tuple(sorted(number for number, _ in run.layers))
        self._rows = torch.tensor(layers, device=device)
        self._counts = ExpertCounts(run.num_layers, run.args.num_experts, device)
        count_tokens(run.layers, self._counts)
        # Source ranks are numbered over the pipeline stage: one expert-parallel group after another.
        source = run.ranks.edp_rank * run.ranks.ep_size + run.ranks.ep_rank
        self._buffer = TraceBuffer(Place(source=source, layers=layers), run.args.num_experts, device)

    def between_steps(self, iteration: int) -> None:
        """Keep this iteration's counts, on the device."""
        self._buffer.add(iteration, self._counts.local_LE.index_select(0, self._rows))
        self._counts.reset()
        if self._buffer.is_full:
            self._flush()

    @contextlib.contextmanager
    def around_save(self, iteration: int) -> Iterator[None]:
        """The trace on disk reaches as far as the newest checkpoint."""
        yield
        self._flush()

    def on_end(self) -> None:
        """Write what is left."""
        self._flush()

    def _flush(self) -> None:
        """Collect from all ranks and write the trace as it is now. A collective call."""
        collected = self._buffer.collect()
        if collected is None or not collected[0]:
            return
        iterations, counts, layers = collected
        self._iterations += iterations
        self._parts.append(counts)
        trace = RoutingTrace(
            counts=np.concatenate(self._parts).astype(np.uint32),
            iteration=np.array(self._iterations, dtype=np.int64),
            layer=np.array(layers, dtype=np.int64),
            meta={"top_k": self._run.args.moe_router_topk, "source": "megatron_smartmoe"},
        )
        self._run.attempt(self._path, functools.partial(self._save, trace))

    def _save(self, trace: RoutingTrace) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        partial = self._path.with_name(f".{self._path.name}.partial.npz")
        try:
            trace.save(partial)
            partial.replace(self._path)
        finally:
            partial.unlink(missing_ok=True)
