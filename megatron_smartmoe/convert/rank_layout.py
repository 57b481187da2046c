"""Which rank holds which part of a parameter, and under which name: the layout of Megatron's older `torch` format.

Each model-parallel rank has a file with what its modules hold, under its own numbers of layers and experts. Layers are
dealt evenly to pipeline stages, experts to expert-parallel ranks, and tensor parallelism cuts experts as it cuts all
other layers (Megatron's default). `checkpoint.rank_files` reads this format.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_smartmoe.checkpoint.digest import Piece
from megatron_smartmoe.checkpoint.names import with_norms_apart
from megatron_smartmoe.checkpoint.rank_files import cut_axis
from megatron_smartmoe.convert.families.blocks import EMBEDDING, OUTPUT
from megatron_smartmoe.convert.layout import Layout, Spec, has_extra_state
from megatron_smartmoe.convert.numbers import size_bytes
from megatron_smartmoe.convert.ranks import EXPERT, STAGES, TENSOR, Ranks
from megatron_smartmoe.convert.torch_dist_files import SLICE_BYTES, StoredParameter
from megatron_smartmoe.errors import ConfigError

# Arguments with which tensor parallelism would have to cut a parameter in another way, and why.
_NOT_CUT = {
    "smartmoe_wide_qk_norm": "its norms span all heads",
    "moe_mlp_glu_interleave_size": "gate and linear rows alternate",
}
_LAYER = re.compile(r"^decoder\.layers\.(\d+)\.")
_LAST = ("decoder.final_layernorm.", "output_layer.")  # prefixes of what the last stage holds
_PROJ = re.compile(r"\.self_attention\.linear_proj\.weight$")
_DOWN = re.compile(r"\.linear_(?:q|kv)_down_proj\.weight$")
_OF_EXPERT = re.compile(r"weight\d+$")  # TEGroupedMLP's
_BY_EXPERT = re.compile(r"\.mlp\.experts\.(linear_fc[12])\.")


@dataclass(frozen=True, kw_only=True)
class RankTensor:
    """A tensor of a rank: a part of a parameter.

    Attributes:
        name: in the rank's model.
        parameter: the whole parameter.
        rows: ranges of its rows that the part has, one after the other.
        columns: range of its columns; None for all of them, and for a parameter of one axis.
        is_first: whether no other rank's file counts as the one that has this part, for digests.
    """

    name: str
    parameter: StoredParameter
    rows: tuple[tuple[int, int], ...]
    columns: tuple[int, int] | None
    is_first: bool

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the part."""
        tail = self.parameter.shape[1:] if self.columns is None else (self.columns[1] - self.columns[0],)
        return (sum(end - first for first, end in self.rows), *tail)

    @property
    def size_bytes(self) -> int:
        """Bytes of its numbers."""
        return size_bytes(int(np.prod(self.shape, dtype=np.int64)), self.parameter.dtype)

    def slices(self) -> Iterator[tuple[Piece, NDArray[Any]]]:
        """Its numbers in order, flat, in pieces of about SLICE_BYTES of the whole parameter's rows."""
        parameter = self.parameter
        step = max(1, SLICE_BYTES // max(1, parameter.size_bytes // max(1, parameter.shape[0])))
        tail_at, tail = (0,) * (len(parameter.shape) - 1), parameter.shape[1:]
        if self.columns is not None:
            tail_at, tail = (self.columns[0],), (self.columns[1] - self.columns[0],)
        for start, stop in self.rows:
            for first in range(start, stop, step):
                end = min(first + step, stop)
                values = parameter.rows(first, end)
                if self.columns is not None:
                    values = np.ascontiguousarray(values.reshape(end - first, -1)[:, slice(*self.columns)]).reshape(-1)
                yield Piece(shape=parameter.shape, offsets=(first, *tail_at), sizes=(end - first, *tail)), values


def check_ranks(ranks: Ranks, arguments: Mapping[str, Any]) -> None:
    """The model can be spread over these ranks evenly.

    Args:
        ranks: the sizes.
        arguments: Megatron's, of the model.

    Raises:
        ConfigError: it cannot.
    """
    heads = arguments["num_attention_heads"]
    groups = arguments.get("num_query_groups") if arguments.get("group_query_attention") else heads
    shared = arguments.get("moe_shared_expert_intermediate_size")
    of_experts = arguments.get("moe_ffn_hidden_size") if arguments.get("num_experts") else None
    divided = [
        (TENSOR, ranks.tensor, "attention heads", heads),
        (TENSOR, ranks.tensor, "query groups", groups),
        (TENSOR, ranks.tensor, "the inner size of the MLP", arguments.get("ffn_hidden_size")),
        (TENSOR, ranks.tensor, "the inner size of the experts", of_experts),
        (TENSOR, ranks.tensor, "the inner size of the shared experts", shared),
        (STAGES, ranks.stages, "layers", arguments["num_layers"]),
        (EXPERT, ranks.expert, "experts", arguments.get("num_experts") or 1),
    ]
    for flag, size, what, total in divided:
        if total and int(total) % size:
            rule = f"must divide {what}, and there are {total}" if what[:3] != "the" else f"must divide {what}, {total}"
            raise ConfigError(flag, size, rule, f"For example: {flag} 1.")
    if arguments.get("mtp_num_layers"):
        rule = "is not supported for a model with layers that predict further tokens (MTP)"
        raise ConfigError("--to", "torch", rule, "Pass --to megatron.")
    for name, why in _NOT_CUT.items():
        if ranks.tensor > 1 and arguments.get(name):
            rule = f"is not supported with --{name.replace('_', '-')}: {why}"
            raise ConfigError(TENSOR, ranks.tensor, rule, f"Pass {TENSOR} 1.")


def with_padding(parameter: StoredParameter, num_rows: int) -> StoredParameter:
    """A parameter with rows of zeros behind its own."""
    own, width = parameter.shape[0], parameter.size_bytes // size_bytes(parameter.shape[0], parameter.dtype)

    def rows(first: int, end: int) -> NDArray[Any]:
        found = parameter.rows(first, min(end, own)) if first < own else None
        if found is not None and end <= own:
            return found
        kind = parameter.rows(0, 1).dtype if found is None else found.dtype
        zeros = np.zeros((end - max(first, own)) * width, kind)
        return zeros if found is None else np.concatenate([found, zeros])

    return replace(parameter, shape=(num_rows, *parameter.shape[1:]), rows=rows)


def rank_tensors(
    parameters: Sequence[StoredParameter],
    ranks: Ranks,
    place: tuple[int, int, int],
    layout: Layout,
    arguments: Mapping[str, Any],
) -> Iterator[RankTensor]:
    """The tensors of one rank, in the order of the parameters.

    Args:
        parameters: of the whole model, by the names of `checkpoint.names`.
        ranks: the sizes.
        place: tensor rank, stage and expert rank.
        layout: of the model.
        arguments: Megatron's, of the model.

    Raises:
        ConfigError: it is not known where a parameter belongs.
    """
    tensor, stage, expert_rank = place
    per_stage = layout.num_layers // ranks.stages
    per_rank = max(1, layout.num_experts) // ranks.expert
    is_gated = bool(arguments.get("swiglu") or arguments.get("quick_geglu"))
    for parameter in parameters:
        found = _LAYER.match(parameter.name)
        stages = _stages(parameter.name, found, per_stage, ranks, arguments)
        if stage not in stages or (parameter.expert is not None and parameter.expert // per_rank != expert_rank):
            continue
        name = parameter.name
        if found is not None:
            number, inner = int(found[1]), name[found.end() :]
            if layout.spec == "te":
                inner = layout.inner_name(inner, has_experts=layout.expert_layers[number])
            name = f"decoder.layers.{number % per_stage}.{inner}"
        elif name == EMBEDDING and stage > 0:
            name = OUTPUT  # tied: the last stage has a copy under this name
        axis = cut_axis(parameter.name) if ranks.tensor > 1 else None
        if axis is None and ranks.tensor > 1 and layout.spec == "local" and _DOWN.search(name):
            axis = 0  # ColumnParallelLinear, whose output is gathered; TransformerEngine's Linear is whole everywhere
        halves = 2 if axis == 0 and is_gated and ".linear_fc1." in name else 1
        is_copy = (axis is None and tensor > 0) or (parameter.expert is None and expert_rank > 0)
        yield RankTensor(
            name=_name(name, parameter.expert, per_rank, layout.spec),
            parameter=parameter,
            rows=_rows(parameter.shape[0], tensor if axis == 0 else 0, ranks.tensor if axis == 0 else 1, halves),
            columns=_columns(parameter.shape, tensor, ranks.tensor) if axis == 1 else None,
            is_first=not is_copy and stage == stages[0],
        )


def extra_state_names(names: Sequence[str], spec: Spec, *, is_last: bool) -> Iterator[str]:
    """Names of the empty entries that modules without further state have in a rank's file.

    Args:
        names: of the rank's tensors.
        spec: local or te.
        is_last: whether it is of the last stage, whose output layer may share the embedding's weight.
    """
    weights = {_OF_EXPERT.sub("weight", name) for name in names}
    found = {name.removesuffix("weight") for name in weights if has_extra_state(name, spec)}
    if spec == "te":
        found |= {name.replace("linear_proj.weight", "core_attention.") for name in weights if _PROJ.search(name)}
    if is_last:
        found.add("output_layer.")
    yield from sorted(f"{module}_extra_state" for module in found)


def _stages(
    name: str, layer: re.Match[str] | None, per_stage: int, ranks: Ranks, arguments: Mapping[str, Any]
) -> tuple[int, ...]:
    """The stages that hold a parameter, the one that counts first."""
    last = ranks.stages - 1
    if layer is not None:
        return (int(layer[1]) // per_stage,)
    if name == EMBEDDING and last > 0 and not arguments.get("untie_embeddings_and_output_weights"):
        return 0, last
    if name.startswith("embedding."):
        return (0,)
    if name.startswith(_LAST):
        return (last,)
    rule = f"has no place for the parameter {name}"
    raise ConfigError("--to", "torch", rule, "Pass --to megatron.")


def _rows(count: int, rank: int, parts: int, halves: int) -> tuple[tuple[int, int], ...]:
    """Ranges of rows of a part; of a gated layer, gate and linear rows are cut one by one."""
    size = count // parts // halves
    return tuple(((half * parts + rank) * size, (half * parts + rank + 1) * size) for half in range(halves))


def _columns(shape: tuple[int, ...], rank: int, parts: int) -> tuple[int, int]:
    size = shape[1] // parts
    return rank * size, (rank + 1) * size


def _name(name: str, expert: int | None, per_rank: int, spec: Spec) -> str:
    """The name in the rank's modules."""
    if expert is not None:
        local = expert % per_rank
        if spec == "te":  # TEGroupedMLP: a weight for each expert in one layer
            return f"{name}{local}"
        return _BY_EXPERT.sub(rf".mlp.experts.local_experts.{local}.\1.", name)
    return name if spec == "te" else with_norms_apart(name)
