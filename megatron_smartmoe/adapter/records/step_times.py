"""Times and counts of each training step on this rank, by hooks on the MoE layers, our own and stock Megatron's.

A hook switches the clock of the step (`runtime.step_clock`) where a layer or its experts begin and end. In the backward
pass it is the gradient of a layer's output that begins it, and that of its input that ends it. The hooks return
nothing, so that neither the graph nor a number in it changes.

The experts are called with the rows of each of their slots: that is all that is counted. Passes without gradients
(evaluation, the first pass of recomputation) count no rows, so that each row counts once.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from megatron.core.transformer.moe.moe_layer import MoELayer

from megatron_smartmoe.adapter.run import Run
from megatron_smartmoe.cost.fitted import Part
from megatron_smartmoe.runtime.step_clock import STEP_CLOCK, Mark, has_passed, seconds_of
from megatron_smartmoe.spec.arrays import FloatArray, IntArray


@dataclass(frozen=True, kw_only=True)
class Call:
    """One call of a layer's experts.

    Attributes:
        layer: its number.
        rows_S: rows of each slot, home slots first.
        home_slots: S, those of homes.
        port_tokens: rows that this rank sent to other ranks or received from them, the greater of the two, in the mean
            of the layer's exchanges.
    """

    layer: int
    rows_S: torch.Tensor
    home_slots: int
    port_tokens: int | None


@dataclass(frozen=True, kw_only=True, eq=False)
class Step:
    """A step as it was measured.

    Attributes:
        iteration: its number.
        marks: of the clock; empty once they are read. On a GPU they are events that may not have passed yet.
        seconds: of each part; None until they are read.
        calls: of all layers' experts.
    """

    iteration: int
    marks: list[Mark]
    calls: list[Call]
    seconds: tuple[float, ...] | None = None

    @property
    def seconds_P(self) -> FloatArray:
        """Seconds of each part. On a GPU the step must have passed."""
        return np.array(self.seconds if self.seconds is not None else seconds_of(self.marks))


@dataclass(frozen=True, kw_only=True, eq=False)
class Units:
    """Counts of one step on one rank, by layer and micro-batch; chunks of an all-to-all are added up.

    Attributes:
        layer_U: number of the layer.
        counts_U3: rows, slots with rows, rows over the port.
        calls: of the experts.
        replicas: slots of replicas with rows, all units together.
    """

    layer_U: IntArray
    counts_U3: IntArray
    calls: int
    replicas: int


class StepTimes:
    """Puts the hooks on, and collects steps until `take`.

    Args:
        run: the run, whose layers are watched.
    """

    def __init__(self, run: Run) -> None:
        self._on_gpu = torch.cuda.is_available()
        self._ep_rank, self._ep_size = run.ranks.ep_rank, run.ranks.ep_size
        self._calls: list[Call] = []
        self._steps: list[Step] = []
        # Megatron's schedule of two micro-batches calls the steps of a layer one by one, and never the layer
        in_steps = bool(getattr(run.args, "overlap_moe_expert_parallel_comm", False))
        for number, layer in run.layers:
            if not in_steps:
                _watch(layer, begins=Part.DISPATCH, around=Part.OUTSIDE)
            _watch(layer.experts, begins=Part.EXPERTS, around=Part.OUTSIDE if in_steps else Part.DISPATCH)
            layer.experts.register_forward_pre_hook(self._counting(number, layer))

    def begin(self) -> None:
        """A step begins."""
        self._calls = []
        STEP_CLOCK.start(on_gpu=self._on_gpu)

    def end(self, iteration: int) -> None:
        """The step has ended; one that was not begun is not counted."""
        if marks := STEP_CLOCK.stop():
            self._steps.append(Step(iteration=iteration, marks=marks, calls=self._calls))
        self._calls = []
        for at, step in enumerate(self._steps):  # thousands of events a step: they are given back as soon as they can
            if step.seconds is None and has_passed(step.marks):
                self._steps[at] = replace(step, marks=[], seconds=tuple(seconds_of(step.marks)))

    def take(self) -> list[Step]:
        """The steps since the last call."""
        steps, self._steps = self._steps, []
        return steps

    def _counting(self, number: int, layer: MoELayer) -> Any:
        def count(experts: torch.nn.Module, inputs: tuple[Any, ...]) -> None:
            if not STEP_CLOCK.is_running or not torch.is_grad_enabled():
                return
            call = Call(
                layer=number,
                rows_S=inputs[1].clone(),  # a plan may lie in memory that the next one overwrites
                home_slots=layer.num_local_experts,
                port_tokens=self._port_tokens(layer.token_dispatcher),
            )
            self._calls.append(call)

        return count

    def _port_tokens(self, dispatcher: Any) -> int | None:
        """Rows over this rank's port, where the dispatcher has the sizes of its all-to-all on the host."""
        in_two_hops: int | None = getattr(dispatcher, "port_rows", None)
        if in_two_hops is not None:
            return in_two_hops
        found = []
        for name in ("input_splits", "output_splits"):
            sizes = getattr(dispatcher, name, None)
            if sizes is None or (isinstance(sizes, torch.Tensor) and not sizes.is_cpu):
                return None
            rows_R = np.asarray(sizes)
            found.append(int(rows_R.sum() - rows_R[self._ep_rank]))
        return max(found)

    def units_of(self, step: Step, micro_batches: int) -> Units:
        """The counts of a step."""
        # Step 1: rows by call; those that lie on the device come to the host together.
        rows = [call.rows_S for call in step.calls]
        on_host = torch.cat([each.flatten() for each in rows]).cpu().numpy() if rows else np.zeros(0, dtype=np.int64)
        ends = np.cumsum([each.numel() for each in rows]).tolist()
        table, replicas = np.zeros((len(rows), 3), dtype=np.int64), 0
        for at, (call, begin, end) in enumerate(zip(step.calls, [0, *ends], ends, strict=False)):
            rows_S = on_host[begin:end]
            sent_away = rows_S.sum() * (self._ep_size - 1) // self._ep_size  # where the dispatcher does not say
            table[at] = rows_S.sum(), (rows_S > 0).sum(), sent_away if call.port_tokens is None else call.port_tokens
            replicas += int((rows_S[call.home_slots :] > 0).sum())
        # Step 2: chunks of one micro-batch and layer together; each of them has noted the port of all.
        layer_C = np.array([call.layer for call in step.calls], dtype=np.int64)
        layers, parts = [], []
        for layer in np.unique(layer_C).tolist():
            own_C3 = table[layer_C == layer]
            chunks = len(own_C3) // micro_batches if len(own_C3) % micro_batches == 0 else 1
            chunked_UC3 = own_C3.reshape(-1, chunks, 3)
            port_U = chunked_UC3[:, :, 2].max(axis=1)
            parts.append(np.column_stack((chunked_UC3[:, :, :2].sum(axis=1), port_U)))
            layers.append(np.full(len(port_U), layer))
        return Units(
            layer_U=np.concatenate(layers) if layers else np.zeros(0, dtype=np.int64),
            counts_U3=np.concatenate(parts) if parts else np.zeros((0, 3), dtype=np.int64),
            calls=len(rows),
            replicas=replicas,
        )


def _watch(module: torch.nn.Module, *, begins: Part, around: Part) -> None:
    """Switch the clock where a module begins and ends, in both passes.

    Args:
        module: the first of its inputs and of its outputs carry the gradients.
        begins: the part that it is.
        around: the part that it lies in.
    """

    def enter(part: Part) -> Any:
        return lambda gradient: STEP_CLOCK.enter(part)

    def enter_backward(rows: Any, part: Part) -> None:
        for block in rows if isinstance(rows, tuple) else (rows,):  # experts may get home rows and spare rows apart
            if STEP_CLOCK.is_running and isinstance(block, torch.Tensor) and block.requires_grad:
                block.register_hook(enter(part))  # type: ignore[no-untyped-call]

    def before(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        enter_backward(args[0] if args else next(iter(kwargs.values()), None), around)
        STEP_CLOCK.enter(begins)

    def after(module: torch.nn.Module, inputs: Any, output: Any) -> None:
        STEP_CLOCK.enter(around)
        enter_backward(output[0] if isinstance(output, tuple) else output, begins)

    module.register_forward_pre_hook(before, with_kwargs=True)
    module.register_forward_hook(after)
