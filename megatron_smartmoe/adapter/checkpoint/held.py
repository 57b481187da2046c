"""What this rank holds of the model and its optimizer, as parts of logical tensors that every layout shares.

Megatron's `sharded_state_dict` says which box of which global tensor a parameter of this rank is, whatever parallelism,
pipeline chunks and placement of experts are in force. It is the source of truth here for every checkpoint format, also
for those that do not use it. Main weights and moments have the boxes of their parameter; the distributed optimizer
keeps a range of the flat parameter, which is cut at the boxes.

Of several ranks that hold the same elements one counts: the one that Megatron would save (replica 0).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from megatron.core import parallel_state as mpu
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.fp8_utils import is_float8tensor

from megatron_smartmoe.adapter.migration.optimizer_state import (
    MAIN,
    ParameterState,
    check_optimizer,
    keeps_in_its_own_way,
    parameter_states,
)
from megatron_smartmoe.checkpoint.digest import EXP_AVG, EXP_AVG_SQ, MAIN_WEIGHT, WEIGHT, Piece
from megatron_smartmoe.checkpoint.names import logical_pieces
from megatron_smartmoe.errors import CompatError, ConfigError
from megatron_smartmoe.spec.readers.torch_save import ITEM_BYTES

_PACKED = re.compile(r"\.experts\.linear_fc[12]\.(weight|bias)$")  # TEGroupedMLP's parameter of all experts of a rank
_KIND_OF_STATE = {MAIN: MAIN_WEIGHT, EXP_AVG: EXP_AVG, EXP_AVG_SQ: EXP_AVG_SQ}
_FP32 = "float32"  # type of main weights and moments


@dataclass(frozen=True, kw_only=True)
class Held:
    """Elements of one parameter of one layer and expert, on this rank.

    Attributes:
        name: of the parameter, see `checkpoint.names`.
        kind: one of `checkpoint.digest.KINDS`.
        dtype: torch's name of the type, without "torch.".
        expert: logical expert; None for a parameter of no expert.
        piece: which elements of the logical tensor.
        tensor: the elements; None where another rank holds them, or holds the copy that counts.
    """

    name: str
    kind: str
    dtype: str
    expert: int | None
    piece: Piece
    tensor: torch.Tensor | None


@dataclass(frozen=True, kw_only=True)
class _Box:
    """A contiguous part of a parameter of this rank, and where it is in the checkpoint's tensor."""

    parameter: torch.Tensor
    sharded: ShardedTensor
    start: int  # first element in the flat parameter


def held_tensors(chunks: Sequence[Any], optimizer: Any | None) -> tuple[list[Held], str]:
    """This rank's part of the model, and of the optimizer unless that is None.

    Returns:
        Them, with an entry also for what counts on another rank, so that ranks of one stage have the same names; and
        what could not be included and why, empty if nothing.
    """
    boxes, skipped = _boxes(chunks)
    held = [part for box in boxes for part in _weights(box)]
    if optimizer is None:
        return held, skipped
    if kind := keeps_in_its_own_way(optimizer):
        return held, f"{skipped + '; ' if skipped else ''}main weights and moments (of the {kind})"
    parameters = {id(box.parameter): box.parameter for box in boxes if isinstance(box.parameter, torch.nn.Parameter)}
    trained = [parameter for parameter in parameters.values() if parameter.requires_grad]
    if any(_PACKED.search(name) for chunk in chunks for name, _ in chunk.named_parameters()):
        skipped += ("; " if skipped else "") + "main weights and moments of experts that are one parameter"
    try:
        check_optimizer(optimizer, chunks)
        states = parameter_states(optimizer, trained)
    except (ConfigError, CompatError) as error:
        return held, f"{skipped + '; ' if skipped else ''}main weights and moments ({error})"
    by_id = {id(parameter): state for parameter, state in states.items()}
    for box in boxes:
        if id(box.parameter) in by_id:
            held += _optimizer_state(box, by_id[id(box.parameter)], optimizer)
    return held, skipped


def _boxes(chunks: Sequence[Any]) -> tuple[list[_Box], str]:
    """The boxes of all parameters and buffers, and the names of those that cannot be described."""
    group = mpu.get_data_parallel_group(with_context_parallel=True)
    metadata = {"singleton_local_shards": False, "chained_optim_avoid_prefix": True, "dp_cp_group": group}
    boxes, skipped = [], []
    for chunk in chunks:
        for entry in nested_values(chunk.sharded_state_dict(metadata=metadata)):
            if not isinstance(entry, ShardedTensor | ShardedTensorFactory):
                continue
            base = entry.data
            if is_float8tensor(base) or str(base.dtype).removeprefix("torch.") not in ITEM_BYTES:
                skipped.append(entry.key)
                continue
            found = nested_values(entry.build()) if isinstance(entry, ShardedTensorFactory) else [entry]
            parts = [part for part in found if isinstance(part, ShardedTensor)]
            starts = [_start(part.data, base) for part in parts]
            if None in starts:
                skipped.append(entry.key)
                continue
            boxes += [
                _Box(parameter=base, sharded=part, start=start)
                for part, start in zip(parts, starts, strict=True)
                if start is not None
            ]
    names = ", ".join(skipped[:3]) + (f" and {len(skipped) - 3} more" if len(skipped) > 3 else "")
    return boxes, names


def _start(part: torch.Tensor, base: torch.Tensor) -> int | None:
    """Index of a part's first element in the flat tensor that it is a contiguous view of; None if it is not one."""
    if part.untyped_storage().data_ptr() != base.untyped_storage().data_ptr():
        return None
    if not (part.is_contiguous() and base.is_contiguous()):
        return None
    return int(part.storage_offset() - base.storage_offset())


def _logical(box: _Box) -> Iterator[tuple[Held, int]]:
    """The logical parameters in a box, without tensors, each with its first element in the flat parameter."""
    sharded = box.sharded
    sizes = (1,) * sharded.prepend_axis_num + tuple(sharded.local_shape)
    dtype = str(sharded.data.dtype).removeprefix("torch.")
    for part in logical_pieces(sharded.key, sharded.global_shape, sharded.global_offset, sizes):
        axes, at = sizes[: len(part.index)], 0
        for size, index in zip(axes, part.index, strict=True):
            at = at * size + index
        start = box.start + at * math.prod(part.piece.sizes)
        yield (
            Held(name=part.name, kind=part.kind, dtype=dtype, expert=part.expert, piece=part.piece, tensor=None),
            start,
        )


def _weights(box: _Box) -> Iterator[Held]:
    """The weights of a box."""
    is_main = all(index == 0 for index in box.sharded.replica_id)
    flat = box.parameter.detach().view(-1)
    for held, start in _logical(box):
        tensor = flat[start : start + held.piece.num_elements] if is_main else None
        yield replace(held, kind=WEIGHT, tensor=tensor)


def _optimizer_state(box: _Box, state: ParameterState, optimizer: Any) -> Iterator[Held]:
    """Main weights and moments of a box: all of them, or the range that this rank of a distributed optimizer holds."""
    replica_id = box.sharded.replica_id
    is_sharded = state.shards is not None
    is_main = all(index == 0 for index in (replica_id[:-1] if is_sharded else replica_id))
    is_main = is_main and (not is_sharded or _is_first_instance(optimizer))
    tensors = {_KIND_OF_STATE[name]: tensor for name, tensor in state.tensors.items() if name in _KIND_OF_STATE}
    flat = box.parameter.detach().view(-1)
    for held, start in _logical(box):
        stop = start + held.piece.num_elements
        for kind in _kinds(optimizer):
            if kind == MAIN_WEIGHT and box.parameter.dtype == torch.float32:
                # It is its own main weight, which only the distributed optimizer saves once more.
                tensor = flat[start:stop] if all(index == 0 for index in replica_id) else None
                if is_sharded:
                    yield replace(held, kind=kind, tensor=tensor)
                continue
            entry = replace(held, kind=kind, dtype=_FP32)
            own = tensors.get(kind)
            low = max(start, state.own_start)
            high = min(stop, state.own_start + (0 if own is None else own.numel()))
            if own is None or not is_main or low >= high:
                yield entry
                continue
            piece = replace(held.piece, start=low - start, stop=high - start)
            yield replace(entry, piece=piece, tensor=own[low - state.own_start : high - state.own_start])


def _kinds(optimizer: Any) -> tuple[str, ...]:
    """What the optimizer keeps for every element, the same on every rank, also on one whose shards are empty."""
    return (MAIN_WEIGHT, EXP_AVG, EXP_AVG_SQ) if optimizer.config.optimizer == "adam" else (MAIN_WEIGHT,)


def _is_first_instance(optimizer: Any) -> bool:
    """Whether this rank is in the first instance of the distributed optimizer; all instances hold the same state."""
    chained = getattr(optimizer, "chained_optimizers", [optimizer])
    return not any(getattr(one, "distributed_optimizer_instance_id", 0) for one in chained)
