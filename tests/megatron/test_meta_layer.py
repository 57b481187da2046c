"""What a GPU runs, without one: the layers forward and backward on meta tensors (`tests.support.meta_layer`).

One rank runs every case; the tests below judge what it found.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.meta_layer import HIDDEN, Case, Found, run
from tests.support.ranks import run_ranks
from tests.unit.ops.test_placement import needs_library

pytestmark = [pytest.mark.dist, pytest.mark.fast]

MLA = {
    "multi_latent_attention": True,
    "q_lora_rank": 64,
    "kv_lora_rank": 64,
    "qk_head_dim": 32,
    "qk_pos_emb_head_dim": 16,
    "v_head_dim": 32,
}
BIASES: dict[str, Any] = {"add_bias_linear": True, "moe_mlp_glu_interleave_size": 16}
GRAPHS = {"cuda_graph_impl": "transformer_engine", "cuda_graph_modules": ["moe_router", "moe_preprocess"]}
SHARED: dict[str, Any] = {"moe_shared_expert_intermediate_size": 128}
CASES = {
    "homes": Case(),
    "fused SwiGLU": Case(options={"bias_activation_fusion": True}),
    "float32 sums": Case(accumulates=True),
    "capacity": Case(options={"moe_expert_capacity_factor": 1.0}),
    "shared experts": Case(options=SHARED),
    "overlapped shared experts": Case(options=SHARED | {"moe_shared_expert_overlap": True}),
    "biases": Case(options=BIASES),
    "biases, replicas": Case(replicas=True, options=BIASES),
    "padded": Case(options={"moe_expert_capacity_factor": 1.0, "moe_pad_expert_input_to_capacity": True}),
    "4 chunks": Case(degree=4),
    "replicas": Case(replicas=True),
    "replicas planned on the device": Case(replicas=True, on_device=True),
    "replicas, 4 chunks": Case(replicas=True, degree=4),
    "graphed": Case(graphed=True, options=GRAPHS),
    "graphed, replicas": Case(graphed=True, replicas=True, options=GRAPHS),
    "graphed, replicas planned on the device": Case(graphed=True, replicas=True, on_device=True, options=GRAPHS),
    "graphed, allgather, replicas planned on the device": Case(
        graphed=True, replicas=True, on_device=True, options=GRAPHS | {"moe_token_dispatcher_type": "allgather"}
    ),
    "transformer layer": Case(attention=True),
    "transformer layer, MLA": Case(attention=True, options=MLA),
    "transformer layer, MLA, replicas": Case(attention=True, replicas=True, options=MLA),
}
NAMES_OF_GRAPHS = [name for name, case in CASES.items() if case.graphed]
NAMES = [pytest.param(name, marks=needs_library) if case.on_device else name for name, case in CASES.items()]
# The most kernels that a layer may launch, forward and backward: lower a number when the layer launches fewer. Those on
# empty tensors count too; collectives and messages do not.
LAUNCHES = {
    "homes": (32, 30),
    "fused SwiGLU": (28, 22),
    "float32 sums": (32, 30),
    "capacity": (39, 31),
    "shared experts": (38, 39),
    "overlapped shared experts": (37, 39),
    "biases": (44, 49),
    "biases, replicas": (71, 90),
    "padded": (42, 35),
    "4 chunks": (70, 86),
    "replicas": (47, 49),
    "replicas planned on the device": (114, 49),
    "replicas, 4 chunks": (108, 150),
    "graphed": (21, 0),
    "graphed, replicas": (14, 0),
    "graphed, replicas planned on the device": (92, 0),
    "graphed, allgather, replicas planned on the device": (98, 0),
    "transformer layer": (69, 80),
    "transformer layer, MLA": (114, 111),
    "transformer layer, MLA, replicas": (129, 130),
}
# Host waits for the device, by the function that waits: one a layer, as in Megatron's own dropless dispatch.
WAITS = {
    "homes": {"_maybe_dtoh_and_synchronize": 1},
    "replicas": {"to_host": 1},
    "replicas planned on the device": {"read": 1},
    "padded": {},  # as where a CUDA graph holds the whole layer
    **{name: {} for name, case in CASES.items() if case.graphed},
}


def _hidden_wait(rows: Any) -> Any:
    rows.sum().item()
    return rows


def _left_on_the_cpu(rows: Any) -> Any:
    import torch

    return rows * torch.ones(HIDDEN)


def _in_another_type(rows: Any) -> Any:
    return rows.float()


FAULTS = {"a hidden wait": _hidden_wait, "left on the CPU": _left_on_the_cpu, "another type": _in_another_type}


def _run() -> dict[str, Found]:
    return run(CASES, FAULTS)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Found]:
    log_dir: Path = tmp_path_factory.mktemp("meta")
    return run_ranks(_run, 1, log_dir=log_dir, timeout_s=120)[0]  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", NAMES)
def test_forward_and_backward(found: dict[str, Found], name: str) -> None:
    assert found[name].error == ""


@pytest.mark.parametrize("name", NAMES)
def test_the_host_waits_once(found: dict[str, Found], name: str) -> None:
    kind = name if name in WAITS else "replicas" if CASES[name].replicas else "homes"
    assert dict(found[name].waits) == WAITS[kind]


@pytest.mark.parametrize("name", NAMES)
def test_launches(found: dict[str, Found], name: str) -> None:
    counted = sum(found[name].forward.values()), sum(found[name].backward.values())
    for direction, launches, bound in zip(("forward", "backward"), counted, LAUNCHES[name], strict=True):
        operators = getattr(found[name], direction)
        assert launches <= bound, f"{direction}: {launches} launches, {bound} were enough: {operators.most_common()}"


@pytest.mark.parametrize("name", NAMES)
def test_rows_and_weights_are_one_exchange(found: dict[str, Found], name: str) -> None:
    """A dispatch and a combine, forward and backward, of every chunk; Megatron's own sends weights apart."""
    exchanges = 0 if CASES[name].graphed else 6 if name == "padded" else 4
    assert found[name].posted["all_to_all_single"] == exchanges * CASES[name].degree


@pytest.mark.parametrize("name", ["padded", *NAMES_OF_GRAPHS])
def test_a_graph_holds_no_copy_from_the_host(found: dict[str, Found], name: str) -> None:
    assert not +found[name].sent
    assert +found["replicas"].sent


def test_rows_of_home_and_spare_slots_are_not_joined(found: dict[str, Found]) -> None:
    """No `cat` forward, and in the backward pass no more of them than the layer's two activations have."""
    cats = found["replicas"].forward["cat"], found["replicas"].backward["cat"]
    assert cats == (0, 2 * found["homes"].backward["cat"])


def test_replicas_are_fetched_and_their_gradients_returned(found: dict[str, Found]) -> None:
    for name in ("replicas", "replicas, 4 chunks"):
        assert min(found[name].posted[kind] for kind in ("isend", "irecv")) > 0  # a rank that relays sends more
    assert found["homes"].posted["isend"] == 0


def test_gradients_are_added_to_float32_sums(found: dict[str, Found]) -> None:
    assert found["float32 sums"].backward["add_weight_gradient"] == 2
    assert found["homes"].backward["_grouped_mm"] - found["float32 sums"].backward["_grouped_mm"] == 2


def test_faults_are_found(found: dict[str, Found]) -> None:
    assert sum(found["a hidden wait"].waits.values()) == 2
    assert "a tensor on the CPU meets tensors on the device" in found["left on the CPU"].error
    assert found["another type"].error.startswith("RuntimeError")
