"""The ranks of `scripts/bench_imbalance.py`: one real MoE layer per rule, run in turns with plans made beforehand.

A pass is what a step of the layer costs: replicas' weights, dispatch, experts, combine, the same backward, and the
replicas' gradients back at their homes. Counted is the CPU time of a rank's thread, which waiting for messages does not
add to. Every layer has the same weights, and every rule must give the same outputs.
"""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from numpy.typing import NDArray

from megatron_smartmoe.runtime.replay import forced_map
from megatron_smartmoe.spec.placement import with_empty_slots
from scripts.training_bench.one_layer import smart_layer
from scripts.training_bench.rule_plans import EVEN, RulePlans, Sizes, StepPlan

MIN_PASSES = 2  # of every layer before the first that counts
CHECKED_EVERY = 8  # steps


def measure(plans: Mapping[str, RulePlans], sizes: Sizes, first: int, folder: Path) -> NDArray[np.float64]:
    """Seconds of every pass, `[step, rule, rank]`; `first` is the rule that begins."""
    multiprocessing.spawn(_rank, (plans, sizes, first, folder), nprocs=sizes.ranks)
    return np.stack([np.load(folder / f"rank{rank}.npy") for rank in range(sizes.ranks)], axis=2)


def _rank(rank: int, plans: Mapping[str, RulePlans], sizes: Sizes, first: int, folder: Path) -> None:
    os.environ.update(GLOO_SOCKET_IFNAME="lo")
    warnings.filterwarnings("ignore", module="megatron")  # of packages that a CPU does without
    from megatron_smartmoe.adapter import cpu

    cpu.install()
    torch.set_num_threads(1)
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    from megatron_smartmoe.runtime.replicas.wire import ReplicaWire

    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=sizes.ranks)
    parallel_state.initialize_model_parallel(expert_model_parallel_size=sizes.ranks)
    model_parallel_cuda_manual_seed(1)
    wire = ReplicaWire(parallel_state.get_expert_model_parallel_group())
    layers = {name: RuleLayer(each.steps, sizes, wire) for name, each in plans.items()}
    given = layers[EVEN].layer
    for one in layers.values():
        for name, parameter in one.layer.named_parameters():
            parameter.data.copy_(given.get_parameter(name).data)
    generator = torch.Generator().manual_seed(rank)
    rows = torch.randn(sizes.tokens, 1, sizes.hidden, generator=generator)
    names, steps = list(layers), len(plans[EVEN].steps)
    seconds = np.zeros((steps, len(names)))
    for name in names:
        for _ in range(MIN_PASSES):
            layers[name].run(0, rows)
    for step in range(steps):
        outputs = {}
        for turn in range(len(names)):
            at = (first + step + turn) % len(names)
            dist.barrier()
            seconds[step, at], outputs[names[at]] = layers[names[at]].run(step, rows)
        if step % CHECKED_EVERY == 0:
            expected, *others = [output for name, output in outputs.items() if name != EVEN]
            for output in others:
                torch.testing.assert_close(output, expected)
    np.save(folder / f"rank{rank}.npy", seconds)
    dist.barrier()
    dist.destroy_process_group()


class RuleLayer:
    """A layer that runs the plans of one rule.

    Args:
        steps: the plans.
        sizes: of the layer.
        wire: what carries replicas; one for all layers of a rank.
    """

    def __init__(self, steps: list[StepPlan], sizes: Sizes, wire: Any) -> None:
        from megatron_smartmoe.runtime.replicas.slots import SpareSlots

        self.layer = smart_layer(
            ranks=sizes.ranks,
            experts=sizes.experts,
            hidden=sizes.hidden,
            ffn=sizes.ffn,
            moe_router_topk=sizes.top_k,
        )
        self._steps, self._sizes, self._step = steps, sizes, steps[0]
        self._spare_slots = max(step.slots_RS.shape[1] for step in steps) - sizes.experts // sizes.ranks
        self._weight = torch.zeros(0)
        self.layer.route = self._route
        self._spare: Any = None
        if any(step.fetch != "none" for step in steps):
            weights = (self.layer.experts.weight1, self.layer.experts.weight2)
            totals = [torch.zeros_like(weight) for weight in weights]
            keeps = any(step.fetch in ("ahead", "instead") for step in steps)
            self._spare = SpareSlots(weights, self._spare_slots, wire, lambda: totals, keeps=keeps)
            self.layer.add_replicas(self._spare)
            self.layer.planner._plan = self._plan

    def run(self, step: int, rows: torch.Tensor) -> tuple[float, torch.Tensor]:
        """One pass: its seconds, and the output."""
        self._step = plan = self._steps[step]
        chosen_TE = forced_map(plan.counts_RE[dist.get_rank()], self._sizes.tokens)
        self._weight = (chosen_TE / self._sizes.top_k).requires_grad_()
        self._chosen_TE, inputs = chosen_TE, rows.clone().requires_grad_()
        began = time.thread_time()
        if self._spare is not None:
            ahead_RS = plan.slots_RS if plan.fetch == "ahead" else plan.ahead_RS
            if ahead_RS is None:
                self._spare.drop()
            elif (used := self._spare.use(self._padded(ahead_RS), num_passes=1)) is not None:
                used.start()
        output = self.layer(inputs)[0]
        output.sum().backward()
        if self._spare is not None:
            self._spare.finish_returns()
        seconds = time.thread_time() - began
        self.layer.zero_grad(set_to_none=True)
        return seconds, output.detach()

    def _route(self, *_: Any, **__: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """The routers' choices, which are given."""
        return self._weight, self._chosen_TE

    def _plan(self, counts_RPE: torch.Tensor) -> Any:
        """In the place of the layer's planner: the plan that was made beforehand, and the fetch that it needs."""
        from megatron_smartmoe.runtime.replicas.dispatch_plan import plan_of_split

        step, planner = self._step, self.layer.planner
        assert np.array_equal(counts_RPE.numpy()[:, 0], step.counts_RE), "the layer routes something else"
        slots_RS = self._padded(step.slots_RS)
        sent_PRRS = np.zeros((1, len(slots_RS), *slots_RS.shape), dtype=np.int64)
        sent_PRRS[0, :, :, : step.slots_RS.shape[1]] = step.sent_RRS
        planner.slots_RS, plan = slots_RS, plan_of_split(planner.view, sent_PRRS, slots_RS)
        takes_part = bool(plan.own_replicas)
        if step.fetch == "now":
            planner._start(self._spare.use(slots_RS, num_passes=1, takes_part=takes_part))
        elif step.fetch == "instead":
            planner._start(self._spare.use_once(slots_RS, takes_part=takes_part))
        return plan

    def _padded(self, slots_RS: Any) -> Any:
        return with_empty_slots(slots_RS, self._spare_slots + self.layer.num_local_experts - slots_RS.shape[1])
