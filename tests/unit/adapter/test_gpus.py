"""GPUs that cannot be used, and ops that cannot run on one, are errors before anything is built."""

from __future__ import annotations

import pytest
import torch

from megatron_smartmoe import ops
from megatron_smartmoe.adapter import gpus
from megatron_smartmoe.errors import CompatError
from megatron_smartmoe.ops.library import LIBRARY
from megatron_smartmoe.runtime.driver import Driver

CPU = torch.device("cpu")


def test_a_host_without_gpus_is_fine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpus, "find_driver", lambda: Driver(error="NVML says 9 (see nvidia-smi)"))
    gpus.refuse_unusable_gpus("auto")


def test_ops_that_run_are_fine() -> None:
    gpus.refuse_unusable_ops(CPU)


def test_ops_for_a_newer_cuda_than_the_drivers(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("CUDA driver version is insufficient for CUDA runtime version\nat launch")

    monkeypatch.setattr(ops, "dispatch_map", refuse)
    monkeypatch.setattr(gpus, "find_driver", lambda: Driver(num_gpus=1, version="550.54.15", cuda=(12, 4)))
    with pytest.raises(CompatError) as caught:
        gpus.refuse_unusable_ops(CPU)
    assert str(caught.value) == (
        "the compiled ops cannot run on cpu: CUDA driver version is insufficient for CUDA runtime version (driver "
        "550.54.15, for CUDA 12.4). Build them for this machine, with a CUDA toolkit that its driver serves: python "
        f"megatron_smartmoe/ops/_build.py. Without {LIBRARY} the ops run on plain torch, slowly."
    )
