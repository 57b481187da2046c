"""A MoE layer with a flat and with a hierarchical dispatch over shaped links: times, bits, and the model's prediction.

    python -m scripts.validation.hierarchical --nodes 2

Needs root and iproute2: nodes are network namespaces (see `namespaces`), whose links are a tenth as fast as those
inside. Ranks are gloo processes, each with both layers and the same weights.

1. The links: all-to-alls of several sizes among ranks of a node, and between nodes, all ranks at once; a line each.
2. Compute: the experts' inner size is halved until exchanges take 80% of the flat layer's time.
3. Both layers in turns, forward and backward; their outputs and gradients must be equal to the bit.
4. The prediction: the cost model's, from the lines of step 1 and this routing's counts; what is not exchanging is what
   the flat layer was measured to spend outside of its exchanges.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import signal
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from megatron_smartmoe.calibrate.line import LineFit, fit_line
from megatron_smartmoe.cost.dispatchers import Dispatcher
from megatron_smartmoe.cost.hierarchical import hops_fixed_s, rows_by_node
from megatron_smartmoe.cost.moe_layer import (
    ALL_TO_ALLS,
    APART_EXCHANGES,
    LayerConstants,
    LayerFlow,
    exchange_latency_s,
    layer_time,
)
from megatron_smartmoe.spec.arrays import FloatArray, IntArray
from megatron_smartmoe.spec.cluster import LinkSpec
from megatron_smartmoe.spec.parallel import HIERARCHICAL
from scripts.training_bench.one_layer import smart_layer
from scripts.validation import namespaces

ELEMENT_BYTES = 4  # fp32
LARGEST_FFN, WIRE_SHARE = 1024, 0.8
SIZES_BYTES = (2**14, 2**18, 2**20)  # of one rank's all-to-all
REPEATS_OF_A_SIZE = 3
LAUNCH_S = 20e-6  # of a small CPU op


@dataclass(frozen=True, kw_only=True)
class Pass:
    """Seconds of one forward and backward pass of a layer, of the slowest rank, and of its exchanges, the mean rank."""

    whole_s: float
    exchanges_s: float


def main() -> int:
    """Make the namespaces, start the ranks in them, and print what rank 0 found."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--nodes", type=int, default=2, help="namespaces; must divide --ranks")
    parser.add_argument("--ranks", type=int, default=8, help="gloo processes")
    parser.add_argument("--between", default="80mbit", help="rate of a node's card, each direction")
    parser.add_argument("--inside", default="800mbit", help="rate of what ranks of one node send each other")
    parser.add_argument("--tokens", type=int, default=128, help="tokens of a rank")
    parser.add_argument("--hidden", type=int, default=512, help="hidden size")
    parser.add_argument("--experts", type=int, default=64, help="experts")
    parser.add_argument("--top-k", type=int, default=8, help="experts of a token")
    parser.add_argument("--passes", type=int, default=5, help="measured passes of each layer; the median counts")
    options = parser.parse_args()
    if options.ranks % options.nodes or options.experts % options.ranks:
        parser.error("--nodes must divide --ranks, and --ranks must divide --experts")
    if reason := namespaces.why_not():
        print(f"skipped: {reason}")
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the namespaces are removed
    with namespaces.nodes(options.nodes, between=options.between, inside=options.inside) as names:
        return _start(names, options)


def _start(names: list[str], options: argparse.Namespace) -> int:
    """Start every rank in its node and wait for all; when one fails, end the others."""
    os.environ |= {"TORCH_CPP_LOG_LEVEL": "ERROR", "OMP_NUM_THREADS": "1"}
    warnings.filterwarnings("ignore")
    # Imported once, and not by every rank: that takes 3 s of CPU.
    from megatron_smartmoe.adapter import cpu

    cpu.install()

    import megatron_smartmoe.adapter.moe.layer  # noqa: F401

    context = multiprocessing.get_context("fork")
    ranks = [
        context.Process(target=_rank_in_node, args=(names, rank, options), daemon=True) for rank in range(options.ranks)
    ]
    for each in ranks:
        each.start()
    while any(each.is_alive() for each in ranks):
        time.sleep(0.1)
        if any(each.exitcode for each in ranks):
            for each in ranks:
                each.terminate()
    return int(any(each.exitcode for each in ranks))


def _rank_in_node(names: list[str], rank: int, options: argparse.Namespace) -> None:
    per_node = options.ranks // options.nodes
    with Path("/run/netns", names[rank // per_node]).open() as namespace:
        os.setns(namespace.fileno(), os.CLONE_NEWNET)
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(options.ranks),
        "LOCAL_RANK": str(rank % per_node),
        "LOCAL_WORLD_SIZE": str(per_node),
        "MASTER_ADDR": "10.99.0.1",
        "MASTER_PORT": "29500",
        "GLOO_SOCKET_IFNAME": "eth0",
    }
    _rank(rank, options)


def _rank(number: int, options: argparse.Namespace) -> None:
    """Everything that one rank does."""
    import torch
    import torch.distributed as dist
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    parallel_state.initialize_model_parallel(expert_model_parallel_size=options.ranks)
    model_parallel_cuda_manual_seed(1)
    generator = torch.Generator().manual_seed(number)
    rows = torch.randn(options.tokens, 1, options.hidden, generator=generator)
    # Step 1: the links.
    links = {name: _line(number, peers, options) for name, peers in _peers(number, options).items()}
    # Step 2: experts that are small enough.
    ffn = LARGEST_FFN
    while True:
        flat = _layer(options, ffn, dispatch_nodes=1)
        tried = _pass(flat, rows)
        share = tried.exchanges_s / tried.whole_s
        _say(f"experts' inner size {ffn:5d}: exchanges {share:.0%} of {tried.whole_s:.3f} s")
        if share >= WIRE_SHARE or ffn == 8:
            break
        ffn //= 2
    # Step 3: both layers in turns.
    layers = {"flat": flat, "hierarchical": _layer(options, ffn, dispatch_nodes=options.nodes)}
    for name, parameter in layers["hierarchical"].named_parameters():
        parameter.data.copy_(flat.get_parameter(name).data)
    results = {name: _result(layer, rows) for name, layer in layers.items()}
    equal = all(torch.equal(*both) for both in zip(*results.values(), strict=True))
    everywhere = torch.tensor(float(equal))
    dist.all_reduce(everywhere, op=dist.ReduceOp.MIN)
    passes: dict[str, list[Pass]] = {name: [] for name in layers}
    for turn in range(options.passes):
        for name in sorted(layers, reverse=turn % 2 == 1):
            passes[name].append(_pass(layers[name], rows))
    # Step 4: what the model says.
    exchange = layers["hierarchical"].token_dispatcher._sizes
    counted_RN = _gathered(exchange.once_sent_N)
    traffic_RR = _gathered(exchange.sent_NL.ravel()).astype(np.float64)
    if number == 0:
        _report(options, links, passes, traffic_RR, counted_RN, equal=bool(everywhere))
    dist.barrier()
    dist.destroy_process_group()


def _peers(number: int, options: argparse.Namespace) -> dict[str, slice]:
    """The ranks with which this rank exchanges to measure each kind of link."""
    per_node = options.ranks // options.nodes
    node, place = divmod(number, per_node)
    return {"inside": slice(node * per_node, (node + 1) * per_node), "between": slice(place, None, per_node)}


def _line(number: int, peers: slice, options: argparse.Namespace) -> LineFit:
    """Seconds by bytes that a rank sends to others, all ranks at once."""
    import torch
    import torch.distributed as dist

    others = [rank for rank in range(options.ranks)[peers] if rank != number]
    sizes, seconds = [], []
    for size_bytes in SIZES_BYTES:
        each = size_bytes // ELEMENT_BYTES // len(others)
        split_R = [each if rank in others else 0 for rank in range(options.ranks)]
        sent = torch.zeros(sum(split_R))
        times = []
        for _ in range(REPEATS_OF_A_SIZE):
            dist.barrier()
            began = time.perf_counter()
            dist.all_to_all_single(torch.empty_like(sent), sent, split_R, split_R)
            times.append(_over_ranks(time.perf_counter() - began, dist.ReduceOp.MAX))
        sizes.append(float(sent.numel() * ELEMENT_BYTES))
        seconds.append(statistics.median(times))
    return fit_line(sizes, seconds)


def _layer(options: argparse.Namespace, ffn: int, dispatch_nodes: int) -> Any:
    """A layer of this project's, with experts of one inner size."""
    return smart_layer(
        ranks=options.ranks,
        experts=options.experts,
        hidden=options.hidden,
        ffn=ffn,
        dispatch_nodes=dispatch_nodes,
        moe_router_topk=options.top_k,
    )


def _result(layer: Any, rows: Any) -> list[Any]:
    """The layer's output for rows, and the gradients of a loss that weighs its elements differently."""
    inputs = rows.clone().requires_grad_()
    output = layer(inputs)[0]
    (output * output.detach().cos()).sum().backward()
    gradients = [parameter.grad.clone() for parameter in layer.parameters()]
    layer.zero_grad(set_to_none=True)
    return [output.detach(), inputs.grad, *gradients]


def _pass(layer: Any, rows: Any) -> Pass:
    """One pass, timed from a barrier on."""
    import torch.distributed as dist

    dist.barrier()
    with _timed_exchanges() as seconds:
        began = time.perf_counter()
        _result(layer, rows)
        whole_s = time.perf_counter() - began
    return Pass(
        whole_s=_over_ranks(whole_s, dist.ReduceOp.MAX),
        exchanges_s=_over_ranks(sum(seconds), dist.ReduceOp.SUM) / dist.get_world_size(),
    )


@contextmanager
def _timed_exchanges() -> Iterator[list[float]]:
    """Yields the seconds of every collective in the block, as they end."""
    import torch.distributed as dist

    seconds: list[float] = []

    def timed(call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            result = call(*args, **kwargs)
            seconds.append(time.perf_counter() - began)
            return result

        return run

    with ExitStack() as patched:
        for name in ("all_to_all_single", "all_gather_into_tensor"):
            patched.enter_context(mock.patch.object(dist, name, timed(getattr(dist, name))))
        yield seconds


def _over_ranks(value: float, operation: Any) -> float:
    import torch
    import torch.distributed as dist

    tensor = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(tensor, op=operation)
    return float(tensor)


def _gathered(own: IntArray) -> IntArray:
    """The rows of all ranks."""
    import torch
    import torch.distributed as dist

    rows = torch.empty(dist.get_world_size(), len(own), dtype=torch.int64)
    dist.all_gather_into_tensor(rows.view(-1), torch.from_numpy(np.ascontiguousarray(own)))
    return np.asarray(rows.numpy())


def _predicted(
    options: argparse.Namespace, links: dict[str, LineFit], traffic_RR: FloatArray, compute_s: float
) -> dict[str, float]:
    """Seconds of a pass by dispatch, by the cost model."""
    token_bytes, per_node = options.hidden * ELEMENT_BYTES, options.ranks // options.nodes
    slow = LinkSpec(bandwidth_bytes_s=1 / links["between"].unit_s, latency_s=links["between"].fixed_s)
    constants = LayerConstants(
        fixed_s=compute_s + exchange_latency_s(slow, options.ranks, APART_EXCHANGES),
        intra_token_s=ALL_TO_ALLS * token_bytes * links["inside"].unit_s,
        inter_node_token_s=ALL_TO_ALLS * token_bytes * links["between"].unit_s / per_node,  # the ranks share a card
    )
    flow = LayerFlow(
        load_ER=np.zeros((options.experts, options.ranks)),
        traffic_RR=traffic_RR,
        replicas_RR=np.zeros_like(traffic_RR),
        num_nodes=options.nodes,
    )
    two_hops = Dispatcher(name=HIERARCHICAL, experts=options.experts, top_k=options.top_k)
    hops_s = hops_fixed_s(slow, options.ranks, LAUNCH_S)
    return {
        "flat": layer_time(flow, constants).total_s,
        "hierarchical": layer_time(flow, constants, dispatcher=two_hops).total_s + hops_s,
    }


def _report(
    options: argparse.Namespace,
    links: dict[str, LineFit],
    passes: dict[str, list[Pass]],
    traffic_RR: FloatArray,
    counted_RN: IntArray,
    *,
    equal: bool,
) -> None:
    median_s = {name: statistics.median(one.whole_s for one in each) for name, each in passes.items()}
    wire_s = statistics.median(one.exchanges_s for one in passes["flat"])
    predicted_s = _predicted(options, links, traffic_RR, median_s["flat"] - wire_s)
    foreign_RN = np.arange(options.ranks)[:, None] * options.nodes // options.ranks != np.arange(options.nodes)
    formula_RN = rows_by_node(_by_node(traffic_RR, options.nodes), options.experts, options.top_k)
    for name, line in links.items():
        print(f"{name:8}: {1e-6 / line.unit_s:7.2f} MB/s of a rank, {line.fixed_s * 1e3:.2f} ms an all-to-all")
    print(
        f"rows between nodes: flat {_by_node(traffic_RR, options.nodes)[foreign_RN].sum():.0f}, hierarchical "
        f"{counted_RN[foreign_RN].sum()}, by the formula {formula_RN[foreign_RN].sum():.0f}"
    )
    print(f"outputs and gradients equal to the bit: {'yes' if equal else 'NO'}")
    print(f"exchanges take {wire_s / median_s['flat']:.0%} of the flat layer's time")
    for name, measured_s in median_s.items():
        spread = f"{min(one.whole_s for one in passes[name]):.3f} to {max(one.whole_s for one in passes[name]):.3f}"
        off = predicted_s[name] / measured_s - 1
        print(f"{name:12}: measured {measured_s:.3f} s ({spread}), predicted {predicted_s[name]:.3f} s ({off:+.1%})")
    gains = {kind: each["flat"] / each["hierarchical"] for kind, each in (("m", median_s), ("p", predicted_s))}
    print(f"flat / hierarchical: measured {gains['m']:.3f}, predicted {gains['p']:.3f}")
    print(json.dumps({"nodes": options.nodes, "equal": equal, "measured_s": median_s, "predicted_s": predicted_s}))


def _by_node(traffic_RR: FloatArray, num_nodes: int) -> FloatArray:
    return np.asarray(traffic_RR.reshape(len(traffic_RR), num_nodes, -1).sum(axis=2))


def _say(text: str) -> None:
    if os.environ["RANK"] == "0":
        print(text, flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
