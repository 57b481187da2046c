"""This rank's experts in the form that the exchange needs: from Megatron's modules and optimizer to layouts and pieces.

Three kinds of expert modules are supported. In `SlottedExperts` an expert is a row of two 3-D parameters; in
SequentialMLP and TEGroupedMLP every expert has its own parameters, or in the latter a row of one for all
(--moe-single-grouped-weight). Either way an expert is a list of (parameter, flat
range), and what the optimizer holds of that range is its state.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_smartmoe.adapter.migration.optimizer_state import MAIN, ParameterState, check_optimizer, parameter_states
from megatron_smartmoe.errors import CompatError, ConfigError, MigrationError
from megatron_smartmoe.placement.transfers import LayerLayout, TensorLayout
from megatron_smartmoe.runtime.migration.expert_tensors import LayerState
from megatron_smartmoe.runtime.migration.wire import PeerError, Wire, group_timeout_s
from megatron_smartmoe.spec.arrays import IntArray

_TYPE_OF_SIZE = {1: torch.uint8, 2: torch.int16, 4: torch.float32, 8: torch.float64}  # for tensors without elements
_PER_EXPERT = re.compile(r"(?P<kind>.*\.(?:weight|bias))(?P<slot>\d+)")  # TEGroupedMLP: linear_fc1.weight3
_PACKED_BIASES = ("linear_fc1.bias", "linear_fc2.bias")  # TEGroupedMLP's, with --moe-single-grouped-bias


@dataclass(frozen=True, kw_only=True, eq=False)
class Piece:
    """Elements [start, stop) of a flat parameter: one of the weights of the expert in a slot."""

    name: str
    parameter: torch.nn.Parameter
    start: int
    stop: int


def slot_pieces(experts: torch.nn.Module, num_slots: int) -> list[list[Piece]]:
    """The weights of the expert in each home slot, in the same order for every slot.

    Raises:
        CompatError: the module keeps its experts in none of the supported ways.
    """
    slots: list[list[Piece]] = [[] for _ in range(num_slots)]
    for name, parameter in experts.named_parameters():
        head, _, rest = name.removeprefix("local_experts.").partition(".")
        match = _PER_EXPERT.fullmatch(name)
        if name.startswith("local_experts."):
            slots[int(head)].append(Piece(name=rest, parameter=parameter, start=0, stop=parameter.numel()))
        elif match:
            piece = Piece(name=match["kind"], parameter=parameter, start=0, stop=parameter.numel())
            slots[int(match["slot"])].append(piece)
        elif parameter.dim() == (2 if name in _PACKED_BIASES else 3) and len(parameter) == num_slots:
            size = parameter.numel() // num_slots
            for slot, pieces in enumerate(slots):
                pieces.append(Piece(name=name, parameter=parameter, start=slot * size, stop=(slot + 1) * size))
        else:
            raise CompatError(
                f"{type(experts).__name__}.{name} {tuple(parameter.shape)}: cannot tell which part belongs to which "
                "expert"
            )
    kinds = {tuple((piece.name, piece.stop - piece.start) for piece in pieces) for pieces in slots}
    if len(kinds) != 1 or not slots[0]:
        raise CompatError(
            f"{type(experts).__name__}: the {num_slots} experts of a rank do not have the same parameters"
        )
    return slots


class ExpertStates:
    """Layouts and live state of this rank's experts.

    Args:
        layers: layer number and experts module of each of this rank's MoE layers.
        model_chunks: as Megatron's training loop has them, wrapped for data parallelism.
        optimizer: Megatron's optimizer.
        timeout_s: longest wait for another rank.

    Attributes:
        group: all ranks of this pipeline stage; used for migrations only.
        workers: global ranks `[R x D]` that hold the same part of this stage's experts (expert-parallel x
            expert-data-parallel), w = ep_rank * D + edp_rank.
        ep_rank: this rank's index in its expert-parallel group.
        num_ranks: R, the size of that group.

    Raises:
        ConfigError: an optimizer or a precision whose state cannot be moved; it names the flag.
        CompatError: two layers have the same number.
    """

    def __init__(
        self,
        layers: Sequence[tuple[int, torch.nn.Module]],
        model_chunks: Sequence[Any],
        optimizer: Any,
        *,
        timeout_s: float,
    ) -> None:
        check_optimizer(optimizer, model_chunks)
        ep_group = parallel_state.get_expert_model_parallel_group()
        self.ep_rank, self.num_ranks = ep_group.rank(), ep_group.size()
        if self.num_ranks == 1:
            way_out = "Use at least 2, or set --smartmoe-homes off."
            raise ConfigError("--expert-model-parallel-size", 1, "all experts are at home on the one rank", way_out)
        self._modules, self._chunks, self._optimizer = dict(layers), list(model_chunks), optimizer
        if len(self._modules) != len(layers):
            raise CompatError("two MoE layers have the same number")
        self._edp_group = parallel_state.get_expert_data_parallel_group()
        self.workers = self._grid(ep_group)
        self.group = self._stage_group(group_timeout_s(timeout_s, dist.get_backend()))
        self._wire = Wire(self.group, self.workers, timeout_s)
        self._problems = torch.zeros(1, dtype=torch.int64, device=self.device)  # now: later there may be no memory
        self._states: tuple[tuple[str, int], ...] = ()  # name and item size of what the optimizer keeps
        self._copies: tuple[tuple[int, ...], ...] = ()  # expert-data ranks that hold one copy of the state together

    def _grid(self, ep_group: dist.ProcessGroup) -> list[int]:
        """Global ranks `[R, D]`, flattened: the expert-parallel groups of all expert-data-parallel peers."""
        columns_DR: list[list[int]] = [[]] * self._edp_group.size()
        dist.all_gather_object(columns_DR, dist.get_process_group_ranks(ep_group), group=self._edp_group)
        return [columns_DR[d][r] for r in range(ep_group.size()) for d in range(len(columns_DR))]

    @staticmethod
    def _stage_group(timeout_s: float) -> dist.ProcessGroup:
        """The group of all ranks with this pipeline rank; every rank of the job has to create all of these groups."""
        stages: list[int] = [0] * dist.get_world_size()
        dist.all_gather_object(stages, parallel_state.get_pipeline_model_parallel_rank())
        groups: dict[int, dist.ProcessGroup] = {}
        for stage in sorted(set(stages)):
            ranks = [rank for rank, of_rank in enumerate(stages) if of_rank == stage]
            groups[stage] = dist.new_group(ranks, timeout=timedelta(seconds=timeout_s))
        return groups[stages[dist.get_rank()]]

    def prepare(self, *, gradients_spent: bool) -> None:
        """Bring weights and gradients into a state in which experts can be moved. A collective call of the stage.

        With --overlap-param-gather the weights are stale from the optimizer's step to the next forward pass; the
        all-gather that the forward pass would start is done here. With --overlap-grad-reduce no reduction may be in
        flight.

        Args:
            gradients_spent: the optimizer has used the gradients (right after a training step). Otherwise they must be
                zero: a migration does not move gradients.

        Raises:
            MigrationError: an iteration is under way, or gradients are not zero, or an earlier failure has closed the
                connections.
        """
        problem = next(filter(None, (self._gradients_in_use(chunk, gradients_spent) for chunk in self._chunks)), None)
        self._problems.fill_(problem is not None)
        try:
            self._wire.all_reduce(self._problems, "before a migration", dist.ReduceOp.MAX)
        except PeerError as error:
            raise PeerError(f"the ranks of this stage cannot reach each other for migrations: {error}") from error
        if self._problems.item():
            raise MigrationError(f"{problem or 'another rank is in the middle of an iteration'}; no expert was moved")
        for chunk in self._chunks:
            if chunk.ddp_config.overlap_param_gather:
                chunk.start_param_sync(force_sync=True)

    def _gradients_in_use(self, chunk: Any, spent: bool) -> str | None:
        for bucket_group in chunk.expert_parallel_bucket_groups:
            if bucket_group.grad_reduce_handle is not None:
                return "a gradient reduction of the experts is in flight"
            if not bucket_group.is_last_microbatch:
                return "micro-batches of this iteration have not run yet"
        if not spent and any(buffer.grad_data.count_nonzero() for buffer in chunk.expert_parallel_buffers):
            return "the optimizer has not used the experts' gradients yet"
        return None

    @property
    def device(self) -> torch.device:
        """The device of the experts."""
        return next((p.device for module in self._modules.values() for p in module.parameters()), torch.device("cpu"))

    def states(self) -> dict[int, LayerState]:
        """Present layouts and pieces of every layer. A collective call of the stage."""
        slots = {
            layer: slot_pieces(module, cast(int, module.num_local_experts)) for layer, module in self._modules.items()
        }
        parameters = {p.parameter: None for layer in slots.values() for pieces in layer for p in pieces}
        held = parameter_states(self._optimizer, parameters)
        if not self._states:
            self._gather_state_layout(held)
        return {layer: self._layer_state(layer, pieces, held) for layer, pieces in slots.items()}

    def _gather_state_layout(self, held: dict[torch.nn.Parameter, ParameterState]) -> None:
        """Gather which state the optimizers keep, and which ranks hold one copy of it together.

        A rank whose shards hold nothing of any expert does not have the first, and the ranks of one optimizer instance
        do not have the second. Repeated until the optimizer has made its state, in its first step.
        """
        names = {(name, t.itemsize) for state in held.values() for name, t in state.tensors.items() if name != MAIN}
        edp_ranks = dist.get_process_group_ranks(self._edp_group)
        sharing = next((s.group_ranks for s in held.values() if s.group_ranks), None)
        own_copy = tuple(edp_ranks.index(r) for r in sharing) if sharing else (self._edp_group.rank(),)
        gathered: list[Any] = [None] * self.group.size()
        dist.all_gather_object(gathered, (names, own_copy), group=self.group)
        self._states = tuple(sorted(set().union(*(names for names, _ in gathered))))
        self._copies = tuple(sorted({copy for _, copy in gathered}))

    def _layer_state(
        self, layer: int, slots: list[list[Piece]], held: dict[torch.nn.Parameter, ParameterState]
    ) -> LayerState:
        """Layout and pieces of one layer: for each parameter of an expert its weight, then what the optimizer keeps."""
        tensors: list[TensorLayout] = []
        columns: list[list[torch.Tensor]] = []
        own = self._edp_group.rank()
        each_rank: tuple[tuple[int, ...], ...] = tuple((rank,) for rank in range(self._edp_group.size()))
        for pieces in zip(*slots, strict=True):  # the same piece of the expert in every slot
            # Step 1: the weight, which every expert-data-parallel rank holds whole
            weight, numel = pieces[0].parameter, pieces[0].stop - pieces[0].start
            whole_SC2 = np.tile(np.array([0, numel]), (len(slots), 1, 1))  # C = 1: a copy is one shard
            layout = TensorLayout(
                name=pieces[0].name, numel=numel, itemsize=weight.itemsize, copies=each_rank, held_SC2=whole_SC2
            )
            tensors.append(layout)
            columns.append([p.parameter.detach().view(-1)[p.start : p.stop] for p in pieces])
            # Step 2: main weight and optimizer state, whole or in shards
            copies, held_SC2 = each_rank, whole_SC2
            if held[weight].shards is not None:
                copies, held_SC2 = self._copies, _shards_of(pieces, held)
            main = [(MAIN, 4)] if held[weight].has_main else []
            for name, itemsize in [*main, *self._states]:
                tensors.append(
                    replace(layout, name=f"{layout.name}/{name}", itemsize=itemsize, copies=copies, held_SC2=held_SC2)
                )
                columns.append([_held_here(piece, held[piece.parameter], name, itemsize) for piece in pieces])
        shards = tuple(next(group.index(own) for group in t.copies if own in group) for t in tensors)
        return LayerState(
            layout=LayerLayout(layer=layer, tensors=tuple(tensors)),
            shards=shards,
            pieces=tuple(zip(*columns, strict=True)),
        )


def _shards_of(pieces: Sequence[Piece], held: dict[torch.nn.Parameter, ParameterState]) -> IntArray:
    """Elements of each piece that each shard holds, `[S, C, 2]`."""
    rows = []
    for piece in pieces:
        shards = held[piece.parameter].shards or ()
        cut = [(max(low, piece.start), min(high, piece.stop)) for low, high in shards]
        rows.append([(low - piece.start, high - piece.start) if low < high else (0, 0) for low, high in cut])
    return np.array(rows, dtype=np.int64)


def _held_here(piece: Piece, state: ParameterState, name: str, itemsize: int) -> torch.Tensor:
    """The part of a piece's state that this rank holds; an empty tensor when it holds nothing."""
    tensor = state.tensors.get(name)
    if tensor is None:
        return torch.empty(0, dtype=_TYPE_OF_SIZE[itemsize], device=piece.parameter.device)
    first = state.own_start
    return tensor[max(piece.start - first, 0) : max(piece.stop - first, 0)]
