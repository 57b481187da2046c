"""Environment variables of a GPU run, by its flags and its GPUs."""

from __future__ import annotations

import os
from argparse import Namespace
from typing import Any

import pytest

from megatron_smartmoe.adapter import gpu_environment
from megatron_smartmoe.adapter.gpu_environment import CONNECTIONS, set_gpu_environment

HOPPER, BLACKWELL = (9, 0), (10, 0)
IMPLICIT = "NCCL_LAUNCH_ORDER_IMPLICIT"


def arguments(**changes: Any) -> Namespace:
    defaults = {
        "tensor_model_parallel_size": 1,
        "context_parallel_size": 1,
        "use_megatron_fsdp": False,
        "use_torch_fsdp2": False,
        "overlap_moe_expert_parallel_comm": False,
        "smartmoe": False,
    }
    return Namespace(**(defaults | changes))


@pytest.mark.parametrize(
    ("changes", "capability", "connections"),
    [
        ({}, HOPPER, None),
        ({"tensor_model_parallel_size": 2}, HOPPER, "1"),
        ({"context_parallel_size": 2}, HOPPER, "1"),
        ({"tensor_model_parallel_size": 2}, (0, 0), "1"),
        ({"tensor_model_parallel_size": 2}, BLACKWELL, None),
        ({"tensor_model_parallel_size": 2}, (12, 0), None),
        ({"tensor_model_parallel_size": 2, "use_megatron_fsdp": True}, HOPPER, None),
        ({"overlap_moe_expert_parallel_comm": True}, HOPPER, "32"),
        ({"tensor_model_parallel_size": 2, "overlap_moe_expert_parallel_comm": True}, HOPPER, "32"),
        ({"tensor_model_parallel_size": 2, "overlap_moe_expert_parallel_comm": True}, BLACKWELL, "32"),
    ],
)
def test_connections(changes: dict[str, Any], capability: tuple[int, int], connections: str | None) -> None:
    assert gpu_environment.gpu_environment(arguments(**changes), capability).get(CONNECTIONS) == connections


def test_the_order_of_launches_with_balancing_alone() -> None:
    assert gpu_environment.gpu_environment(arguments(smartmoe=True), HOPPER) == {IMPLICIT: "1"}
    assert gpu_environment.gpu_environment(arguments(), HOPPER) == {}


def test_what_the_user_has_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CONNECTIONS, "8")
    monkeypatch.setenv(IMPLICIT, "0")
    set_gpu_environment(arguments(tensor_model_parallel_size=2, smartmoe=True), cpu=True)
    assert (os.environ[CONNECTIONS], os.environ[IMPLICIT]) == ("8", "0")


def test_no_driver_no_capability(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(gpu_environment.ctypes, "CDLL", missing)
    assert gpu_environment.capability_without_context() == (0, 0)


def test_the_driver_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    class Driver:
        """The three functions of libcuda, for one H100."""

        def cuInit(self, flags: int) -> int:
            return 0

        def cuDeviceGet(self, device: Any, index: int) -> int:
            return 0

        def cuDeviceGetAttribute(self, value: Any, attribute: int, device: Any) -> int:
            value._obj.value = {75: 9, 76: 0}[attribute]
            return 0

    monkeypatch.setattr(gpu_environment.ctypes, "CDLL", lambda name: Driver())
    assert gpu_environment.capability_without_context() == (9, 0)
