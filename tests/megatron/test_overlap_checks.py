"""`--smartmoe-overlap-degree`: what is refused, with its whole text, and what `auto` chooses."""

from __future__ import annotations

import os
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_smartmoe.adapter.cost_inputs import launch_of_run, model_of_run
from megatron_smartmoe.adapter.moe.overlap_degree import explain, fewest_chunks, predicted_seconds
from megatron_smartmoe.planner.arguments import model_from_arguments
from megatron_smartmoe.planner.flags import parallel_from_flags
from megatron_smartmoe.spec.cluster import load_cluster_spec
from tests.support.arguments import LAUNCH, VALUES
from tests.support.checks import DATA, GOOD, Case, said_of
from tests.support.ranks import run_ranks

CLUSTERS = Path(__file__).parents[2] / "configs" / "clusters"
EP4 = "--expert-model-parallel-size 4"
TWO = f"--smartmoe {EP4} --smartmoe-overlap-degree 2"
TE_EXPERTS = "--transformer-impl transformer_engine --moe-grouped-gemm --smartmoe-experts transformer_engine"
NOT_WITH = "is not supported with --smartmoe-overlap-degree"
CASES = {
    "all well": Case(flags=TWO, ranks=4, verdict=True),
    "as many as ranks": Case(flags=f"--smartmoe {EP4} --smartmoe-overlap-degree 4", ranks=4),
    "one without --smartmoe": Case(flags="--smartmoe-overlap-degree 1"),
    "auto on one rank": Case(flags="--smartmoe-overlap-degree auto"),
    "expert tensor parallelism": Case(
        flags=f"{TWO} --tensor-model-parallel-size 2 --sequence-parallel --expert-tensor-parallel-size 2", ranks=8
    ),
    "more than ranks": Case(
        flags=f"--smartmoe {EP4} --smartmoe-overlap-degree 5",
        ranks=4,
        says="--smartmoe-overlap-degree = '5': must be auto or a number from 1 to 4, the expert-parallel ranks. Remove "
        "it for 1, which overlaps nothing.",
    ),
    "no number": Case(
        flags=f"--smartmoe {EP4} --smartmoe-overlap-degree many",
        ranks=4,
        says="--smartmoe-overlap-degree = 'many': must be auto or a number from 1 to 4, the expert-parallel ranks. "
        "Remove it for 1, which overlaps nothing.",
    ),
    "none": Case(
        flags=f"--smartmoe {EP4} --smartmoe-overlap-degree 0",
        ranks=4,
        says="--smartmoe-overlap-degree = '0': must be auto or a number from 1 to 4, the expert-parallel ranks. Remove "
        "it for 1, which overlaps nothing.",
    ),
    "without --smartmoe": Case(
        flags=f"{EP4} --smartmoe-overlap-degree auto",
        ranks=4,
        says="--smartmoe-overlap-degree = 'auto': needs --smartmoe. Add --smartmoe, or remove it.",
    ),
    "another dispatcher": Case(
        flags=f"{TWO} --moe-token-dispatcher-type allgather",
        ranks=4,
        says=f"--moe-token-dispatcher-type = 'allgather': {NOT_WITH}: only the alltoall dispatcher can be split into "
        "chunks. Pass alltoall.",
    ),
    "TransformerEngine's experts": Case(flags=f"{TWO} {TE_EXPERTS}", ranks=4, te=True),
    "rows of a chunk that are offloaded": Case(
        flags=f"{TWO} {TE_EXPERTS} --fine-grained-activation-offloading --offload-modules expert_fc1",
        ranks=4,
        te=True,
        says=f"--offload-modules = 'expert_fc1': has expert_fc1, which {NOT_WITH}: it frees the memory of a chunk's "
        "rows, which other chunks may share. Remove one of the two.",
    ),
    "weight gradients beside the dispatch": Case(
        flags=f"{TWO} {TE_EXPERTS} --overlap-dispatch-backward-with-experts-wgrad",
        ranks=4,
        te=True,
        says=f"--overlap-dispatch-backward-with-experts-wgrad = True: {NOT_WITH}: it overlaps the same all-to-alls "
        "with the weight gradients of all chunks. Remove one of the two.",
    ),
    "padding for fp8": Case(
        flags=f"{TWO} {TE_EXPERTS} --moe-router-padding-for-quantization",
        ranks=4,
        te=True,
        says=f"--moe-router-padding-for-quantization = True: {NOT_WITH}: only Megatron's own dispatcher pads. Remove "
        "one of the two.",
    ),
    "padding to capacity": Case(
        flags=f"{TWO} --moe-expert-capacity-factor 1.0 --moe-pad-expert-input-to-capacity",
        ranks=4,
        says=f"--moe-pad-expert-input-to-capacity = True: {NOT_WITH}: only Megatron's own dispatcher pads. Remove one "
        "of the two.",
    ),
    "Megatron's overlap": Case(
        flags=f"{TWO} --overlap-moe-expert-parallel-comm",
        ranks=4,
        says=f"--overlap-moe-expert-parallel-comm = True: {NOT_WITH}: it overlaps the same all-to-alls with another "
        "micro-batch. Remove one of the two.",
    ),
}
OPTIONS = Namespace(
    **VALUES
    | LAUNCH
    | {
        "expert_model_parallel_size": 8,
        "world_size": 8,
        "num_experts": 64,
        "moe_router_topk": 8,
        "moe_ffn_hidden_size": 1024,
        "micro_batch_size": 4,
        "global_batch_size": 256,
        "seq_length": 4096,
        "num_layers": 16,
        "hidden_size": 2048,
        "num_attention_heads": 16,
        "ffn_hidden_size": 1024,
        "swiglu": True,
        "bf16": True,
    }
)


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str | None]:
    return said_of(CASES, tmp_path_factory.mktemp("checks"))


@pytest.mark.dist
@pytest.mark.fast
@pytest.mark.parametrize("name", CASES)
def test_each_rule_says_field_value_rule_and_way_out(name: str, said: dict[str, str | None]) -> None:
    assert said[name] == CASES[name].says


def test_auto_cuts_where_wires_are_slow_and_rows_many() -> None:
    cluster = load_cluster_spec(CLUSTERS / "h100-sxm.yaml")
    across = predicted_seconds(OPTIONS, cluster, num_nodes=8)
    assert list(across) == [1, 2, 3, 4, 5, 6, 7, 8]
    assert fewest_chunks(across) == 2
    few_rows = Namespace(**vars(OPTIONS) | {"micro_batch_size": 1, "seq_length": 64})
    few = predicted_seconds(few_rows, cluster, num_nodes=1)
    assert fewest_chunks(few) == 1


def test_a_percent_is_not_worth_another_chunk() -> None:
    assert fewest_chunks({1: 1.2, 2: 1.009, 3: 1.0, 4: 1.1}) == 2


def test_auto_tries_no_more_chunks_than_ranks_and_says_all() -> None:
    cluster = replace(load_cluster_spec(CLUSTERS / "cpu.yaml"), gpus_per_node=2)
    two = Namespace(**vars(OPTIONS) | {"expert_model_parallel_size": 2, "world_size": 2})
    assert list(predicted_seconds(two, cluster, num_nodes=1)) == [1, 2]
    assert explain(2, {1: 0.0015, 2: 0.001}) == (
        "overlap degree 2, the fewest chunks within 1% of the shortest predicted time; predicted ms of a MoE layer, "
        "forward and backward, with an even load: 1: 1.500, 2: 1.000"
    )


DESCRIBED = {
    "kv channels, grouped queries, shared experts": "--kv-channels 24 --group-query-attention --num-query-groups 2 "
    "--moe-shared-expert-intermediate-size 64 --smartmoe-overlap-degree auto",
    "replicas and bf16 gradients": "--bf16 --grad-reduce-in-bf16 --smartmoe-spare-slots 1",
    "virtual stages": "--pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 2 --num-layers 4",
    "a layout": "--pipeline-model-parallel-size 2 --pipeline-model-parallel-layout Ettt|tL --num-layers 4",
    "samples and a pool": "--train-samples 64 --smartmoe-pool auto",
}


def _described(cases: dict[str, str]) -> dict[str, tuple[Any, Any, Any, Any]]:
    """Model and launch of each case: from arguments that Megatron has validated, and as the planner reads them."""
    from megatron_smartmoe.adapter.flags.megatron_checks import megatron_verdict
    from megatron_smartmoe.adapter.pretrain import check_flags, with_defaults

    os.environ["WORLD_SIZE"] = "8"
    found = {}
    for name, flags in cases.items():
        tokens = with_defaults(
            [*GOOD, *DATA, "--global-batch-size", "8", "--smartmoe", *EP4.split(), *flags.split()], cpu=True, say=False
        )
        if "--train-samples" in tokens:
            at = tokens.index("--train-iters")
            del tokens[at : at + 2]
        parsed = check_flags(tokens, cpu=True)
        planned = model_from_arguments(vars(parsed))
        read = parallel_from_flags(tokens, planned, 8)
        megatron_verdict(parsed)
        found[name] = (model_of_run(parsed), planned, launch_of_run(parsed), read)
    return found


@pytest.fixture(scope="module")
def described(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, Any, Any, Any]]:
    found: dict[str, tuple[Any, Any, Any, Any]]
    found = run_ranks(_described, 1, DESCRIBED, log_dir=tmp_path_factory.mktemp("described"))[0]
    return found


@pytest.mark.dist
@pytest.mark.parametrize("name", DESCRIBED)
def test_a_run_is_priced_as_the_model_and_the_launch_that_are_planned(
    name: str, described: dict[str, tuple[Any, Any, Any, Any]]
) -> None:
    model, planned, launch, read = described[name]
    assert model == planned
    assert launch == read
