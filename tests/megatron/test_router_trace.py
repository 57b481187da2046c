"""Trace directories that Megatron's own tracer writes are read: stages, micro-batches, a rank that stopped."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from megatron_smartmoe.spec.trace import load_trace


def test_what_megatrons_tracer_writes_is_read(tmp_path: Path) -> None:
    """Four ranks in two pipeline stages of two and one layers; rank 3 stops a step early."""
    from megatron.core.transformer.moe.router_trace import RouterTracer

    generator = torch.Generator().manual_seed(3)
    expected = np.zeros((2, 3, 2, 2, 8), dtype=np.int64)
    for rank in range(4):
        tracer = RouterTracer(str(tmp_path), max_steps=10, rank=rank, training_mode=True)
        stage, source = divmod(rank, 2)
        for step in range(3 if rank < 3 else 2):
            for micro in range(2):
                layers = [0, 1] if stage == 0 else [0]
                chosen = torch.rand(16, len(layers), 8, generator=generator).topk(2, dim=-1).indices
                tracer.record_indices(chosen, layer_ids=layers)
                if step < 2:
                    for at, layer in enumerate(layers):
                        counts = torch.bincount(chosen[:, at].flatten(), minlength=8)
                        expected[step, 2 * stage + layer, source, micro] = counts.numpy()
            tracer.advance_step(step_id=10 + step)
        tracer.flush()

    trace = load_trace(tmp_path, num_experts=8)
    assert np.array_equal(trace.counts, expected)
    assert trace.iteration.tolist() == [10, 11]
    assert trace.layer.tolist() == [0, 1, 2]
    assert trace.meta["top_k"] == 2
    assert trace.notes == (
        "2 pipeline stages, told apart by their layers: ranks 0 to 1; ranks 2 to 3",
        "2 of 3 steps are used: rank 3 stopped at step 11",
    )
