"""A router in a CUDA graph: Megatron's way of capturing and replaying it, without the graph."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.in_one_rank import run_in_one_rank

pytestmark = [pytest.mark.dist, pytest.mark.fast]

EXPERTS, TOKENS, HIDDEN = 4, 6, 16


def a_replay_is_counted_and_computed_as_the_router_is() -> None:
    import torch
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from megatron.core.transformer import cuda_graphs
    from megatron.core.transformer.enums import CudaGraphModule

    from megatron_smartmoe.adapter.moe.routers import count_tokens
    from megatron_smartmoe.runtime.counts import ExpertCounts
    from scripts.training_bench.one_layer import smart_layer

    model_parallel_cuda_manual_seed(1)
    layer = smart_layer(ranks=1, experts=EXPERTS, hidden=HIDDEN, ffn=8, moe_router_topk=2)
    layer.set_homes(torch.tensor([2, 0, 3, 1]))
    counts = ExpertCounts(num_layers=1, num_experts=EXPERTS, device=torch.device("cpu"))
    count_tokens([(0, layer)], counts)
    rows = torch.randn(TOKENS, 1, HIDDEN, generator=torch.Generator().manual_seed(1))
    eager, _ = layer(rows)
    expected = counts.local_LE.clone()
    assert expected.sum() == 2 * TOKENS
    counts.reset()
    # Step 1: capture ends behind the router, and trains nothing
    layer.config.cuda_graph_impl, layer.config.cuda_graph_modules = "transformer_engine", [CudaGraphModule.moe_router]
    cuda_graphs._set_capture_start()
    hidden, probs, routing_map = layer(rows)
    cuda_graphs._set_capture_end()
    assert not counts.local_LE.any()
    # Step 2: a replay hands its choices to the layer
    layer.cudagraph_tensor_store.set(hidden_states=hidden, probs=probs, routing_map=routing_map)
    replayed, _ = layer(hidden)
    layer.cudagraph_tensor_store.clear()
    assert torch.equal(counts.local_LE, expected)
    assert torch.equal(replayed, eager)


CHECKS: tuple[Callable[[], None], ...] = (a_replay_is_counted_and_computed_as_the_router_is,)


def test_all(tmp_path: Path) -> None:
    run_in_one_rank(CHECKS, tmp_path)
