"""One rank of a run: Megatron's pretraining with timers around each step and around the experts.

CPU time is the process's (all threads, gloo's among them): what a step would take with a core for each rank, as far as
ranks do not wait. The experts' time is the main thread's, in their forward pass and between the gradients of their
output and of their input; waiting for messages takes no CPU time.
"""

from __future__ import annotations

import os
import resource
import time
from pathlib import Path
from typing import Any

import numpy as np

FIELDS = ("wall_s", "cpu_s", "experts_s", "faults")


def main(variant: str, run_dir: Path, flags: list[str]) -> None:
    """Train, and write the times of this rank, `[step, field]`."""
    from megatron_smartmoe.adapter.hooks import Callback, Order
    from megatron_smartmoe.adapter.pretrain import main as pretrain
    from megatron_smartmoe.spec.cluster import load_cluster_spec
    from scripts.training_bench.peers import PEERS, RuleInExecutor, rule_of

    experts, rows, peers = ExpertClock(), list[tuple[float, ...]](), list[RuleInExecutor]()

    class Start(Callback):
        order = Order.REPLAY  # before what the loops do ahead of a step

        def on_start(self, run: Any) -> None:
            for _, layer in run.layers:
                experts.watch(layer.experts)
            if variant in PEERS:
                hidden, ffn = run.args.hidden_size, run.args.moe_ffn_hidden_size
                peers.append(RuleInExecutor(rule_of(variant, load_cluster_spec(Path("cpu")), hidden=hidden, ffn=ffn)))
                peers[0].install()  # not before Megatron may be imported

        def before_step(self, iteration: int) -> None:
            self.began = time.perf_counter(), time.process_time(), experts.seconds, _faults()

    class Stop(Callback):
        order = Order.LAST

        def after_step(self, iteration: int, losses: Any) -> None:
            ended = time.perf_counter(), time.process_time(), experts.seconds, _faults()
            rows.append(tuple(after - before for after, before in zip(ended, start.began, strict=True)))

    start = Start()
    pretrain(flags, callbacks=[start, Stop()])
    if peers and not peers[0].plans:
        raise SystemExit("training never asked the peer's rule for a plan")
    np.save(run_dir / f"times{os.environ['RANK']}.npy", np.array(rows))


def _faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


class ExpertClock:
    """Thread CPU seconds in the experts of all layers.

    The rows of home and spare slots may be two blocks, whose backward passes overlap as far as hooks can tell: the
    clock runs while anything is open.
    """

    def __init__(self) -> None:
        self.seconds, self._open, self._began = 0.0, 0, 0.0

    def watch(self, experts: Any) -> None:
        """Time a layer's experts, forward and backward."""

        def before(module: Any, inputs: Any) -> None:
            for rows in _blocks(inputs[0]):
                if rows.requires_grad:
                    rows.register_hook(lambda gradient: self._end())
            self._begin()

        def after(module: Any, inputs: Any, output: Any) -> None:
            self._end()
            for rows in _blocks(output[0]):
                if rows.requires_grad:
                    rows.register_hook(lambda gradient: self._begin())

        experts.register_forward_pre_hook(before)
        experts.register_forward_hook(after)

    def _begin(self) -> None:
        if self._open == 0:
            self._began = time.thread_time()
        self._open += 1

    def _end(self) -> None:
        self._open -= 1
        if self._open == 0:
            self.seconds += time.thread_time() - self._began


def _blocks(rows: Any) -> tuple[Any, ...]:
    """Rows in one tensor, or in blocks."""
    return rows if isinstance(rows, tuple) else (rows,)
