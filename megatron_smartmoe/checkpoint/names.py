"""Names of parameters that do not depend on how a checkpoint stacks them.

Megatron stacks the layers of a model in one tensor, `decoder.layers.mlp.router.weight [L, E, H]`, and experts too,
`decoder.layers.mlp.experts.experts.linear_fc1.weight [L, E, F1, H]`, or gives layers or experts keys of their own
(`--ckpt-...` options, models whose layers differ, `singleton_local_shards`). The optimizer's tensors have the same keys
behind `optimizer.state.exp_avg.` and its like. Here each is one parameter of one layer, and of one expert:

    decoder.layers.3.mlp.experts.linear_fc1.weight, expert 5, kind exp_avg

Norms have the names that they have in Megatron's checkpoints where they are fused with the layer behind them.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megatron_smartmoe.checkpoint.digest import EXP_AVG, EXP_AVG_SQ, MAIN_WEIGHT, WEIGHT, Piece

_OPTIMIZER = re.compile(r"(?:chained_\d+\.)?optimizer\.state\.(\w+)\.(.+)")
_KINDS = {
    "param": MAIN_WEIGHT,
    "fp32_param": MAIN_WEIGHT,
    "master_param": MAIN_WEIGHT,
    "exp_avg": EXP_AVG,
    "exp_avg_sq": EXP_AVG_SQ,
}
_STACKED_LAYERS = re.compile(r"(?:^|\.)layers\.(?!\d)")
_EXPERTS = re.compile(r"\.experts\.experts\.(?:(\d+)\.)?")
_FUSED_NORMS = (
    (".input_layernorm.", ".self_attention.linear_qkv.layer_norm_"),
    (".pre_mlp_layernorm.", ".mlp.linear_fc1.layer_norm_"),
)
_HALVES = {"weight_w": 0, "weight_v": 1}  # gate and linear rows, where they have keys of their own


@dataclass(frozen=True, kw_only=True)
class LogicalPiece:
    """A part of one parameter of one layer and expert, in a box of a checkpoint's tensor.

    Attributes:
        name: of the parameter, with the layer's number.
        kind: one of `digest.KINDS`.
        expert: logical expert; None for a parameter of no expert.
        piece: what part of the parameter it is.
        index: where it is in the box: an index for each of the first axes.
    """

    name: str
    kind: str
    expert: int | None
    piece: Piece
    index: tuple[int, ...]


def logical_pieces(
    key: str, shape: Sequence[int], offsets: Sequence[int], sizes: Sequence[int]
) -> Iterator[LogicalPiece]:
    """The parameters that a box of a checkpoint's tensor holds parts of.

    Nothing for tensors that are no parameter's, such as the buffers of the distributed optimizer.

    Args:
        key: of the tensor (of a `ShardedTensor`, of an entry of a torch_dist index).
        shape: of the whole tensor.
        offsets: first index of the box in each axis.
        sizes: of the box.
    """
    found = _kind_and_parameter(key)
    if found is None:
        return
    kind, name = found
    experts = _EXPERTS.search(name)
    is_stacked = _STACKED_LAYERS.search(name) is not None
    has_expert_axis = experts is not None and experts[1] is None
    num_axes = is_stacked + has_expert_axis
    half = _HALVES.get(name.rpartition(".")[2]) if experts is not None else None
    tail_shape, tail_offsets = tuple(shape[num_axes:]), tuple(offsets[num_axes:])
    if half is not None:
        rows, *others = tail_shape
        tail_shape = (2 * rows, *others)
        tail_offsets = (tail_offsets[0] + half * rows, *tail_offsets[1:])
        name = name[:-2]
    piece = Piece(shape=tail_shape, offsets=tail_offsets, sizes=tuple(sizes[num_axes:]))
    for index in itertools.product(*(range(size) for size in sizes[:num_axes])):
        at = [offset + i for offset, i in zip(offsets, index, strict=False)]
        layer = at.pop(0) if is_stacked else None
        expert = None
        if experts is not None:
            expert = at.pop(0) if has_expert_axis else int(experts[1])
        yield LogicalPiece(name=_plain(name, layer), kind=kind, expert=expert, piece=piece, index=index)


def canonical(name: str) -> str:
    """A parameter's name with the name of a fused norm, however the norm is implemented."""
    for apart, fused in _FUSED_NORMS:
        name = name.replace(apart, fused)
    return name


def with_norms_apart(name: str) -> str:
    """The reverse of `canonical`: a norm's name as Megatron's local layers have it."""
    for apart, fused in _FUSED_NORMS:
        name = name.replace(fused, apart)
    return name


def _kind_and_parameter(key: str) -> tuple[str, str] | None:
    """Kind and key of the parameter that a tensor belongs to; None for what is neither weight nor optimizer state."""
    optimizer = _OPTIMIZER.fullmatch(key)
    if optimizer is not None:
        kind = _KINDS.get(optimizer[1])
        return None if kind is None else (kind, optimizer[2])
    if "optimizer." in key:
        return None
    return WEIGHT, key


def _plain(name: str, layer: int | None) -> str:
    if layer is not None:
        name = _STACKED_LAYERS.sub(lambda found: f"{found[0]}{layer}.", name, count=1)
    return canonical(_EXPERTS.sub(".experts.", name, count=1))
