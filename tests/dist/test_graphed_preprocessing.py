"""CUDA graphs of the MoE preprocessing: captured and replayed by Megatron's own code, with a stand-in for the graph.

The stand-in (`tests.support.graph_capture`) refuses what a capture refuses, and a replay whose operators, sizes,
numbers or addresses are not those of the capture: other tokens, homes that have moved, other replicas.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.graphed_layers import Case
from tests.support.ranks import run_ranks
from tests.unit.ops.test_placement import needs_library

pytestmark = [pytest.mark.dist, pytest.mark.fast]

RANKS = 2
ALLGATHER = {"moe_token_dispatcher_type": "allgather"}
PADDED = {"moe_expert_capacity_factor": 1.0, "moe_pad_expert_input_to_capacity": True}
SHARED = {"moe_shared_expert_intermediate_size": 16}


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


def _rank() -> dict[str, Any]:
    import torch

    from megatron_smartmoe.adapter import cpu
    from tests.support.graph_capture import Captured
    from tests.support.graphed_layers import compare, join

    cpu.install()
    join("gloo", RANKS)
    return {name: compare(case, Captured, torch.device("cpu")) for name, case in CASES.items()}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    log_dir: Path = tmp_path_factory.mktemp("graphs")
    return run_ranks(_rank, RANKS, log_dir=log_dir, timeout_s=120)


@needs_library
@pytest.mark.parametrize("name", CASES)
def test_a_replay_computes_what_the_layer_does(found: list[dict[str, Any]], name: str) -> None:
    for of_rank in found:
        assert of_rank[name] == {"differs": [], "has replicas": CASES[name].replicas is not None}


@needs_library
def test_the_stand_in_refuses_a_host_that_plans_within_the_graph(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="Refused: plan_dispatch: has no CUDA kernel"):
        run_ranks(_planning_within, 1, log_dir=tmp_path, timeout_s=60)


def _planning_within() -> None:
    from unittest import mock

    import torch

    from megatron_smartmoe.adapter import cpu
    from megatron_smartmoe.adapter.moe.replica_dispatcher import ReplicaDispatcher
    from tests.support.graph_capture import Captured
    from tests.support.graphed_layers import MODULES, build, join

    cpu.install()
    join("gloo", 1)
    graphs = {"cuda_graph_impl": "transformer_engine", "cuda_graph_modules": MODULES}
    layer = build(Case(replicas="exact"), torch.device("cpu"), **graphs)
    with mock.patch.object(ReplicaDispatcher, "is_graphed", False):
        Captured(layer, torch.randn(4, 1, 32))
