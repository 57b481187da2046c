"""When the home weights of a layer are complete: with --overlap-param-gather, when their all-gather has ended.

Megatron's DDP waits for a bucket of parameters in a forward pre-hook of the module that owns them, and posts the
all-gather of the next bucket there. For a layer's experts that is after the dispatch, too late to send their weights to
replicas. `ParameterGathers.finish` does for the experts what that hook would do, when it is called; the hook then finds
nothing left to do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron_smartmoe.adapter.moe.layer import SmartMoELayer
from megatron_smartmoe.adapter.moe.routers import moe_layers
from megatron_smartmoe.adapter.run import Run


class ParameterGathers:
    """The all-gathers of the experts' parameters of this rank's layers.

    Args:
        chunks: Megatron's DDP around each model chunk, with its MoE layers in the order of their forward passes; empty
            where optimizer steps gather the parameters before the next iteration begins.

    Attributes:
        overlapped: whether parameters are gathered during the forward pass.
    """

    def __init__(self, chunks: Sequence[tuple[Any, Sequence[SmartMoELayer]]]) -> None:
        self.overlapped = bool(chunks)
        self._chunk_of = {layer: chunk for chunk, layers in chunks for layer in layers}
        self._first = {layers[0] for _, layers in chunks if layers}

    @classmethod
    def of(cls, run: Run) -> ParameterGathers:
        """Those of a run."""
        if not run.args.overlap_param_gather:
            return cls([])
        pairs = zip(run.model_chunks, run.chunks, strict=True)
        return cls([(wrapped, [layer for _, layer in moe_layers([chunk])]) for wrapped, chunk in pairs])

    def is_first(self, layer: SmartMoELayer) -> bool:
        """Whether no other MoE layer of its model chunk comes before it."""
        return layer in self._first

    def finish(self, layer: SmartMoELayer) -> None:
        """Wait until the layer's home weights are complete, on CUDA the current stream alone, and post the next
        all-gather. In the order in which the layers compute, on all ranks alike."""
        chunk = self._chunk_of.get(layer)
        if chunk is not None and chunk.remove_forward_pre_hook_handles:  # else they were synchronised all together
            chunk._make_forward_pre_hook()(layer.experts)
