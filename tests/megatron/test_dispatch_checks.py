"""`--smartmoe-dispatch`: what is refused, with its whole text, and what `auto` chooses."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_smartmoe.adapter.moe.dispatch_nodes import explain, pays_off, predicted_seconds
from megatron_smartmoe.spec.cluster import load_cluster_spec
from tests.megatron.test_overlap_checks import OPTIONS
from tests.support.checks import Case, said_of

EP4 = "--expert-model-parallel-size 4"
TWO_HOPS = f"--smartmoe {EP4} --smartmoe-dispatch hierarchical"
NOT_WITH = "is not supported with --smartmoe-dispatch hierarchical"
CASES = {
    "all well": Case(flags=TWO_HOPS, ranks=4, verdict=True),
    "with replicas": Case(flags=f"{TWO_HOPS} --smartmoe-spare-slots 1", ranks=4),
    "flat on one rank": Case(flags="--smartmoe-dispatch flat"),
    "without --smartmoe": Case(
        flags=f"{EP4} --smartmoe-dispatch auto",
        ranks=4,
        says="--smartmoe-dispatch = 'auto': needs --smartmoe. Add --smartmoe, or remove it.",
    ),
    "without expert parallelism": Case(
        flags="--smartmoe --smartmoe-dispatch hierarchical",
        says="--smartmoe-dispatch = 'hierarchical': needs expert parallelism: on one rank there is nothing to balance "
        "or to overlap. Pass --expert-model-parallel-size 2, for example, or remove it.",
    ),
    "on two nodes": Case(flags=TWO_HOPS, ranks=4, per_node=2),
    "on one node": Case(
        flags=TWO_HOPS,
        ranks=4,
        per_node=4,
        says="--smartmoe-dispatch = 'hierarchical': the 4 expert-parallel ranks are on one node, and tokens cross no "
        "slow link. Pass flat, or remove it.",
    ),
    "auto on one node": Case(flags=f"--smartmoe {EP4} --smartmoe-dispatch auto", ranks=4, per_node=4),
    "another dispatcher": Case(
        flags=f"{TWO_HOPS} --moe-token-dispatcher-type allgather",
        ranks=4,
        says=f"--moe-token-dispatcher-type = 'allgather': {NOT_WITH}: it has another exchange. Pass alltoall, or "
        "--smartmoe-dispatch flat.",
    ),
    "padding to capacity": Case(
        flags=f"{TWO_HOPS} --moe-expert-capacity-factor 1.0 --moe-pad-expert-input-to-capacity",
        ranks=4,
        says=f"--moe-pad-expert-input-to-capacity = True: {NOT_WITH}: only Megatron's own dispatcher pads. Remove one "
        "of the two.",
    ),
    "Megatron's overlap": Case(flags=f"{TWO_HOPS} --overlap-moe-expert-parallel-comm --bf16", ranks=4),
    "chunks": Case(
        flags=f"{TWO_HOPS} --smartmoe-overlap-degree 2",
        ranks=4,
        says=f"--smartmoe-overlap-degree = '2': {NOT_WITH}: the second hop waits for all of the first. Pass 1, or "
        "--smartmoe-dispatch flat.",
    ),
}


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str | None]:
    return said_of(CASES, tmp_path_factory.mktemp("checks"))


@pytest.mark.dist
@pytest.mark.fast
@pytest.mark.parametrize("name", CASES)
def test_each_rule_says_field_value_rule_and_way_out(name: str, said: dict[str, str | None]) -> None:
    assert said[name] == CASES[name].says


def test_auto_chooses_by_price_and_says_why() -> None:
    cluster = load_cluster_spec(Path("h100-sxm"))
    across = Namespace(**vars(OPTIONS) | {"expert_model_parallel_size": 16, "world_size": 16})
    seconds = predicted_seconds(across, replace(cluster, nodes=2), num_nodes=2)
    assert pays_off(seconds)
    assert explain(16, seconds) == (
        "dispatch hierarchical: sending a token once for each node saves at least 1% of the predicted time; predicted "
        "ms of a MoE layer, forward and backward, with an even load: "
        f"flat: {seconds['flat'] * 1e3:.3f}, hierarchical: {seconds['hierarchical'] * 1e3:.3f}"
    )
    one_choice = predicted_seconds(
        Namespace(**vars(across) | {"moe_router_topk": 1}), replace(cluster, nodes=2), num_nodes=2
    )
    assert not pays_off(one_choice)
    assert explain(16, one_choice).startswith(
        "dispatch flat: sending a token once for each node does not save 1% of the predicted time; "
    )
    assert explain(4, {}) == (
        "dispatch flat: the 4 expert-parallel ranks are on one node, and tokens cross no slow link"
    )
