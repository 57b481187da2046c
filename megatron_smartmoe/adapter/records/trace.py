"""`--smartmoe-record-trace`: the routing of a run as a trace, from stock Megatron's layers as well as from ours."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.num_microbatches_calculator import get_num_microbatches
from numpy.typing import NDArray

from megatron_smartmoe.adapter.hooks import Callback, Order
from megatron_smartmoe.adapter.moe.routers import count_tokens, passes_per_micro_batch
from megatron_smartmoe.adapter.run import Run
from megatron_smartmoe.errors import SmartMoEError
from megatron_smartmoe.runtime.counts import ExpertCounts, PassCounts
from megatron_smartmoe.runtime.trace_buffer import Place, TraceBuffer
from megatron_smartmoe.spec.trace import RoutingTrace, load_trace


class TraceRecorder(Callback):
    """Counts every iteration, and writes the trace after each full window, after each checkpoint, and at the end.

    A run that resumes continues the trace of the iterations that it resumes after.

    Args:
        path: the `.npz` file; replaced as a whole, so that a reader never sees half a trace.
        micro_batches: whether they are kept apart: every pass through a layer, which is more than one for a layer of
            several prediction depths.
    """

    order = Order.TRACE

    def __init__(self, path: Path, *, micro_batches: bool) -> None:
        self._path, self._keeps_passes = path, micro_batches
        self._iterations: list[int] = []
        self._parts: list[NDArray[np.int64]] = []
        self._before: RoutingTrace | None = None

    def on_start(self, run: Run) -> None:
        """Put counters on the routers."""
        self._run, device = run, torch.cuda.current_device()
        layers, num_experts = tuple(sorted(number for number, _ in run.layers)), run.args.num_experts
        passes = _most_passes(run) if self._keeps_passes else None
        self._rows = torch.tensor(layers, device=device)
        self._passes = None if passes is None else PassCounts(layers, passes, num_experts, device)
        self._totals = ExpertCounts(run.num_layers, num_experts, device)
        count_tokens(run.layers, self._totals if self._passes is None else self._passes)
        # Source ranks are numbered over the pipeline stage: one expert-parallel group after another.
        source = run.ranks.edp_rank * run.ranks.ep_size + run.ranks.ep_rank
        self._buffer = TraceBuffer(Place(source=source, layers=layers), num_experts, device, passes=passes)
        if run.is_reporter and run.args.iteration and self._path.is_file():
            self._before = self._trace_before(run.args.iteration)

    def _trace_before(self, iteration: int) -> RoutingTrace | None:
        """The records up to the iteration that the run resumes after; None, with a line that says so, if unreadable."""
        try:
            trace = load_trace(self._path, field="--smartmoe-record-trace")
        except SmartMoEError as error:
            self._say_anew(str(error))
            return None
        count = int(np.searchsorted(trace.iteration, iteration, side="right"))
        if not count:
            return None
        return replace(trace, counts=trace.counts[:count], iteration=trace.iteration[:count])

    def _say_anew(self, why: str) -> None:
        iteration = self._run.args.iteration
        print(f" smartmoe: iteration {iteration:8d} | WARNING: the trace begins anew: {why} |", flush=True)

    def between_steps(self, iteration: int) -> None:
        """Keep this iteration's counts, on the device."""
        if self._passes is None:
            self._buffer.add(iteration, self._totals.local_LE.index_select(0, self._rows))
            self._totals.reset()
        else:
            if self._passes.is_complete:  # else a replay says that the trace lacks the iteration
                self._buffer.add(iteration, self._passes.local_LPE)
            self._passes.reset()
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
        self._continue(counts, layers)
        self._iterations += iterations
        self._parts.append(counts)
        args = self._run.args
        groups = {"num_groups": args.moe_router_num_groups} if args.moe_router_group_topk else {}
        trace = RoutingTrace(
            counts=np.concatenate(self._parts).astype(np.uint32),
            iteration=np.array(self._iterations, dtype=np.int64),
            layer=np.array(layers, dtype=np.int64),
            meta={"top_k": args.moe_router_topk, "source": "megatron_smartmoe", **groups},
        )
        self._run.attempt(self._path, functools.partial(self._save, trace))

    def _continue(self, counts: NDArray[np.int64], layers: list[int]) -> None:
        """Put the records of before this start in front of the first ones, if both are of the same sizes."""
        before, self._before = self._before, None
        if before is None:
            return
        if before.counts.shape[1:] != counts.shape[1:] or before.layer.tolist() != layers:
            found, present = (list(shape) for shape in (before.counts.shape[1:], counts.shape[1:]))
            self._say_anew(f"that of before the run resumed has counts {found} in an iteration, and this run {present}")
            return
        self._iterations, self._parts = before.iteration.tolist(), [before.counts.astype(np.int64)]

    def _save(self, trace: RoutingTrace) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        partial = self._path.with_name(f".{self._path.name}.partial.npz")
        try:
            trace.save(partial)
            partial.replace(self._path)
        finally:
            partial.unlink(missing_ok=True)


def _most_passes(run: Run) -> int:
    """The most passes through a layer of the model in an iteration. A collective call."""
    passes = max((passes_per_micro_batch(layer) for _, layer in run.layers), default=1)
    most = torch.tensor(passes * get_num_microbatches(), device=torch.cuda.current_device())
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    return int(most.item())
