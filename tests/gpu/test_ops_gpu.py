"""The CUDA kernels against their twins. Nothing here runs without a GPU."""

from __future__ import annotations

import pytest
import torch

from megatron_smartmoe import ops
from megatron_smartmoe.ops import reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: the CUDA kernels cannot run here"),
]

STEP = 2048  # ids that a block takes at a time; 512 blocks at most


def test_the_kernels_are_what_is_tested() -> None:
    way_out = "SMARTMOE_CUDA=1 python megatron_smartmoe/ops/_build.py"
    assert ops.backend() == "compiled (cpu+cuda)", (
        f"the twin would be compared with itself; build the kernels: {way_out}"
    )


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("num_experts", [1, 8, 33, 256, 4096])
@pytest.mark.parametrize("num_ids", [0, 1, 31, 257, STEP - 1, STEP, STEP + 1, 100_000, 512 * STEP + 1, 3_000_000])
def test_histogram_equals_its_twin(num_ids: int, num_experts: int, dtype: torch.dtype) -> None:
    ids = torch.randint(-2, num_experts + 2, (num_ids,), dtype=dtype, device="cuda")
    got = ops.expert_histogram(ids, num_experts)
    assert got.is_cuda
    assert torch.equal(got.cpu(), reference.expert_histogram(ids.cpu(), num_experts))


@pytest.mark.parametrize("hot_share", [0.36, 0.9, 1.0])
def test_histogram_of_skewed_ids(hot_share: float) -> None:
    ids = torch.randint(0, 32, (16384, 8), device="cuda")
    ids[torch.rand(ids.shape, device="cuda") < hot_share] = 5
    assert torch.equal(ops.expert_histogram(ids, 32), reference.expert_histogram(ids, 32))


def test_histogram_of_a_strided_view() -> None:
    ids = torch.randint(-1, 64, (333, 6), device="cuda").t()[::2]
    assert torch.equal(ops.expert_histogram(ids, 64), reference.expert_histogram(ids, 64))


def test_histogram_counts_past_2_to_the_31() -> None:
    num_ids = 2**31 + 5
    if torch.cuda.mem_get_info()[0] < 5 * num_ids:
        pytest.skip("less than 11 GB of free device memory")
    ids = torch.full((num_ids,), 3, dtype=torch.int32, device="cuda")
    ids[0], ids[-1] = 0, -1
    assert ops.expert_histogram(ids, 4).tolist() == [1, 0, 0, num_ids - 2]


def test_histogram_on_a_side_stream_in_a_graph_and_without_waiting() -> None:
    ids = torch.randint(0, 16, (5000, 2), device="cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        assert torch.equal(ops.expert_histogram(ids, 16), reference.expert_histogram(ids, 16))
    torch.cuda.current_stream().wait_stream(side)

    torch.cuda.set_sync_debug_mode("error")
    try:
        ops.expert_histogram(ids, 16)
    finally:
        torch.cuda.set_sync_debug_mode("default")

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        counts = ops.expert_histogram(ids, 16)
    ids.copy_(torch.randint(0, 16, ids.shape, device="cuda"))
    graph.replay()
    assert torch.equal(counts, reference.expert_histogram(ids, 16))


def test_histogram_on_the_second_device() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one CUDA device only")
    ids = torch.randint(0, 16, (5000, 2), device="cuda:1")
    got = ops.expert_histogram(ids, 16)
    assert got.device == ids.device
    assert torch.cuda.current_device() == 0
    assert torch.equal(got, reference.expert_histogram(ids, 16))


def test_histogram_errors_are_those_of_the_cpu() -> None:
    text = r"^ids\.dtype = float32: it must be int32 or int64\. Convert it with ids\.long\(\)$"
    with pytest.raises(RuntimeError, match=text):
        ops.expert_histogram(torch.zeros(2, device="cuda"), 4)


def test_opcheck() -> None:
    ids = torch.randint(-1, 9, (13, 4), device="cuda")
    torch.library.opcheck(torch.ops.smartmoe.expert_histogram.default, (ids, 8))
