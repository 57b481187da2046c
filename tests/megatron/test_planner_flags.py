"""Every shipped model is planned on a shipped cluster, and Megatron takes the flags: its parser, its own validation."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from megatron_smartmoe.planner.flags import megatron_flags, parallel_from_flags
from megatron_smartmoe.planner.load import LoadModel, scenarios_from_model
from megatron_smartmoe.planner.pricing import Launch, Pricing
from megatron_smartmoe.planner.search import search
from megatron_smartmoe.planner.space import SpaceOptions
from megatron_smartmoe.spec.cluster import load_cluster_spec
from megatron_smartmoe.spec.model import ModelSpec, load_model_spec
from tests.support import gpu_machine
from tests.support.marks import some_fast
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.dist

CONFIGS = Path(__file__).parents[2] / "configs"
MODELS = sorted(path.stem for path in (CONFIGS / "models").glob("*.yaml"))
GPUS = {"deepseek-v3": 512, "qwen3-235b-a22b": 256, "mixtral-8x22b": 128, "quickstart": 4}
SPACE = SpaceOptions(micro_batches=(1, 2), spare_slots=(0, 1), overlap_degrees=(1, 2), max_virtual=2)
# What the user adds to a plan's flags; sizes play no part in it.
USER = (
    "--no-rope-fusion --mock-data --tokenizer-type NullTokenizer --lr 1e-4 --train-iters 10 --eval-iters 0 "
    "--eval-interval 1000"
).split()


@pytest.fixture(scope="module", params=some_fast(MODELS, "mixtral-8x7b"))
def model(request: pytest.FixtureRequest) -> ModelSpec:
    return load_model_spec(CONFIGS / "models" / f"{request.param}.yaml")


@pytest.fixture(scope="module")
def plans(model: ModelSpec) -> list[Launch]:
    """The best few, and every one that needs recomputation among those that no other beats in time and memory."""
    cluster = load_cluster_spec(CONFIGS / "clusters" / "h100-sxm.yaml")
    pricing = Pricing(model, cluster, LoadModel(scenarios_from_model(model)))
    result = search(pricing, GPUS.get(model.name, 64), SPACE, limit=5)
    return [*result.best, *result.pareto[-3:]]


def _judge(lists: list[tuple[list[str], int]]) -> list[dict[str, Any]]:
    """Parse and check as a rank would on a GPU machine with TransformerEngine, neither of which is here."""
    gpu_machine.pretend()
    import megatron_smartmoe.adapter.flags.megatron_checks as checks
    import megatron_smartmoe.adapter.flags.parser as arguments

    parser = arguments.build_parser()
    found = []
    for argv, world_size in lists:
        os.environ["WORLD_SIZE"] = str(world_size)
        args = arguments.parse(_known(argv, parser._option_string_actions))
        args.world_size = world_size
        checks.check(args, world_size=world_size, cpu=False, data_exists=False)
        checks.megatron_verdict(args)
        found.append({name: value for name, value in vars(args).items() if isinstance(value, int | float | str)})
    return found


def _known(argv: list[str], options: Any) -> list[str]:
    """Without the project's own flags that the parser does not have yet, and their values."""
    kept, skip = [], False
    for word in argv:
        if word.startswith("--"):
            skip = word.startswith("--smartmoe") and word not in options
        if not skip:
            kept.append(word)
    return kept


def test_megatron_accepts_every_plan(model: ModelSpec, plans: list[Launch], tmp_path: Path) -> None:
    lists = [([*megatron_flags(model, plan.spec).all, *USER], plan.spec.gpus) for plan in plans]
    for plan, args in zip(plans, run_ranks(_judge, 1, lists, log_dir=tmp_path)[0], strict=True):
        spec = plan.spec
        assert args["tensor_model_parallel_size"] == spec.tp
        assert args["pipeline_model_parallel_size"] == spec.pp
        assert args["expert_model_parallel_size"] == spec.ep
        assert args["expert_tensor_parallel_size"] == spec.etp
        assert args["data_parallel_size"] == spec.dp
        assert (args.get("virtual_pipeline_model_parallel_size") or 1) == spec.vpp


def test_flags_read_back_give_the_plan(model: ModelSpec, plans: list[Launch]) -> None:
    for plan in plans:
        assert parallel_from_flags(megatron_flags(model, plan.spec).all, model, plan.spec.gpus) == plan.spec
