"""CUDA graphs of the MoE preprocessing: captured and replayed by Megatron's own code, with a stand-in for the graph.

The stand-in (`tests.support.graph_capture`) refuses what a capture refuses, and a replay whose operators, sizes,
numbers or addresses are not those of the capture: other tokens, homes that have moved, other replicas.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.support.ranks import run_ranks
from tests.unit.ops.test_placement import needs_library

pytestmark = [pytest.mark.dist, pytest.mark.fast]

RANKS, EXPERTS, HIDDEN, TOKENS = 2, 8, 32, 48
MODULES = ["moe_router", "moe_preprocess"]
ALLGATHER = {"moe_token_dispatcher_type": "allgather"}
PADDED = {"moe_expert_capacity_factor": 1.0, "moe_pad_expert_input_to_capacity": True}
SHARED = {"moe_shared_expert_intermediate_size": 16}


@dataclass(frozen=True, kw_only=True)
class Case:
    """A layer.

    Attributes:
        replicas: None, or how replicas are planned: device, exact (on the host) or history.
        degree: chunks of each all-to-all.
        options: of Megatron's TransformerConfig.
    """

    replicas: str | None = None
    degree: int = 1
    options: dict[str, Any] = field(default_factory=dict)


CASES = {
    "homes": Case(options=SHARED),
    "homes, 2 chunks": Case(degree=2),
    "homes, allgather": Case(options=ALLGATHER),
    "homes, padded": Case(options=PADDED),
    "device": Case(replicas="device", options=SHARED),
    "device, 2 chunks": Case(replicas="device", degree=2),
    "device, allgather": Case(replicas="device", options=ALLGATHER),
    "device, padded": Case(replicas="device", options=PADDED),
    "exact": Case(replicas="exact", options=SHARED),
    "history": Case(replicas="history"),
    "history, allgather": Case(replicas="history", options=ALLGATHER),
    "history, padded": Case(replicas="history", options=PADDED),
}


def _layer(case: Case, **options: Any) -> Any:
    import torch

    from megatron_smartmoe.runtime.replicas.dispatch_plan import ExactOptions
    from tests.support import meta_layer

    sizes: dict[str, Any] = {
        "hidden_size": HIDDEN,
        "num_moe_experts": EXPERTS,
        "moe_router_topk": 2,
        "moe_ffn_hidden_size": 16,
        "expert_model_parallel_size": RANKS,
        "params_dtype": torch.float32,
        "bf16": False,
        "pipeline_dtype": torch.float32,
        "perform_initialization": True,
    }
    of_meta = meta_layer.Case(attention=True, degree=case.degree, options=sizes | case.options | options)
    layer, _ = meta_layer.build(of_meta, torch.device("cpu"))
    if case.replicas is not None:
        exact = None if case.replicas == "history" else ExactOptions(used_slots=1, limit=1.0)
        meta_layer.with_replicas(layer.mlp, exact=exact, on_device=case.replicas == "device")
    return layer


def _use_history(layer: Any, experts: tuple[int, int]) -> None:
    """Replicas of these experts, the home of each on the other rank, on rank 0 and 1, as a plan from history has it."""
    planner = layer.mlp.planner
    slots_RS = planner._homes_RS.copy()
    slots_RS[:, -1] = experts
    planner.slots_RS = slots_RS
    planner._spare.use(slots_RS, num_passes=1)


def _replay(case: Case) -> dict[str, Any]:
    """What a layer in a graph and the same one without compute, in each of four micro-batches."""
    import torch
    import torch.distributed as dist

    from megatron_smartmoe.adapter.moe.routers import count_tokens
    from megatron_smartmoe.runtime.counts import ExpertCounts
    from tests.support.graph_capture import Captured

    plain, graphed = _layer(case), _layer(case, cuda_graph_impl="transformer_engine", cuda_graph_modules=MODULES)
    graphed.load_state_dict(plain.state_dict(), strict=False)
    for name, parameter in plain.named_parameters():
        graphed.get_parameter(name).data.copy_(parameter.data)
    layers = {"plain": plain, "graphed": graphed}
    counts = {name: ExpertCounts(num_layers=1, num_experts=EXPERTS, device=torch.device("cpu")) for name in layers}
    for name, layer in layers.items():
        count_tokens([(0, layer.mlp)], counts[name])
        if case.replicas == "history":
            _use_history(layer, (4, 0))
    generator = torch.Generator().manual_seed(dist.get_rank())
    micro_batches = [torch.randn(TOKENS, 1, HIDDEN, generator=generator) for _ in range(4)]
    eager = graphed(micro_batches[0], attention_mask=None)[0]  # Megatron warms up before it captures
    first = plain(micro_batches[0], attention_mask=None)[0]
    same = {"warm-up": torch.equal(eager, first)}
    Captured(graphed, micro_batches[1].requires_grad_())
    for at, rows in enumerate(micro_batches):
        if at == 2:  # between two steps
            for layer in layers.values():
                layer.mlp.set_homes(torch.tensor([5, 1, 2, 0, 4, 3, 7, 6]))
                if case.replicas == "history":
                    _use_history(layer, (6, 1))
        found = {}
        for name, layer in layers.items():
            inputs = rows.detach().clone().requires_grad_()
            forward = layer if name == "plain" else layer._te_cuda_graph_replay
            output = forward(inputs, attention_mask=None)[0]
            output.square().sum().backward()
            spare = layer.mlp.experts.spare_slots if case.replicas else None
            if spare is not None:
                spare.finish_returns()
            gradients = {key: parameter.grad for key, parameter in layer.named_parameters()}
            found[name] = {"output": output, "input": inputs.grad, **gradients}
            layer.zero_grad(set_to_none=True)
        for key, tensor in found["plain"].items():
            ours = found["graphed"][key]
            same[f"{at}: {key}"] = ours is tensor if tensor is None or ours is None else torch.equal(ours, tensor)
    same["counts"] = torch.equal(counts["graphed"].local_LE, counts["plain"].local_LE)
    has_replicas = case.replicas is not None and graphed.mlp.planner.slots_RS[:, -1].max() >= 0
    return {"differs": [key for key, is_same in same.items() if not is_same], "has replicas": bool(has_replicas)}


def _rank() -> dict[str, Any]:
    import torch.distributed as dist
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    from megatron_smartmoe.adapter import cpu

    cpu.install()
    dist.init_process_group("gloo")
    parallel_state.initialize_model_parallel(expert_model_parallel_size=RANKS)
    model_parallel_cuda_manual_seed(1)
    return {name: _replay(case) for name, case in CASES.items()}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    log_dir: Path = tmp_path_factory.mktemp("graphs")
    return run_ranks(_rank, RANKS, log_dir=log_dir, timeout_s=120)


@needs_library
@pytest.mark.parametrize("name", CASES)
def test_a_replay_computes_what_the_layer_does(found: list[dict[str, Any]], name: str) -> None:
    for of_rank in found:
        assert of_rank[name] == {"differs": [], "has replicas": CASES[name].replicas is not None}
