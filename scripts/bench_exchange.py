#!/usr/bin/env python3
"""CPU time of one MoE layer whose rows and weights are exchanged together, and apart.

    OMP_NUM_THREADS=1 .venv/bin/python scripts/bench_exchange.py [--repeats N] [--tokens T] [--hidden H] ...

Two gloo ranks run the same layer both ways in turns, forward and backward. Counted is the thread CPU time of rank 0,
which waiting for messages does not add to, nor what gloo's own threads do. Other load on the machine only makes a pass
slower, so the ratio of the two minima is reported, with the 95% interval of that ratio over bootstrap samples.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout, when the script is run by its path

from scripts.training_bench.one_layer import smart_layer

RANKS, SAMPLES, WARM_UP = 2, 2000, 5


def main() -> None:
    """Run both ways in turns on two ranks and print what rank 0 found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=100, help="passes of each way")
    parser.add_argument("--tokens", type=int, default=512, help="tokens of a rank")
    parser.add_argument("--hidden", type=int, default=256, help="hidden size")
    parser.add_argument("--ffn", type=int, default=64, help="FFN size of an expert")
    parser.add_argument("--experts", type=int, default=16, help="experts")
    parser.add_argument("--top-k", type=int, default=4, help="experts of a token")
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

    from megatron_smartmoe.adapter.moe.dispatcher import SlotDispatcher

    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS)
    parallel_state.initialize_model_parallel(expert_model_parallel_size=RANKS)
    model_parallel_cuda_manual_seed(1)
    sizes = {"experts": options.experts, "hidden": options.hidden, "ffn": options.ffn}
    layer = smart_layer(ranks=RANKS, moe_router_topk=options.top_k, **sizes)
    rows = torch.randn(options.tokens, 1, options.hidden, generator=torch.Generator().manual_seed(rank))
    seconds: dict[bool, list[float]] = {True: [], False: []}
    for repeat in range(options.repeats + WARM_UP):
        for together in (True, False) if repeat % 2 else (False, True):
            inputs = rows.clone().requires_grad_()
            with mock.patch.object(SlotDispatcher, "packs", together):
                began = time.thread_time()
                layer(inputs)[0].sum().backward()
                seconds[together].append(time.thread_time() - began)
            layer.zero_grad(set_to_none=True)
    if rank == 0:
        _print(np.array(seconds[True][WARM_UP:]), np.array(seconds[False][WARM_UP:]), options)


def _print(together: np.ndarray, apart: np.ndarray, options: argparse.Namespace) -> None:
    draw = np.random.default_rng(0).integers(0, len(apart), (2, SAMPLES, len(apart)))
    low, high = np.quantile(together[draw[0]].min(axis=1) / apart[draw[1]].min(axis=1), [0.025, 0.975])
    print(", ".join(f"{name} {value}" for name, value in vars(options).items()))
    print(f"together {together.min() * 1e3:.3f} ms, apart {apart.min() * 1e3:.3f} ms (minima)")
    print(f"together / apart: {together.min() / apart.min():.4f}, 95% interval {low:.4f} to {high:.4f}")


if __name__ == "__main__":
    main()
