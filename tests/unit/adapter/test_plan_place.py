"""Where replicas are planned: the choice and its line."""

from __future__ import annotations

from argparse import Namespace
from unittest import mock

import pytest
import torch

from megatron_smartmoe.adapter.moe.plan_place import decide, fault_of, plans_on_device
from megatron_smartmoe.errors import CompatError

EP8 = {"ranks": 8, "experts": 64, "spare_slots": 1}
ON_NODES = "the 8 expert-parallel ranks are on 2 nodes, and it plans for one"


@pytest.mark.parametrize("choice", ["auto", "host"])
def test_cpu_ranks_plan_on_the_host(choice: str) -> None:
    with mock.patch.object(torch.cuda, "current_device", return_value="cpu"):
        assert not plans_on_device(Namespace(smartmoe_plan_on=choice), 8, 1)


def test_auto_takes_the_shorter_time() -> None:
    why = "predicted 59 us a layer on the host, 720 us on the GPU"
    assert decide("auto", EP8, None) == (False, why)
    with mock.patch("megatron_smartmoe.adapter.moe.plan_place.device_plan_s", return_value=20e-6):
        assert decide("auto", EP8, None) == (True, "predicted 59 us a layer on the host, 20 us on the GPU")
        assert not decide("auto", EP8, ON_NODES)[0]
    assert decide("auto", EP8, ON_NODES)[1] == f"{why}, where {ON_NODES}"


def test_the_device_is_taken_or_refused() -> None:
    assert fault_of(EP8, torch.device("cpu"), 2) == ON_NODES
    assert decide("device", EP8, None) == (True, "--smartmoe-plan-on device")
    text = rf"^--smartmoe-plan-on = 'device': {ON_NODES}\. Pass host, or remove it\.$"
    with pytest.raises(CompatError, match=text):
        decide("device", EP8, ON_NODES)


def test_an_op_that_cannot_run_there_is_named() -> None:
    op = "megatron_smartmoe.ops.exact_split"
    with mock.patch(op, side_effect=RuntimeError("a plan does not fit. Plan on the host: counts_RE.cpu()")):
        fault = fault_of(EP8, torch.device("cpu"), 1)
    assert fault == "smartmoe::exact_split says: a plan does not fit. Plan on the host: counts_RE.cpu()"
