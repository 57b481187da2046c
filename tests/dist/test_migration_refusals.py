"""Optimizers and precisions whose expert state cannot be moved are refused by the flag's name, before training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.support.ranks import run_ranks

pytestmark = [pytest.mark.dist, pytest.mark.fast]

PRECISION_AWARE = {
    "use_precision_aware_optimizer": True,
    "main_params_dtype": torch.float32,
    "exp_avg_dtype": torch.bfloat16,
}
REFUSED = {
    "scaled moments": "--exp-avg-sq-dtype = 'uint8': a scale is kept for a whole shard, and experts that move would be "
    "rounded by one another's. Remove the flag, or set --smartmoe-homes off.",
    "unknown": "--optimizer = 'adam': Lamb is not an optimizer whose state can be moved. "
    "Remove the flag, or set --smartmoe-homes off.",
    "fsdp": "--use-megatron-fsdp = True: experts cannot move between ranks when FSDP shards the model. "
    "Remove the flag, or set --smartmoe-homes off.",
    "one rank": "--expert-model-parallel-size = 1: all experts are at home on the one rank. "
    "Use at least 2, or set --smartmoe-homes off.",
}


def texts() -> dict[str, str]:
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
    from megatron.core.optimizer.layer_wise_optimizer import LayerWiseDistributedOptimizer
    from megatron.core.optimizer.optimizer import ChainedOptimizer, FP32Optimizer

    from megatron_smartmoe.adapter.migration.optimizer_state import check_optimizer
    from megatron_smartmoe.errors import SmartMoEError
    from tests.support.experts import Job, Mix

    def optimizer(kind: Any, **config: Any) -> Any:
        """An optimizer as it stands at the end of a chain, without its construction."""
        usual = {"optimizer": "adam", "optimizer_cpu_offload": False, "use_precision_aware_optimizer": False}
        one = object.__new__(kind)
        one.config, one.is_stub_optimizer = SimpleNamespace(**usual | config), False
        chain = object.__new__(ChainedOptimizer)
        chain.chained_optimizers = [one]
        return chain

    class Lamb:
        pass

    def chunk(**attributes: Any) -> Any:
        return SimpleNamespace(parameters=list, **attributes)

    fsdp = [chunk(ddp_config=SimpleNamespace(use_megatron_fsdp=True))]
    calls: dict[str, Callable[[], object]] = {
        "scaled moments": lambda: check_optimizer(
            optimizer(DistributedOptimizer, **PRECISION_AWARE, exp_avg_sq_dtype=torch.uint8), []
        ),
        "unknown": lambda: check_optimizer(optimizer(Lamb), []),
        "fsdp": lambda: check_optimizer(optimizer(FP32Optimizer), fsdp),
        "one rank": lambda: Job(Mix(ep=1)),
    }
    found = {}
    for name, call in calls.items():
        try:
            call()
        except SmartMoEError as error:
            found[name] = str(error)
    for accepted in (
        optimizer(FP32Optimizer),
        optimizer(LayerWiseDistributedOptimizer, optimizer="muon"),
        optimizer(DistributedOptimizer, **PRECISION_AWARE, exp_avg_sq_dtype=torch.bfloat16),
        optimizer(DistributedOptimizer, use_precision_aware_optimizer=True, optimizer_cpu_offload=True),
    ):
        check_optimizer(accepted, [chunk()])
    return found


def test_what_cannot_be_moved_is_refused_by_name(tmp_path: Path) -> None:
    (found,) = run_ranks(texts, 1, log_dir=tmp_path)
    assert found == REFUSED
