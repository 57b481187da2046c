"""Rows and weights in one exchange, and home rows and spare rows that are never joined: the bits of doing it apart."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest

from scripts.training_bench.one_layer import smart_layer
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.dist

RANKS, EXPERTS, TOKENS, HIDDEN = 4, 16, 40, 24  # in fp32 a row is 96 bytes, and 112 with its weight
CASES: dict[str, dict[str, Any]] = {  # replicas, chunks, and options of the layer's configuration
    "homes": {},
    "homes, bf16": {"params_dtype": "bfloat16", "bf16": True},
    "replicas, bf16": {"replicas": True, "params_dtype": "bfloat16", "bf16": True},
    "replicas, probabilities on the input": {
        "replicas": True,
        "moe_apply_probs_on_input": True,
        "moe_router_topk": 1,
        "moe_router_pre_softmax": True,
    },
    "2 chunks": {"degree": 2},
    "replicas, 2 chunks": {"replicas": True, "degree": 2},
}
APART = {"3 chunks": {"degree": 3}}  # a chunk with one source is not sorted: packing its gradients would copy them


def _layer(replicas: bool = False, **options: Any) -> Any:
    import torch
    from megatron.core import parallel_state

    from megatron_smartmoe.runtime.replicas.dispatch_plan import ExactOptions
    from megatron_smartmoe.runtime.replicas.slots import SpareSlots
    from megatron_smartmoe.runtime.replicas.wire import ReplicaWire

    dtype = getattr(torch, options.pop("params_dtype", "float32"))
    options = {"moe_router_topk": 4, "params_dtype": dtype} | options
    layer = smart_layer(ranks=RANKS, experts=EXPERTS, hidden=HIDDEN, ffn=32, **options)
    if replicas:
        weights = (layer.experts.weight1, layer.experts.weight2)
        totals = [torch.zeros_like(weight, dtype=torch.float32) for weight in weights]
        wire = ReplicaWire(parallel_state.get_expert_model_parallel_group())
        spare = SpareSlots(weights, 1, wire, lambda: totals, keeps=False)
        layer.add_replicas(spare, exact=ExactOptions(used_slots=1, limit=1.0))
    return layer


def _pass(layer: Any) -> tuple[list[Any], dict[str, int]]:
    """The layer's output and all gradients; and how often what was called."""
    import torch
    import torch.distributed as dist

    calls = dict.fromkeys(("all_to_all_single", "cat"), 0)

    def counted(module: Any, name: str) -> Any:
        function = getattr(module, name)

        def count(*args: Any, **kwargs: Any) -> Any:
            calls[name] += 1
            return function(*args, **kwargs)

        return mock.patch.object(module, name, count)

    generator = torch.Generator().manual_seed(dist.get_rank())
    inputs = torch.randn(TOKENS, 1, HIDDEN, generator=generator).to(layer.config.params_dtype).requires_grad_()
    with counted(dist, "all_to_all_single"), counted(torch, "cat"):
        output = layer(inputs)[0]
        output.backward(torch.randn(output.shape, generator=generator).to(output.dtype))
    totals = []
    if layer.experts.spare_slots is not None:
        layer.experts.spare_slots.finish_returns()
        totals = list(layer.experts.spare_slots._totals())
        assert layer.planner.slots_RS[:, EXPERTS // RANKS :].max() >= 0, "no replica was made"
    gradients = [parameter.grad for parameter in layer.parameters()]
    assert inputs.grad is not None
    return [output.detach(), inputs.grad, *gradients, *totals], calls


def _check() -> dict[str, tuple[bool, dict[str, int], dict[str, int]]]:
    """By case: whether both ways have the same bits; calls of each, with packed rows first."""
    import torch
    import torch.distributed as dist
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    from megatron_smartmoe.adapter import cpu
    from megatron_smartmoe.adapter.moe.dispatcher import SlotDispatcher

    cpu.install()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    parallel_state.initialize_model_parallel(expert_model_parallel_size=RANKS)
    model_parallel_cuda_manual_seed(1)
    found = {}
    for case, options in (CASES | APART).items():
        layers = [_layer(**options) for _ in range(2)]
        for name, parameter in layers[1].named_parameters():
            parameter.data.copy_(layers[0].get_parameter(name).data)
        together, calls = _pass(layers[0])
        with mock.patch.object(SlotDispatcher, "packs", False):
            apart, calls_apart = _pass(layers[1])
        equal = all(
            torch.equal(one.view(torch.uint8), other.view(torch.uint8))
            for one, other in zip(together, apart, strict=True)
        )
        found[case] = equal, calls, calls_apart
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    return run_ranks(_check, RANKS, log_dir=tmp_path_factory.mktemp("packed"), timeout_s=120)


@pytest.mark.parametrize("case", CASES)
def test_one_exchange_has_the_bits_of_two(found: list[Any], case: str) -> None:
    exchanges = 2 * CASES[case].get("degree", 1)  # dispatch and combine
    for equal, calls, calls_apart in (rank[case] for rank in found):
        assert equal
        assert calls["all_to_all_single"] == 2 * exchanges
        assert calls_apart["all_to_all_single"] == 3 * exchanges


@pytest.mark.parametrize("case", APART)
def test_chunks_that_are_not_sorted_are_not_packed(found: list[Any], case: str) -> None:
    for equal, calls, calls_apart in (rank[case] for rank in found):
        assert equal
        assert calls == calls_apart


def test_home_rows_and_spare_rows_are_not_joined(found: list[Any]) -> None:
    for _, calls, calls_apart in (rank["replicas, bf16"] for rank in found):
        assert calls["cat"] == calls_apart["cat"] - 1  # by name; the backward pass's are counted on meta tensors
