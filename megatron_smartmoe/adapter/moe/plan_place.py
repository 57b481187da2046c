"""Where replicas are planned from a micro-batch's counts: on the host, or on the GPU where the counts are.

By flag, or by predicted time where the GPU can do it at all. All ranks must plan in one place, because the host
searches on where its first plan leaves a rank above the mean, and the GPU does not.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping

import torch
import torch.distributed as dist

from megatron_smartmoe import ops
from megatron_smartmoe.adapter.flags.smartmoe_arguments import PLAN_ON
from megatron_smartmoe.adapter.flags.smartmoe_checks import not_on_device
from megatron_smartmoe.cost.plan_place import device_plan_s, host_plan_s
from megatron_smartmoe.cost.step.constants import StepConstants
from megatron_smartmoe.errors import CompatError


def plans_on_device(args: Namespace, num_ranks: int, num_nodes: int) -> bool:
    """Whether this run plans where the counts are. A call of all ranks of the job; the same on all of them.

    Args:
        args: Megatron's arguments, after validation.
        num_ranks: expert-parallel ranks.
        num_nodes: nodes that they lie on.

    Raises:
        CompatError: the flag asks for the device, and it cannot plan there.
    """
    choice, device = args.smartmoe_plan_on, torch.empty(0, device=torch.cuda.current_device()).device
    if choice == "host" or (choice == "auto" and (device.type != "cuda" or not_on_device(args) is not None)):
        return False
    sizes = {"ranks": num_ranks, "experts": args.num_experts, "spare_slots": args.smartmoe_spare_slots}
    faults: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(faults, fault_of(sizes, device, num_nodes))
    on_device, why = decide(choice, sizes, next(filter(None, faults), None))
    if dist.get_rank() == 0:
        place = "device" if on_device else "host"
        print(f"smartmoe: replicas of a micro-batch are planned on the {place}: {why}", flush=True)
    return on_device


def decide(choice: str, sizes: Mapping[str, int], fault: str | None) -> tuple[bool, str]:
    """Whether to plan on the device, and why.

    Args:
        choice: `device`, or `auto` where the flags allow the device.
        sizes: ranks, experts and spare slots.
        fault: why a rank cannot plan on the device; None if all can.

    Raises:
        CompatError: the choice is the device, and a rank cannot.
    """
    if choice == "device":
        if fault is not None:
            raise CompatError(f"{PLAN_ON} = 'device': {fault}. Pass host, or remove it.")
        return True, f"{PLAN_ON} device"
    host_s, device_s = host_plan_s(**sizes), device_plan_s(**sizes, launch_s=StepConstants().launch_s)
    why = f"predicted {host_s * 1e6:.0f} us a layer on the host, {device_s * 1e6:.0f} us on the GPU"
    return fault is None and device_s < host_s, why if fault is None else f"{why}, where {fault}"


def fault_of(sizes: Mapping[str, int], device: torch.device, num_nodes: int) -> str | None:
    """Why this rank cannot plan on the device; None if it can, which is tried."""
    if num_nodes > 1:
        return f"the {sizes['ranks']} expert-parallel ranks are on {num_nodes} nodes, and it plans for one"
    try:
        counts_RE = torch.zeros(sizes["ranks"], sizes["experts"], dtype=torch.int64, device=device)
        ops.exact_split(counts_RE, sizes["spare_slots"])
    except RuntimeError as error:
        return f"smartmoe::exact_split says: {error}".rstrip(".")
    return None
