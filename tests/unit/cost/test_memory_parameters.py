"""Parameters: as many as the models' authors publish, whatever the split."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_smartmoe.cost.memory.parameters import chunk_parameters
from megatron_smartmoe.spec.model import ModelSpec, load_model_spec
from megatron_smartmoe.spec.parallel import ParallelSpec, pipeline_chunks
from tests.unit.spec.test_model import MODELS, PUBLISHED


def count(model: ModelSpec, spec: ParallelSpec) -> float:
    """Weights of the whole model: every rank's own, experts times EP."""
    total = 0
    for chunk in pipeline_chunks(model, spec):
        for param in chunk_parameters(model, spec, chunk):
            total += param.numel * (spec.ep if param.expert else 1)
    return total


@pytest.mark.parametrize("path", [path for path in MODELS if path.stem != "quickstart"], ids=lambda path: path.stem)
def test_as_many_as_published(path: Path) -> None:
    model = load_model_spec(path)
    assert count(model, ParallelSpec(gpus=1)) / 1e9 == pytest.approx(PUBLISHED[model.name], rel=0.01)


@pytest.mark.parametrize("path", MODELS, ids=lambda path: path.stem)
def test_expert_parallel_ranks_together_hold_every_expert(path: Path) -> None:
    model = load_model_spec(path)
    assert count(model, ParallelSpec(gpus=4, ep=4)) == count(model, ParallelSpec(gpus=1))


def test_the_order_of_grouped_and_single_experts_differs_not_the_sum() -> None:
    model = load_model_spec(next(path for path in MODELS if path.stem == "mixtral-8x7b"))
    local = ParallelSpec(gpus=1, implementation="local")
    assert count(model, local) == count(model, ParallelSpec(gpus=1))
