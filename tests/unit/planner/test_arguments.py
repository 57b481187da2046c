"""The model that Megatron's arguments describe. tests/megatron/test_parallel_auto.py has the real parser's."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_smartmoe.errors import ConfigError
from megatron_smartmoe.planner.arguments import check_plannable, model_from_arguments, parallel_from_arguments
from megatron_smartmoe.planner.flags import parallel_from_flags
from tests.support.arguments import DEFAULTS, LAUNCH, SIZES, VALUES


def test_megatrons_defaults() -> None:
    model = model_from_arguments(VALUES, "mine")
    assert (model.name, model.layers, model.hidden, model.global_batch) == ("mine", 4, 96, 16)
    assert (model.ffn, model.moe.ffn, model.gated, model.bias, model.tied) == (384, 384, False, True, True)
    assert (model.norm, model.position, model.query_groups, model.head_dim) == ("LayerNorm", "learned_absolute", 4, 24)
    assert (model.moe.experts, model.moe.top_k, model.moe.every, model.moe.first_dense) == (8, 2, 1, 0)


def test_a_gate_makes_the_default_inner_size_smaller() -> None:
    assert model_from_arguments({**VALUES, "swiglu": True}).ffn == 256


@pytest.mark.parametrize(
    ("freq", "first_dense", "every"),
    [
        (1, 0, 1),
        (2, 0, 2),
        ("([0]*1+[1]*3)", 1, 1),
        ("([1,0]*2)", 0, 2),
        ("([0,1,1,1])", 1, 1),
        ([0, 0, 0, 1], 3, 1),
        ([0, 1, 0, 1], 1, 2),
    ],
)
def test_where_the_experts_are(freq: Any, first_dense: int, every: int) -> None:
    model = model_from_arguments({**VALUES, "moe_layer_freq": freq})
    pattern = [model.has_experts(layer) for layer in range(4)]
    assert model.moe.first_dense == first_dense
    assert pattern == [at >= first_dense and (at - first_dense) % every == 0 for at in range(4)]


@pytest.mark.parametrize("freq", ["([1]*1+[0]*1+[1]*2)", "([0]*4)", "range(4)", "([1]*3)"])
def test_other_patterns_are_refused(freq: str) -> None:
    with pytest.raises(ConfigError, match="is not supported with --parallel auto, which plans dense layers first"):
        check_plannable({**VALUES, "moe_layer_freq": freq})


def test_several_balancing_losses_count_as_the_first() -> None:
    values = {"moe_router_load_balancing_type": ["seq_aux_loss", "aux_loss"], "moe_aux_loss_coeff": [0.001, 0.01]}
    moe = model_from_arguments({**VALUES, **values}).moe
    assert (moe.balancing, moe.aux_loss_coeff) == ("seq_aux_loss", 0.01)


@pytest.mark.parametrize("missing", SIZES)
def test_every_size_is_needed(missing: str) -> None:
    flag = "--" + missing.replace("_", "-")
    with pytest.raises(ConfigError, match=f"{flag} = None: is required by --parallel auto. Pass {flag}, or a --config"):
        check_plannable({**VALUES, missing: None})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("use_megatron_fsdp", True),
        ("hybrid_layer_pattern", "M*M*"),
        ("rampup_batch_size", ["4", "4", "64"]),
        ("mtp_use_repeated_layer", True),
        ("fp8", "hybrid"),
        ("use_precision_aware_optimizer", True),
        ("optimizer", "muon"),
        ("moe_token_dispatcher_type", "flex"),
        ("moe_pad_expert_input_to_capacity", True),
    ],
)
def test_what_has_no_price_is_refused(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match="is not supported with --parallel auto: "):
        check_plannable({**VALUES, name: value})


def test_a_checkpoints_shape_is_not_known_yet() -> None:
    with pytest.raises(
        ConfigError, match="--use-checkpoint-args = True: is not supported with --parallel auto: the model's shape"
    ):
        check_plannable({**DEFAULTS, **dict.fromkeys(SIZES), "use_checkpoint_args": True})


# --- describing a run, which is more than what can be planned


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("rampup_batch_size", ["4", "4", "64"]),
        ("moe_latent_size", 32),
        ("use_megatron_fsdp", True),
        ("use_checkpoint_args", True),
    ],
)
def test_a_run_that_cannot_be_planned_is_described_all_the_same(name: str, value: Any) -> None:
    """Training prices its pool and its overlap degree with the description."""
    assert model_from_arguments({**VALUES, name: value}) == model_from_arguments(VALUES)


@pytest.mark.parametrize(
    ("freq", "layers_with_experts"), [([1, 0, 1, 1], 2), ([0, 1, 1, 0], 3), ([0, 0, 0, 0], 4), ([1, 0, 0, 0], 1)]
)
def test_an_irregular_pattern_is_described_by_the_nearest_regular_one(
    freq: list[int], layers_with_experts: int
) -> None:
    assert model_from_arguments({**VALUES, "moe_layer_freq": freq}).num_moe_layers == layers_with_experts


@pytest.mark.parametrize(
    ("values", "flags"),
    [
        ({}, ""),
        (
            {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2, "micro_batch_size": 4},
            "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 --micro-batch-size 4",
        ),
        (
            {"pipeline_model_parallel_size": 2, "num_layers_per_virtual_pipeline_stage": 1},
            "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1",
        ),
        (
            {"pipeline_model_parallel_size": 2, "pipeline_model_parallel_layout": "Ett|tt|t|L"},
            "--pipeline-model-parallel-size 2 --pipeline-model-parallel-layout Ett|tt|t|L",
        ),
        (
            {"smartmoe": True, "expert_model_parallel_size": 4, "smartmoe_spare_slots": 1},
            "--smartmoe --expert-model-parallel-size 4 --smartmoe-spare-slots 1",
        ),
        (
            {"smartmoe": True, "smartmoe_homes": "off", "smartmoe_overlap_degree": "auto"},
            "--smartmoe --smartmoe-homes off --smartmoe-overlap-degree auto",
        ),
        ({"smartmoe": True, "smartmoe_dispatch": "hierarchical"}, "--smartmoe --smartmoe-dispatch hierarchical"),
        ({"bf16": True}, "--bf16"),
        ({"bf16": True, "grad_reduce_in_bf16": True}, "--bf16 --grad-reduce-in-bf16"),
        ({"fp16": True}, "--fp16"),
        ({"recompute_granularity": "selective", "recompute_modules": ["moe"]}, "--recompute-granularity selective "
         "--recompute-modules moe"),
        ({"transformer_impl": "local", "use_distributed_optimizer": True}, "--transformer-impl local "
         "--use-distributed-optimizer"),
    ],
)  # fmt: skip
def test_arguments_and_flags_describe_the_same_launch(values: dict[str, Any], flags: str) -> None:
    model = model_from_arguments(VALUES)
    assert parallel_from_arguments({**VALUES, **LAUNCH, **values}, model, 8) == parallel_from_flags(
        flags.split(), model, 8
    )


def test_fp16_reduces_gradients_in_fp16_unless_told_otherwise() -> None:
    model = model_from_arguments(VALUES)
    assert not parallel_from_flags(["--fp16"], model, 8).grad_reduce_in_fp32
    assert parallel_from_flags(["--fp16", "--accumulate-allreduce-grads-in-fp32"], model, 8).grad_reduce_in_fp32
