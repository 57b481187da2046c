"""A run has one description and one price, for the planner as for the overlap degree and the pool of a run."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_smartmoe.adapter.cost_inputs import (
    expert_shape,
    homes_options,
    launch_of_run,
    machine_of_job,
    model_of_run,
    online_options,
    routing_groups_line,
    scope_nodes,
    sends_fp8,
    state_bytes,
)
from megatron_smartmoe.adapter.moe.overlap_degree import predicted_seconds
from megatron_smartmoe.cost.step.constants import StepConstants, layer_constants
from megatron_smartmoe.cost.step.constants import expert_shape as planned_expert
from megatron_smartmoe.planner.arguments import model_from_arguments
from megatron_smartmoe.planner.flags import megatron_flags, parallel_from_flags
from megatron_smartmoe.planner.load import LoadModel, Scenario
from megatron_smartmoe.planner.pricing import Pricing
from megatron_smartmoe.spec.cluster import load_cluster_spec
from tests.support.arguments import LAUNCH, VALUES

CLUSTERS = Path(__file__).parents[3] / "configs" / "clusters"
# Heads of another size than hidden / heads, grouped queries, shared experts, a vocabulary.
SHAPE = {
    "num_layers": 4,
    "hidden_size": 2048,
    "num_attention_heads": 16,
    "kv_channels": 192,
    "group_query_attention": True,
    "num_query_groups": 4,
    "num_experts": 64,
    "moe_router_topk": 4,
    "moe_ffn_hidden_size": 1408,
    "moe_shared_expert_intermediate_size": 2816,
    "vocab_size": 32000,
    "seq_length": 4096,
    "global_batch_size": 64,
    "swiglu": True,
    "add_bias_linear": False,
}
OPTIMIZER = {
    "fp16": False,
    "optimizer": "adam",
    "optimizer_cpu_offload": False,
    "use_precision_aware_optimizer": False,
    **dict.fromkeys(("main_params_dtype", "exp_avg_dtype", "exp_avg_sq_dtype"), "fp32"),
}
EP8 = {"expert_model_parallel_size": 8, "world_size": 16, "bf16": True, "smartmoe": True}


def arguments(**values: Any) -> Namespace:
    own = {"smartmoe_cluster": None, "smartmoe_experts": "grouped_mm", "overlap_moe_expert_parallel_comm": False}
    return Namespace(**VALUES | LAUNCH | SHAPE | EP8 | own | values)


def test_the_model_of_a_run_is_the_one_that_is_planned() -> None:
    args = arguments()
    model = model_of_run(args)
    assert model == model_from_arguments(vars(args))
    assert (model.head_dim, model.query_groups, model.moe.shared_ffn, model.vocab) == (192, 4, 2816, 32000)


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"tensor_model_parallel_size": 2, "expert_tensor_parallel_size": 1},
        {"grad_reduce_in_bf16": True, "smartmoe_spare_slots": 1},
        {"bf16": False, "transformer_impl": "local"},
    ],
)
def test_the_launch_of_a_run_is_the_one_whose_flags_are_planned(values: dict[str, Any]) -> None:
    args = arguments(**values)
    model, launch = model_of_run(args), launch_of_run(args)
    tokens = [*megatron_flags(model, launch).all, *(["--transformer-impl", "local"] if "bf16" in values else [])]
    assert parallel_from_flags(tokens, model, 16) == launch


@pytest.mark.parametrize("cluster", ["h100-sxm", "cpu"])
def test_the_overlap_degree_has_the_planners_price(cluster: str) -> None:
    args, machine = arguments(micro_batch_size=2), load_cluster_spec(CLUSTERS / f"{cluster}.yaml")
    machine = replace(machine, nodes=2, gpus_per_node=8)
    even = Scenario("even", 1.0, np.full((1, 64), 1 / 64))
    pricing = Pricing(model_of_run(args), machine, LoadModel([even]))
    for degree, seconds in predicted_seconds(args, machine, num_nodes=1).items():
        ((layer,),) = pricing._moe(replace(launch_of_run(args), overlap_degree=degree, homes_interval=0))
        assert seconds == pytest.approx(layer.total_s, rel=1e-3)  # a popularity has 14 bits


@pytest.mark.parametrize(("mode", "grad_bytes"), [("history", 4), ("exact", 2)])
@pytest.mark.parametrize("values", [{}, {"grad_reduce_in_bf16": True}])
def test_a_replica_has_one_price_in_the_plan_and_in_the_run(mode: str, grad_bytes: int, values: dict[str, Any]) -> None:
    """Sums of an iteration travel in fp32, the gradient of one micro-batch as it is."""
    args = arguments(smartmoe_spare_slots=1, smartmoe_replicas=mode, **values)
    expert = planned_expert(model_of_run(args), launch_of_run(args))
    assert expert == expert_shape(args)
    assert expert.grad_bytes == grad_bytes


def test_exact_replicas_cost_less_than_those_from_history_in_bf16() -> None:
    machine = load_cluster_spec(CLUSTERS / "h100-sxm.yaml")
    args = arguments(smartmoe_spare_slots=1)
    launch, model, constants = launch_of_run(args), model_of_run(args), StepConstants.of(machine)
    copy_s = {
        mode: layer_constants(machine, model, replace(launch, replicas=mode), constants).intra_replica_s
        for mode in ("history", "exact")
    }
    assert copy_s["exact"] == pytest.approx(copy_s["history"] * (2 + 2) / (2 + 4))


@pytest.mark.parametrize(
    "values", [{"moe_latent_size": 512}, {"rampup_batch_size": ["4", "4", "64"]}, {"moe_layer_freq": [1, 0, 1, 1]}]
)
def test_a_run_that_cannot_be_planned_is_priced_all_the_same(values: dict[str, Any]) -> None:
    args = arguments(**values)
    assert model_of_run(args).hidden == values.get("moe_latent_size", 2048)
    seconds = predicted_seconds(args, load_cluster_spec(CLUSTERS / "h100-sxm.yaml"), num_nodes=1)
    assert list(seconds) == [1, 2, 3, 4, 5, 6, 7, 8]


def test_the_machine_has_the_jobs_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    machine = machine_of_job(arguments(smartmoe_cluster=str(CLUSTERS / "h100-sxm.yaml"), world_size=16))
    assert (machine.nodes, machine.gpus_per_node) == (4, 4)


@pytest.mark.parametrize(
    ("values", "each"),
    [
        ({}, 12),
        ({"bf16": False}, 8),  # fp32 weights are their own main weights
        ({"optimizer": "muon"}, 8),
        ({"optimizer": "sgd", "bf16": False}, 4),
        # bf16 moments, and what a bf16 weight lacks of its main weight; as parsed, and as Megatron validates it
        ({"use_precision_aware_optimizer": True, "exp_avg_dtype": "bf16", "exp_avg_sq_dtype": "bf16"}, 6),
        ({"use_precision_aware_optimizer": True, "exp_avg_dtype": torch.uint8, "exp_avg_sq_dtype": torch.float16}, 5),
        ({"use_precision_aware_optimizer": True, "optimizer_cpu_offload": True, "exp_avg_dtype": "bf16"}, 12),
    ],
)
def test_the_state_that_moves_is_the_optimizers(values: dict[str, Any], each: int) -> None:
    args = arguments(**OPTIMIZER | values)
    expert = expert_shape(args, "off")
    assert state_bytes(args) == expert.num_params * (expert.element_bytes + each)


@pytest.fixture
def on_four_nodes(monkeypatch: pytest.MonkeyPatch) -> Namespace:
    """Arguments of a run whose expert-parallel group has 16 ranks on 4 nodes."""
    monkeypatch.setattr("megatron.core.parallel_state.get_expert_model_parallel_world_size", lambda: 16)
    monkeypatch.setattr("megatron.core.num_microbatches_calculator.get_num_microbatches", lambda: 2)
    monkeypatch.setattr("megatron_smartmoe.adapter.cost_inputs.nodes_of_group", lambda ranks: 4)
    return arguments(
        **OPTIMIZER,
        expert_model_parallel_size=16,
        smartmoe_cluster="a100-pcie-40gb",
        smartmoe_spare_slots=1,
        smartmoe_replicas="history",
        smartmoe_replicas_scope="node",
        smartmoe_replicas_margin=1.0,
        smartmoe_homes="on",
        smartmoe_homes_horizon=500,
        smartmoe_homes_margin=2.0,
        smartmoe_homes_interval=100,
        overlap_param_gather=False,
        moe_latent_size=None,
        moe_router_num_groups=None,
        moe_router_group_topk=None,
        moe_token_dispatcher_type="alltoall",
        moe_pad_expert_input_to_capacity=False,
        micro_batch_size=1,
        context_parallel_size=1,
        tensor_model_parallel_size=1,
    )


def test_homes_of_a_run_know_its_nodes(on_four_nodes: Namespace) -> None:
    options = online_options(on_four_nodes, review_records=8)
    assert (options.homes.num_nodes, options.homes.replica_scope_is_node, options.homes.num_groups) == (4, True, 1)
    assert options.homes.node_swap_price is not None
    # An expert's 8.65M weights, 14 bytes each, take 12 ms at 10 GB/s; 32,768 assignments an iteration, some 2 us of
    # products and links each, take 66 ms, and 250 times that is what a mean load is worth.
    assert 5e-4 < options.homes.node_swap_price < 2e-3
    assert options.policy.tolerance == 0.01
    two_hops = Namespace(**vars(on_four_nodes) | {"smartmoe_dispatch": "hierarchical"})
    price = homes_options(two_hops).node_swap_price
    assert price is not None
    assert price > options.homes.node_swap_price  # a swap takes less off the links between nodes
    assert (scope_nodes(on_four_nodes), online_options(on_four_nodes, review_records=8).replica.or_group) == (4, False)
    where_it_pays = Namespace(**vars(on_four_nodes) | {"smartmoe_replicas_scope": "auto"})
    assert homes_options(where_it_pays) == homes_options(on_four_nodes)
    replica = online_options(where_it_pays, review_records=8).replica
    assert (replica.num_nodes, replica.or_group) == (4, True)
    anywhere = Namespace(**vars(on_four_nodes) | {"smartmoe_replicas_scope": "group"})
    assert (homes_options(anywhere).num_nodes, homes_options(anywhere).replica_scope_is_node) == (4, False)


def test_replicas_may_stay_in_the_domains_of_a_level(on_four_nodes: Namespace, tmp_path: Path) -> None:
    link = "bandwidth_bytes_s: {value: 6e9, source: x}, latency_s: {value: 1e-5, source: x}"
    level = f"levels: [{{name: leaf, nodes: 2, {link}}}]"
    path = tmp_path / "levels.yaml"
    path.write_text((CLUSTERS / "a100-pcie-40gb.yaml").read_text() + level)
    args = Namespace(**vars(on_four_nodes) | {"smartmoe_cluster": str(path), "smartmoe_replicas_scope": "leaf"})
    assert scope_nodes(args) == 2
    assert homes_options(args).num_nodes == 2
    # Homes that move may have to leave their leaf, at half of the speed between nodes.
    slow, fast = (online_options(one, review_records=8).migration_bytes_s for one in (args, on_four_nodes))
    assert slow == pytest.approx(fast * 6 / 12.5)


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({}, "(2 of 8 groups a token, 4 nodes): homes move between nodes by whole groups"),
        ({"moe_router_num_groups": 2}, "(2 of 2 groups a token, 4 nodes): homes stay on the nodes of their group"),
        ({"moe_router_num_groups": 6}, "groups do not lie whole on nodes, so homes move without regard to them"),
        ({"smartmoe_homes": "shuffle"}, "--smartmoe-homes shuffle takes groups apart, and tokens go to more nodes"),
        ({"smartmoe_replicas_scope": "group"}, "--smartmoe-replicas-scope group puts replicas on other nodes than"),
        ({"smartmoe_replicas_scope": "auto"}, "--smartmoe-replicas-scope auto may put replicas on other nodes than"),
        ({"moe_router_group_topk": None}, None),
    ],
)
def test_what_group_limited_routing_means_for_homes(
    on_four_nodes: Namespace, values: dict[str, Any], line: str | None
) -> None:
    groups = {"moe_router_num_groups": 8, "moe_router_group_topk": 2}
    found = routing_groups_line(Namespace(**vars(on_four_nodes) | groups | values))
    assert found is None if line is None else line in str(found)


BLOCKWISE = {
    "smartmoe_experts": "transformer_engine",
    "fp8": "e4m3",
    "fp8_recipe": "blockwise",
    "first_last_layers_bf16": False,
    "fp8_quantizer_factory": None,
    "te_precision_config_file": None,
}


def test_replicas_get_fp8_where_every_expert_is_quantized_by_powers_of_two(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NVTE_FP8_BLOCK_SCALING_FP32_SCALES", "NVTE_BACKWARD_OVERRIDE"):
        monkeypatch.delenv(name, raising=False)
    blockwise = arguments(**BLOCKWISE)
    assert sends_fp8(blockwise)
    assert expert_shape(blockwise).sent_weight_bytes < expert_shape(arguments()).sent_weight_bytes * 0.51
    for name, value in (
        ("smartmoe_experts", "grouped_mm"),
        ("fp8", None),
        ("fp8_recipe", "mxfp8"),
        ("fp8_recipe", "tensorwise"),
        ("bf16", False),
        ("first_last_layers_bf16", True),
        ("te_precision_config_file", "layers.yaml"),
    ):
        assert not sends_fp8(arguments(**BLOCKWISE | {name: value})), name
    monkeypatch.setenv("NVTE_FP8_BLOCK_SCALING_FP32_SCALES", "1")
    assert not sends_fp8(blockwise)
