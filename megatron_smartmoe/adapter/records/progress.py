"""This rank's progress record while Megatron trains, and the watchdog where no launcher runs one.

Ranks that the launcher starts find their record's place in the environment, and the launcher watches them. Without the
launcher (torchrun, a Slurm task per rank) the first rank of each node holds the records of its node and runs the
watchdog in a thread; then a start-up is not watched, and neither is the first rank of a node that is stopped itself.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import sys
from argparse import Namespace
from contextlib import AbstractContextManager
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from megatron.core.transformer.transformer_layer import TransformerLayer

from megatron_smartmoe.adapter.hooks import Callback, Order
from megatron_smartmoe.adapter.moe.routers import is_prediction
from megatron_smartmoe.adapter.records.operations import Operations
from megatron_smartmoe.adapter.run import Run
from megatron_smartmoe.runtime.progress import VARIABLE, Pass, Phase, ProgressRecord, ProgressTable, Word
from megatron_smartmoe.runtime.watchdog.nodes import Address, Nodes
from megatron_smartmoe.runtime.watchdog.watch import Watchdog

# A signal that neither Megatron, Slurm, CUDA nor Python uses; it is only ever sent once a handler is in place.
STACK_SIGNAL = signal.SIGRTMIN + 10

_LAYER, _PASS = int(Word.LAYER), int(Word.PASS)


class ProgressRecorder(Callback):
    """Keeps this rank's record: phases, iterations, layers, and the operations of all process groups.

    Args:
        args: Megatron's arguments.

    Attributes:
        record: this rank's; None before it is begun, and where it cannot be.
    """

    order = Order.PROGRESS
    of_this_process: ClassVar[ProgressRecorder | None] = None

    def __init__(self, args: Namespace) -> None:
        ProgressRecorder.of_this_process = self
        self._floor_s: float = args.smartmoe_watchdog_floor_s
        self.record: ProgressRecord | None = None
        self._watchdog: Watchdog | None = None
        self._compilation: AbstractContextManager[None] | None = None
        table = os.environ.pop(VARIABLE, None)  # this rank's alone, and not of what it starts
        self._has_launcher = table is not None
        if table is not None:
            self._begin(table)

    def _begin(self, table: str) -> None:
        rank, local_rank = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])
        try:
            self.record = ProgressRecord(table, local_rank, rank=rank, floor_s=self._floor_s)
            stacks = os.memfd_create("smartmoe-stacks")
        except OSError as error:
            print(f"smartmoe: rank {rank} is not watched: {error}", file=sys.stderr, flush=True)
            return
        faulthandler.register(STACK_SIGNAL, file=stacks, all_threads=True)
        self.record.accept_stack_signal(STACK_SIGNAL, stacks)
        self._operations = Operations(self.record)
        self._operations.install()

    def on_start(self, run: Run) -> None:
        """Put hooks on the layers; without a launcher, begin to record and to watch."""
        if not self._has_launcher:
            self._begin_without_launcher(run)
        if self.record is None:
            return
        if (getattr(run.args, "cuda_graph_impl", None) or "none") == "none":  # Megatron allows no hooks in its graphs
            for chunk in run.chunks:
                note_layers(chunk, self.record)
        self._note_compilation()

    def _begin_without_launcher(self, run: Run) -> None:
        size = int(os.environ.get("LOCAL_WORLD_SIZE", "0"))
        if size == 0:
            if run.is_reporter:
                print("smartmoe: no watchdog: LOCAL_WORLD_SIZE is not set; torchrun sets it.", flush=True)
            return
        local_rank = int(os.environ["LOCAL_RANK"])
        node, num_nodes = run.ranks.rank // size, dist.get_world_size() // size
        store: Any = dist.distributed_c10d._get_default_store()
        key = f"smartmoe/progress/{node}"
        if local_rank:
            self._begin(store.get(key).decode())
            return
        table = ProgressTable(size)
        store.set(key, table.path)
        self._begin(table.path)
        nodes = None
        if num_nodes > 1:
            address = Address(host=os.environ["MASTER_ADDR"], port=int(os.environ["MASTER_PORT"]))
            nodes = Nodes(address, node=node, num_nodes=num_nodes)
        self._watchdog = Watchdog(table, run_dir=run.directory, say=_print, nodes=nodes)
        self._watchdog.start()

    def before_step(self, iteration: int) -> None:
        """A step begins."""
        if self.record is not None:
            self._operations.forget()
            self.record.begin_step(iteration)

    def around_changes(self, iteration: int) -> AbstractContextManager[None]:
        """Moving experts has a limit of its own."""
        return self._within(Phase.CHANGES)

    def around_saving(self) -> AbstractContextManager[None]:
        """So have saves."""
        return self._within(Phase.SAVE)

    def around_evaluation(self, split: str) -> AbstractContextManager[None]:
        """So have evaluations."""
        return self._within(Phase.EVALUATION)

    def _within(self, phase: Phase) -> AbstractContextManager[None]:
        return self.record.within(phase) if self.record is not None else contextlib.nullcontext()

    def _note_compilation(self) -> None:
        """And torch's compiler, wherever it begins to compile. It is loaded by now if this run compiles anything."""
        compiler = sys.modules.get("torch._dynamo.callback")
        if compiler is None:
            return

        def start(_: object) -> None:
            self._compilation = self._within(Phase.COMPILATION)
            self._compilation.__enter__()

        def end(_: object) -> None:
            if self._compilation is not None:
                self._compilation.__exit__(None, None, None)
                self._compilation = None

        compiler.callback_handler.register_start_callback(start)
        compiler.callback_handler.register_end_callback(end)

    def on_end(self) -> None:
        """The end of a run is a phase too; the process goes on to close its process groups."""
        if self.record is not None:
            self.record.enter(Phase.ENDING)
        if self._watchdog is not None:
            self._watchdog.stop()


def _print(text: str) -> None:
    print(f" smartmoe: {text}", flush=True)


def note_layers(chunk: torch.nn.Module, record: ProgressRecord) -> None:
    """Note in which layer the rank is, in both passes.

    The backward pass is seen by hooks on the gradients of layers' outputs, which change nothing in the graph. Layers of
    multi-token prediction are numbered after those of the decoder.
    """
    layers = [module for module in chunk.modules() if isinstance(module, TransformerLayer)]
    words = record.words

    def hooks_of(layer: int, *, is_first: bool) -> tuple[Any, Any]:
        def forward(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            words[_LAYER], words[_PASS] = layer, _FORWARD
            if is_first:
                hidden = args[0] if args else kwargs.get("hidden_states")
                if isinstance(hidden, torch.Tensor) and hidden.requires_grad:
                    hidden.register_hook(leave)  # type: ignore[no-untyped-call]

        def leave_forward(module: torch.nn.Module, args: Any, output: Any) -> None:
            words[_LAYER] = 0
            hidden = output[0] if isinstance(output, tuple) else output
            if isinstance(hidden, torch.Tensor) and hidden.requires_grad:
                hidden.register_hook(backward)  # type: ignore[no-untyped-call]

        def backward(gradient: torch.Tensor) -> None:
            words[_LAYER], words[_PASS] = layer, _BACKWARD

        def leave(gradient: torch.Tensor) -> None:
            words[_LAYER] = 0

        return forward, leave_forward

    for index, layer in enumerate(layers):
        number = int(layer.layer_number) + is_prediction(layer) * layer.config.num_layers
        enter, leave = hooks_of(number, is_first=index == 0)
        layer.register_forward_pre_hook(enter, with_kwargs=True)
        layer.register_forward_hook(leave)


_FORWARD, _BACKWARD = int(Pass.FORWARD), int(Pass.BACKWARD)
