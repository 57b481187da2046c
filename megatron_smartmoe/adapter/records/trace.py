"""`--smartmoe-record-trace`: the routing of a run as a trace, from stock Megatron's layers as well as from ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.utils import unwrap_model
from megatron.training import get_args
from numpy.typing import NDArray

from megatron_smartmoe.adapter.hooks import after
from megatron_smartmoe.adapter.moe.routers import count_tokens, moe_layers, source_rank
from megatron_smartmoe.runtime.counts import ExpertCounts
from megatron_smartmoe.runtime.trace_buffer import Place, TraceBuffer
from megatron_smartmoe.spec.trace import RoutingTrace


class TraceRecorder:
    """Counts every iteration and writes the trace: after each full window, before each checkpoint, and at the end.

    Args:
        path: the `.npz` file; replaced whole, so that a reader never sees half a trace.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._counts: ExpertCounts | None = None
        self._buffer: TraceBuffer | None = None
        self._rows = torch.zeros(0, dtype=torch.int64)
        self._iterations: list[int] = []
        self._parts: list[NDArray[np.int64]] = []

    def listen(self) -> None:
        """Hook into Megatron's loop."""
        import megatron.training.training as training

        after(training, "setup_model_and_optimizer", self.on_model)
        after(training, "post_training_step_callbacks", self.on_step_end)
        after(training, "save_checkpoint_and_time", self.flush)

    def on_model(self, result: tuple[list[torch.nn.Module], Any, Any], *args: Any, **kwargs: Any) -> None:
        """After `setup_model_and_optimizer`: put counters on the routers."""
        options, chunks, device = get_args(), unwrap_model(result[0]), torch.cuda.current_device()
        layers = tuple(sorted(number for number, _ in moe_layers(chunks)))
        self._rows = torch.tensor(layers, device=device)
        self._counts = ExpertCounts(options.num_layers + (options.mtp_num_layers or 0), options.num_experts, device)
        count_tokens(chunks, self._counts)
        self._buffer = TraceBuffer(Place(source=source_rank(), layers=layers), options.num_experts, device)

    def on_step_end(self, result: Any, *args: Any, **kwargs: Any) -> None:
        """After `post_training_step_callbacks`: keep this iteration's counts, on the device."""
        assert self._counts is not None
        assert self._buffer is not None
        self._buffer.add(args[3], self._counts.local_LE.index_select(0, self._rows))
        self._counts.reset()
        if self._buffer.is_full:
            self.flush()

    def flush(self, *args: Any, **kwargs: Any) -> None:
        """Collect from all ranks and write the trace as it is now. A collective call."""
        assert self._buffer is not None
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
            meta={"top_k": get_args().moe_router_topk, "source": "megatron_smartmoe"},
        )
        self._path.parent.mkdir(parents=True, exist_ok=True)
        partial = self._path.with_name(f".{self._path.name}.partial.npz")
        trace.save(partial)
        partial.replace(self._path)
