"""Constraints: what a user's flags take out of the space, and which tokens only the planner knows."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_smartmoe.errors import ConfigError
from megatron_smartmoe.planner.constraints import DECIDED, KEPT_FROM_CONFIG, constraints_from_flags, without_negated
from megatron_smartmoe.planner.flags import launch_flags
from megatron_smartmoe.planner.search import search
from megatron_smartmoe.planner.space import SpaceOptions, shapes
from megatron_smartmoe.spec.parallel import ParallelSpec
from tests.support.models import CLUSTER, SMALL
from tests.unit.planner.cases import pricing

BASE = SpaceOptions(micro_batches=(1, 2), spare_slots=(0,), overlap_degrees=(1,), max_virtual=2)


def launches(tokens: str) -> list[ParallelSpec]:
    """What a command line leaves of the space."""
    options = constraints_from_flags(tokens.split(), BASE).options
    return [point for point in shapes(SMALL, CLUSTER, 8, options) if isinstance(point, ParallelSpec)]


def test_nothing_said_leaves_everything() -> None:
    found = constraints_from_flags("--lr 1e-4 --num-layers 8 --bf16".split(), BASE)
    assert (found.options, found.given, found.kept) == (BASE, {}, ())


@pytest.mark.parametrize(
    ("tokens", "field", "value"),
    [
        ("--tensor-model-parallel-size 2", "tp", 2),
        ("--pipeline-model-parallel-size=4", "pp", 4),
        ("--expert-model-parallel-size 4", "ep", 4),
        ("--expert-tensor-parallel-size 2", "etp", 2),
        ("--num-virtual-stages-per-pipeline-rank 2", "vpp", 2),
        ("--micro-batch-size 4", "micro_batch", 4),  # not among those that are tried otherwise
        ("--no-use-distributed-optimizer", "distributed_optimizer", False),
        ("--no-overlap-grad-reduce", "overlap_grad_reduce", False),
        ("--no-overlap-param-gather", "overlap_param_gather", False),
        ("--use-distributed-optimizer", "distributed_optimizer", True),
    ],
)
def test_every_launch_has_what_was_given(tokens: str, field: str, value: Any) -> None:
    found = launches(tokens)
    assert found
    assert {getattr(spec, field) for spec in found} == {value}
    constraints = constraints_from_flags(tokens.split(), BASE)
    assert constraints.given[field] == value
    assert constraints.kept == (tokens.replace("=", " "),)
    assert all(constraints.disagreement(spec) is None for spec in found)


def test_a_size_leaves_the_others_open() -> None:
    found = launches("--pipeline-model-parallel-size 2")
    assert {spec.tp for spec in found} == {1, 2, 4}
    assert {spec.ep for spec in found} == {1, 2, 4}


def test_a_size_that_breaks_a_rule_gives_the_rule() -> None:
    options = constraints_from_flags("--tensor-model-parallel-size 3".split(), BASE).options
    with pytest.raises(ConfigError, match="no launch is possible: TP x PP x CP = 3 does not divide 8 ranks"):
        search(pricing(), 8, options)


def test_a_layout_fixes_the_chunks() -> None:
    tokens = "--pipeline-model-parallel-size 2 --pipeline-model-parallel-layout Ettt|ttttt|L".replace("|L", "L")
    assert {(spec.pp, spec.vpp, spec.layers_of_chunk) for spec in launches(tokens)} == {(2, 1, (3, 5))}


def test_a_number_of_virtual_stages_goes_with_no_layout() -> None:
    """Megatron takes one of the two."""
    assert {spec.layers_of_chunk for spec in launches("--num-virtual-stages-per-pipeline-rank 2")} == {None}


@pytest.mark.parametrize(
    ("tokens", "mode"),
    [
        ("--recompute-granularity full", "full"),
        ("--recompute-granularity selective --recompute-modules moe layernorm", "moe"),
        ("--recompute-granularity selective", "none"),  # Megatron's default module is attention, which is fused
    ],
)
def test_recomputation_is_the_users(tokens: str, mode: str) -> None:
    found = constraints_from_flags(tokens.split(), BASE)
    assert found.options.recompute == (mode,)
    assert " ".join(found.kept) == tokens


def test_spare_slots_and_overlap_are_taken_at_their_word() -> None:
    tokens = "--smartmoe-spare-slots 2 --smartmoe-overlap-degree 4".split()
    options = constraints_from_flags(tokens, BASE).options
    assert (options.spare_slots, options.overlap_degrees) == ((2,), (4,))
    assert constraints_from_flags(["--smartmoe-overlap-degree", "auto"], BASE).options == BASE
    assert {spec.ep for spec in launches(" ".join(tokens))} == {4, 8}  # the trainer refuses more pieces than ranks
    assert {spec.ep for spec in launches("--smartmoe-spare-slots 9")} == {4, 8}  # EP 2 has 8 experts on the other rank


def test_a_hierarchical_dispatch_is_planned_across_nodes_only() -> None:
    tokens = ["--smartmoe-dispatch", "hierarchical"]
    assert constraints_from_flags(tokens, BASE).options.dispatches == ("hierarchical",)
    assert constraints_from_flags(["--smartmoe-dispatch", "auto"], BASE).options == BASE
    assert {spec.ep * spec.etp for spec in launches(" ".join(tokens))} == {8}  # a node has 4 ranks


def test_the_gather_overlaps_only_on_what_it_rests_on() -> None:
    plain = SpaceOptions(overlap_grad_reduce=False, overlap_param_gather=False)
    assert constraints_from_flags(["--overlap-param-gather"], plain).options.overlap_grad_reduce is True
    asked = constraints_from_flags(["--overlap-param-gather", "--no-overlap-grad-reduce"], BASE).options
    with pytest.raises(ConfigError, match="overlapping the parameter gather needs"):
        search(pricing(), 8, asked)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ("--tensor-model-parallel-size two", "--tensor-model-parallel-size = 'two': must be a whole number"),
        ("--micro-batch-size 0", "--micro-batch-size = 0: must be at least 1. Remove it to have it planned."),
        (
            "--num-layers-per-virtual-pipeline-stage 2",
            "'2': is a pipeline split that --parallel auto does not support. Use --pipeline-model-parallel-layout or",
        ),
        (
            "--pipeline-model-parallel-layout Etttt|ttttL",
            "has 2 chunks, and needs --pipeline-model-parallel-size that divides them. Pass it too, for example 2.",
        ),
        (
            "--pipeline-model-parallel-size 2 --pipeline-model-parallel-layout Ettttm|ttttL",
            "is not supported with --parallel auto: the planner has prediction blocks (m) in the last chunk only. Move",
        ),
    ],
)
def test_what_cannot_be_searched_is_refused(tokens: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        constraints_from_flags(tokens.split(), BASE)
    assert message in str(caught.value)


def test_a_launch_that_differs_says_in_what() -> None:
    constraints = constraints_from_flags("--tensor-model-parallel-size 2".split(), BASE)
    assert constraints.disagreement(ParallelSpec(gpus=8)) == "it has tp 1, not 2"
    assert constraints.disagreement(ParallelSpec(gpus=8, tp=2)) is None


def test_only_what_megatron_does_not_know_is_taken_away() -> None:
    tokens = "--no-use-distributed-optimizer --lr 1 --no-overlap-grad-reduce --no-load-optim --no-swiglu".split()
    known = {"--no-load-optim", "--no-overlap-grad-reduce"}
    assert without_negated(tokens, known) == "--lr 1 --no-overlap-grad-reduce --no-load-optim --no-swiglu".split()


@pytest.mark.parametrize(
    "spec",
    [
        ParallelSpec(gpus=8, tp=2, pp=2, vpp=2, ep=2, cp=2, recompute="moe"),
        ParallelSpec(gpus=8, pp=2, layers_of_chunk=(5, 3), recompute="full"),
        ParallelSpec(gpus=8, ep=4, spare_slots=1, replicas="history", overlap_degree=2),
    ],
    ids=lambda spec: spec.label(),
)
def test_a_plan_says_nothing_that_it_does_not_decide(spec: ParallelSpec) -> None:
    """What it says replaces the configuration's; a flag outside DECIDED would be said twice."""
    tokens = launch_flags(SMALL, spec)
    assert {word for word in tokens if word.startswith("--")} <= {*DECIDED, *KEPT_FROM_CONFIG}
    assert constraints_from_flags(tokens, BASE).disagreement(spec) is None
