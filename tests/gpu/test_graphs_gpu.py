"""CUDA graphs, captured and replayed. `tests/dist/test_graphed_preprocessing.py` has more, with a stand-in for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_smartmoe import ops
from megatron_smartmoe.runtime.replicas.device_plan import DevicePlanner
from megatron_smartmoe.runtime.replicas.dispatch_plan import ExactOptions, RankView
from megatron_smartmoe.runtime.replicas.split import shifted_rows, slot_of_device_rows
from tests.support.graphed_layers import Case
from tests.support.ranks import run_ranks

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: there are no CUDA graphs"),
]


def test_a_graph_plans_replicas_from_the_counts_of_its_replay() -> None:
    ranks, experts, tokens = 8, 64, 3000
    view = RankView(num_ranks=ranks, tp_size=1, num_experts=experts, num_slots=9, num_nodes=1, rank=3, tp_rank=0)
    planner, homes = DevicePlanner(view, pinned=True), torch.randperm(experts, device="cuda")
    skewed = torch.randint(0, 50, (ranks, experts)) * (torch.arange(experts) % 7 == 0) + 1
    others_RE, ids_TK = skewed.cuda(), _choices(tokens, experts)

    def planned() -> tuple[torch.Tensor, ...]:
        rows_TK, tokens_E = ops.dispatch_map(ids_TK, homes, experts)
        counts_RE = others_RE.clone()
        counts_RE[view.rank] = tokens_E
        numbers, segments_3C = planner.start(counts_RE, ExactOptions(used_slots=1))
        moved_TK = shifted_rows(rows_TK, segments_3C[:2], rows_TK.numel())
        return numbers, segments_3C, moved_TK, slot_of_device_rows(rows_TK, segments_3C, ranks * view.num_slots)

    planned()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = planned()
    ids_TK.copy_(_choices(tokens, experts))
    homes.copy_(torch.randperm(experts))
    graph.replay()
    for replayed, expected in zip(captured, planned(), strict=True):
        assert torch.equal(replayed, expected)
    assert planner.read(captured[0], captured[1]).has_replicas


def _choices(tokens: int, experts: int) -> torch.Tensor:
    """Two different experts of each token, most of them among the first eight."""
    scores = torch.rand(tokens, experts) + 0.9 * (torch.arange(experts) < 8)
    return scores.topk(2).indices.sort().values.int().cuda()


@pytest.mark.usefixtures("gpu_ranks")
def test_a_layer_continues_behind_a_graph_of_its_preprocessing(tmp_path: Path) -> None:
    assert run_ranks(_layers, 1, log_dir=tmp_path, timeout_s=50)[0] == [{"differs": [], "has replicas": False}] * 2


def _layers() -> list[dict[str, Any]]:
    from tests.support.graphed_layers import compare, join

    torch.cuda.set_device(0)
    join("nccl", 1)
    padded = {"moe_expert_capacity_factor": 1.0, "moe_pad_expert_input_to_capacity": True}
    device = torch.device("cuda", 0)
    return [compare(case, _capture, device, backward=False) for case in (Case(), Case(options=padded))]


def _capture(layer: Any, sample: torch.Tensor) -> None:
    """Put a graph of the layer's preprocessing in Megatron's place for it."""
    from megatron.core.transformer import cuda_graphs

    held = sample.detach().clone()
    cuda_graphs._set_capture_start()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # whatever the first call allocates or compiles
        layer._te_cuda_graph_capture(held)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = layer._te_cuda_graph_capture(held)
    cuda_graphs._set_capture_end()

    def replay(hidden_states: torch.Tensor) -> tuple[torch.Tensor, ...]:
        held.copy_(hidden_states.detach())
        graph.replay()
        return tuple(output.detach() for output in outputs)

    layer.cuda_graphs = [replay]
    layer._get_te_cuda_graph_replay_args = lambda *args, **kwargs: (args, kwargs)  # Megatron's imports the package
