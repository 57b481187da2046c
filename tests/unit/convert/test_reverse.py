"""config.json from a run's arguments: what the table of the made one says is what the run had, or it is refused."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_smartmoe.convert.arguments import arguments_of
from megatron_smartmoe.convert.families import table_of
from megatron_smartmoe.convert.optimizer_groups import rearranged
from megatron_smartmoe.convert.reverse import table_of_checkpoint
from megatron_smartmoe.errors import ConfigError
from tests.unit.convert.test_families import OF_FAMILY, config


def arguments(family: str, **changes: Any) -> dict[str, Any]:
    table = table_of(config(family))
    return {**arguments_of(table.flags, dtype="float32", seq_length=64), **changes}


@pytest.mark.parametrize("family", [family for family in OF_FAMILY if not family.startswith("deepseek")])
def test_the_family_is_found_again(family: str) -> None:
    made = table_of_checkpoint(arguments(family), None, 250)
    assert made.family == family
    wanted = table_of(config(family))
    assert made.shapes == wanted.shapes
    assert made.parameters == wanted.parameters


@pytest.mark.parametrize(
    ("name", "value", "flag"),
    [
        ("position_embedding_type", "learned_absolute", "--position-embedding-type"),
        ("moe_router_pre_softmax", True, "--moe-router-pre-softmax"),
        ("moe_router_topk_scaling_factor", 2.0, "--moe-router-topk-scaling-factor"),
        ("moe_router_score_function", "sigmoid", "--moe-router-score-function"),
        ("normalization", "LayerNorm", "--normalization"),
        ("add_bias_linear", True, "--disable-bias-linear"),
        ("rotary_percent", 0.5, "--rotary-percent"),
        ("window_size", [128, 0], "--window-size"),
        ("multi_latent_attention", True, "--multi-latent-attention"),
        ("smartmoe_gate", "noisy-top-k", "--smartmoe-gate"),
        ("smartmoe_gate", "moe++", "--smartmoe-gate"),
        ("smartmoe_gate", "topology", "--smartmoe-gate"),
    ],
)
def test_what_no_family_says_is_refused(name: str, value: object, flag: str) -> None:
    with pytest.raises(ConfigError) as raised:
        table_of_checkpoint(arguments("mixtral", **{name: value}), None, 250)
    assert raised.value.field == flag


def test_a_gate_that_only_names_flags_of_megatron_is_exported() -> None:
    assert table_of_checkpoint(arguments("mixtral", smartmoe_gate="naive"), None, 250).family == "mixtral"


GROUPS = [{"wd_mult": 1.0, "step": 3, "is_expert_parallel": False}, {"wd_mult": 0.0, "is_expert_parallel": False}]


@pytest.mark.parametrize("settings", [{"param_groups": GROUPS}, {"optimizer": {"param_groups": GROUPS}, "kind": "x"}])
def test_optimizer_settings_of_experts(settings: dict[str, Any]) -> None:
    two = rearranged(settings, expert_ranks=4, expert_biases=False)
    inner = two[1].get("optimizer", two[1])
    assert two[0] == settings
    assert inner["param_groups"] == [{"wd_mult": 1.0, "step": 3, "is_expert_parallel": True}]
    assert rearranged(two, expert_ranks=1, expert_biases=False) == settings
    assert rearranged(two, expert_ranks=2, expert_biases=False) is two
    assert len(rearranged(settings, expert_ranks=4, expert_biases=True)[1].get("optimizer", two[1])["param_groups"])
    with pytest.raises(ValueError, match="without param_groups"):
        rearranged({"a": 1}, expert_ranks=2, expert_biases=False)
