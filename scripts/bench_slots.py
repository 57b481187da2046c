#!/usr/bin/env python3
"""CPU time of one MoE layer with replicas: physical slots with an all-to-all, and this project's fused all-to-all.

    OMP_NUM_THREADS=1 .venv/bin/python scripts/bench_slots.py [--repeats N] [--tokens T] [--hidden H] ...

Two gloo ranks hold three layers, with the same weights, and run them in turns, forward and backward, with a replica
planned for each micro-batch. In two of them a dispatcher gets physical slots, which it need not know for what they are:
Megatron's, and one with this project's kernels for the permutations, which is made here alone: what differs from the
fused all-to-all is then what physical slots cost, and no permutation.
Counted is the thread CPU time of rank 0, which waiting for messages does not add to.
Other load on the machine only makes a repeat slower, so the ratio of two minima is reported, with the 95% interval of
that ratio over bootstrap samples of the repeats; and the share of `PhysicalSlots.translate`, which is all that physical
slots add to a dispatcher.
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout, when the script is run by its path

from scripts.training_bench.one_layer import smart_layer

RANKS, SAMPLES = 2, 2000
FUSED, OWN, MEGATRONS = "own all-to-all", "physical slots, own permutation", "physical slots, Megatron's all-to-all"


def main() -> None:
    """Run both layers in turns on two ranks and print what rank 0 found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=200, help="passes of each layer")
    parser.add_argument("--tokens", type=int, default=512, help="tokens of a rank")
    parser.add_argument("--hidden", type=int, default=512, help="hidden size")
    parser.add_argument("--ffn", type=int, default=1024, help="FFN size of an expert")
    parser.add_argument("--experts", type=int, default=16, help="logical experts")
    parser.add_argument("--top-k", type=int, default=4, help="experts of a token")
    parser.add_argument("--spare-slots", type=int, default=1, help="spare slots of a rank")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(_rank, (options, f"{folder}/store"), nprocs=RANKS)


def _rank(rank: int, options: argparse.Namespace, store: str) -> None:
    os.environ.update(GLOO_SOCKET_IFNAME="lo")
    from megatron_smartmoe.adapter import cpu

    cpu.install()
    torch.set_num_threads(1)
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS)
    parallel_state.initialize_model_parallel(expert_model_parallel_size=RANKS)
    model_parallel_cuda_manual_seed(1)
    layers = {name: _layer(options, name) for name in (FUSED, OWN, MEGATRONS)}
    for layer in layers.values():
        for name, parameter in layer.named_parameters():
            parameter.data.copy_(layers[FUSED].get_parameter(name).data)
    seconds, translating_s = _measure(layers, options)
    if rank == 0:
        _print(seconds, translating_s, options)


def _own_kernels() -> Callable[[type], Any]:
    """In the place of `with_slots`: this project's all-to-all, which takes the slots for experts."""
    from megatron_smartmoe.adapter.moe.dispatcher import SlotDispatcher
    from megatron_smartmoe.adapter.moe.physical_slots import with_slots

    class OwnKernels(with_slots(SlotDispatcher)):  # type: ignore[misc]
        slot_of_expert_E: torch.Tensor

        def dispatch_preprocess(self, hidden: torch.Tensor, routing_map: torch.Tensor, probs: torch.Tensor) -> Any:
            probs, routing_map = self.slots.translate(probs, routing_map, self.slot_of_expert_E)
            self.slot_of_expert_E = torch.arange(self.num_experts)
            return SlotDispatcher.dispatch_preprocess(self, hidden, routing_map, probs)

        def home_rows(self, tokens_S: torch.Tensor) -> int | None:
            return int(tokens_S[: self.planner.view.home_slots].sum()) if self.planner.uses_replicas else None

    return lambda _: functools.partial(OwnKernels, counts_on_device=True)


def _layer(options: argparse.Namespace, name: str) -> Any:
    """A layer with spare slots, whose replicas are planned for each micro-batch."""
    from megatron.core import parallel_state

    from megatron_smartmoe.adapter.moe import physical_slots
    from megatron_smartmoe.adapter.moe.layer import SmartMoELayer
    from megatron_smartmoe.runtime.replicas.dispatch_plan import ExactOptions
    from megatron_smartmoe.runtime.replicas.slots import SpareSlots
    from megatron_smartmoe.runtime.replicas.wire import ReplicaWire

    with mock.patch.object(SmartMoELayer, "_has_own_all_to_all", return_value=name == FUSED):
        layer = smart_layer(
            ranks=RANKS,
            experts=options.experts,
            hidden=options.hidden,
            ffn=options.ffn,
            moe_router_topk=options.top_k,
        )
    weights = (layer.experts.weight1, layer.experts.weight2)
    totals = [torch.zeros_like(weight) for weight in weights]
    wire = ReplicaWire(parallel_state.get_expert_model_parallel_group())
    spare = SpareSlots(weights, options.spare_slots, wire, lambda: totals, keeps=False)
    kernels = mock.patch.object(physical_slots, "with_slots", _own_kernels()) if name == OWN else nullcontext()
    with kernels:
        layer.add_replicas(spare, exact=ExactOptions(used_slots=options.spare_slots, limit=1.0))
    return layer


def _measure(layers: dict[str, Any], options: argparse.Namespace) -> tuple[dict[str, list[float]], list[float]]:
    """Thread CPU seconds of each pass of each layer, and of each translation."""
    from megatron_smartmoe.adapter.moe.physical_slots import PhysicalSlots

    seconds, translating_s = defaultdict[str, list[float]](list), list[float]()
    translate: Callable[..., Any] = PhysicalSlots.translate

    def timed(*args: Any) -> Any:
        began = time.thread_time()
        maps = translate(*args)
        translating_s.append(time.thread_time() - began)
        return maps

    rows = torch.randn(options.tokens, 1, options.hidden, generator=torch.Generator().manual_seed(dist.get_rank()))
    outputs = {}
    with mock.patch.object(PhysicalSlots, "translate", timed):
        for repeat in range(options.repeats + 5):
            for name in sorted(layers, reverse=repeat % 2 == 0):
                inputs = rows.clone().requires_grad_()
                began = time.thread_time()
                outputs[name] = layers[name](inputs)[0]
                outputs[name].sum().backward()
                seconds[name].append(time.thread_time() - began)
                layers[name].zero_grad(set_to_none=True)
    for output in outputs.values():
        torch.testing.assert_close(output, outputs[FUSED])
    return {name: passes[5:] for name, passes in seconds.items()}, translating_s[5:]


def _print(seconds: dict[str, list[float]], translating_s: list[float], options: argparse.Namespace) -> None:
    times = {name: np.array(passes) for name, passes in seconds.items()}
    fused = times[FUSED]
    draw = np.random.default_rng(0).integers(0, len(fused), (2, SAMPLES, len(fused)))
    print(", ".join(f"{name} {value}" for name, value in vars(options).items()))
    print(f"{FUSED}: {fused.min() * 1e3:.2f} ms (minimum)")
    for name in (OWN, MEGATRONS):
        slots = times[name]
        low, high = np.quantile(slots[draw[0]].min(axis=1) / fused[draw[1]].min(axis=1), [0.025, 0.975])
        ratio = f"{slots.min() / fused.min():.4f}, 95% interval {low:.4f} to {high:.4f}"
        print(f"{name}: {slots.min() * 1e3:.2f} ms, of the fused one {ratio}")
    share = min(translating_s) / fused.min()
    print(f"the translation alone: {min(translating_s) * 1e3:.3f} ms, {share:.2%} of the layer")


if __name__ == "__main__":
    main()
