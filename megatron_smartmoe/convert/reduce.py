"""A model with fewer experts: those that a routing trace sees used least are left out, or merged into the others.

Pruning keeps the N experts of each layer with the most assignments, and their router rows. A token whose expert is gone
takes the next of the ones that are left, so what is lost is at most the assignments of the removed ones.

Merging (the usage-weighted merge of arXiv 2310.01334, without its alignment of neurons) makes each removed expert part
of the kept one whose router row is most like its own, by cosine: the weights of the merged expert are the mean of its
members, weighted with their assignments, and its router row is the kept one's. It suits experts with a common origin,
as those of an upcycled model; in others the same neuron means different things, and pruning may lose less.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from megatron_smartmoe.convert import numbers
from megatron_smartmoe.convert.families import table_of
from megatron_smartmoe.convert.families.table import ModelTable
from megatron_smartmoe.convert.hf_config import HFConfig
from megatron_smartmoe.convert.hf_tensors import HFTensors
from megatron_smartmoe.errors import ConfigError
from megatron_smartmoe.spec.trace import load_trace

type Method = Literal["prune", "merge"]
METHODS: tuple[Method, ...] = ("prune", "merge")
KEEP, METHOD, TRACE, TEXT = "--keep-experts", "--reduce-by", "--trace", "--text"
_EXPERT = re.compile(r"(model\.layers\.(\d+)\.\w+\.experts\.)(\d+)(\.\w+\.weight)")
_ROUTER = re.compile(r"model\.layers\.(\d+)\.\w+\.gate\.(?:weight|e_score_correction_bias)")
_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts")  # names of the number of experts in config.json


@dataclass(frozen=True, kw_only=True)
class ReduceRecipe:
    """How experts are removed.

    Attributes:
        keep: experts that are left of each layer.
        method: prune or merge.
        trace: routing trace of the model.
        text: a text whose loss is computed before and after; None for none.
    """

    keep: int
    method: Method
    trace: Path
    text: Path | None = None


@dataclass(frozen=True, kw_only=True)
class Reduction:
    """What becomes of the experts of a layer.

    Attributes:
        groups: members of each expert that is left, the kept one first, by the expert's new index.
        weights: of the members in the mean, which sum to 1; with one member it is copied.
        moved: share of the trace's assignments that went to experts that are no longer there.
    """

    groups: tuple[tuple[int, ...], ...]
    weights: tuple[tuple[float, ...], ...]
    moved: float

    @property
    def kept(self) -> tuple[int, ...]:
        """The experts that are left, by their old index."""
        return tuple(group[0] for group in self.groups)


def loads_of(path: Path, table: ModelTable) -> Mapping[int, NDArray[np.int64]]:
    """Assignments of each expert in a routing trace, by layer of the model.

    Args:
        path: of the trace, which has the model's layers with experts in their order.
        table: of the model.

    Raises:
        ConfigError: the trace cannot be read, or is of another model.
        PlanError: see `load_trace`.
    """
    trace = load_trace(path, field=TRACE)
    layers = [number for number, has_experts in enumerate(table.expert_layers) if has_experts]
    way_out = "Record one with --smartmoe-record-trace while this model trains."
    for name, found, wanted in (
        ("experts", trace.num_experts, table.num_experts),
        ("layers with experts", trace.num_layers, len(layers)),
    ):
        if found != wanted:
            raise ConfigError(TRACE, str(path), f"has {found} {name}, and the model has {wanted}", way_out)
    order = np.argsort(trace.layer)
    axes = tuple(axis for axis in range(trace.counts.ndim) if axis not in (1, trace.counts.ndim - 1))
    load_LE = trace.counts.sum(axis=axes, dtype=np.int64)[order]
    empty = np.flatnonzero(load_LE.sum(axis=1) == 0)
    if len(empty):
        rule = f"has no assignment in layer {layers[int(empty[0])]} of the model"
        raise ConfigError(TRACE, str(path), rule, way_out)
    return dict(zip(layers, load_LE, strict=True))


def reduced_config(config: HFConfig, table: ModelTable, keep: int) -> HFConfig:
    """The config.json of the model with fewer experts.

    Raises:
        ConfigError: the number does not fit the model, or its experts cannot be removed one by one.
    """
    count, topk = table.num_experts, int(str(table.flags.get("moe-router-topk", 0)))
    if count is None:
        raise ConfigError(KEEP, keep, f"needs a model with experts, and this {table.family} is dense", "Leave it out.")
    if not topk <= keep < count:
        rule = f"must be at least {topk}, the experts of a token, and below {count}, those of a layer"
        raise ConfigError(KEEP, keep, rule, f"For example: {KEEP} {max(topk, count // 2)}.")
    if "moe-router-num-groups" in table.flags:
        rule = "is not supported: its experts are chosen by groups of equal size, which would not stay equal"
        raise config.refused("n_group", rule)
    content = dict(config.content)
    content |= {name: keep for name in _COUNTS if content.get(name) is not None}
    return HFConfig(content, config.path)


def reduced_table(config: HFConfig, table: ModelTable, keep: int) -> ModelTable:
    """The table of the model with fewer experts.

    Raises:
        ConfigError: see `reduced_config`.
    """
    made = reduced_config(config, table, keep)
    return table_of(made, made.content)


def reductions_of(
    tensors: HFTensors, loads: Mapping[int, NDArray[np.int64]], keep: int, method: Method
) -> Mapping[int, Reduction]:
    """What becomes of the experts of each layer.

    Args:
        tensors: of the model; the routers are read for merging.
        loads: see `loads_of`.
        keep: experts that are left of each layer.
        method: prune or merge.
    """
    found = {}
    for layer, load_E in loads.items():
        # Step 1: the most used stay, in their order; of equally used ones the first.
        kept = np.sort(np.argsort(-load_E, kind="stable")[:keep])
        moved = 1 - float(load_E[kept].sum() / load_E.sum())
        # Step 2: the others go to the kept one with the router row that is most like theirs.
        members = {int(expert): [int(expert)] for expert in kept}
        if method == "merge":
            rows_EH = _router(tensors, layer, len(load_E))
            for expert in np.setdiff1d(np.arange(len(load_E)), kept):
                nearest = kept[int(np.argmax(rows_EH[kept] @ rows_EH[expert]))]
                members[int(nearest)].append(int(expert))
        groups = tuple(tuple(group) for group in members.values())
        found[layer] = Reduction(groups=groups, weights=tuple(_weights(group, load_E) for group in groups), moved=moved)
    return found


def _router(tensors: HFTensors, layer: int, count: int) -> NDArray[np.float32]:
    """Router rows of length 1, one for each expert."""
    pattern = re.compile(rf"model\.layers\.{layer}\.\w+\.gate\.weight")
    name = next(name for name in tensors.tensors if pattern.fullmatch(name))
    rows = numbers.as_float32(tensors.rows(name, 0, count), tensors.dtype(name)).reshape(count, -1)
    lengths = np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-20)
    return (rows / lengths).astype(np.float32, copy=False)


def _weights(group: tuple[int, ...], load_E: NDArray[np.int64]) -> tuple[float, ...]:
    """By assignments; equal where no member has any."""
    loads = load_E[list(group)].astype(np.float64)
    shares = loads / loads.sum() if loads.sum() else np.full(len(group), 1 / len(group))
    return tuple(float(share) for share in shares)


@dataclass(frozen=True, kw_only=True)
class ReducedTensors(HFTensors):
    """The tensors of the model with fewer experts, made from those of the larger one as they are read.

    Attributes:
        reductions: what becomes of the experts, by layer.
        shapes: of the tensors of the model with fewer experts.
    """

    reductions: Mapping[int, Reduction]
    shapes: Mapping[str, tuple[int, ...]]

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape; one of the larger model alone has that of the larger model."""
        return self.shapes[name] if name in self.shapes else super().shape(name)

    def dtype(self, name: str) -> str:
        """The type of the numbers that `rows` gives."""
        if _EXPERT.fullmatch(name) is None:
            return super().dtype(name)
        members, _ = self._members(name)
        return super().dtype(members[0]) if len(members) == 1 else "float32"

    def rows(self, name: str, first: int, end: int) -> NDArray[Any]:
        """Some rows of a tensor, flat."""
        if _EXPERT.fullmatch(name) is not None:
            return self._expert_rows(name, first, end)
        router = _ROUTER.fullmatch(name)
        if router is not None and int(router[1]) in self.reductions:
            kept = self.reductions[int(router[1])].kept[first:end]
            return np.concatenate([super(ReducedTensors, self).rows(name, expert, expert + 1) for expert in kept])
        return super().rows(name, first, end)

    def _expert_rows(self, name: str, first: int, end: int) -> NDArray[Any]:
        members, weights = self._members(name)
        if len(members) == 1:
            return super().rows(members[0], first, end)
        total: NDArray[np.float32] | None = None
        for member, weight in zip(members, weights, strict=True):
            values = numbers.as_float32(super().rows(member, first, end), super().dtype(member)) * np.float32(weight)
            total = values if total is None else total + values
        assert total is not None, name
        return total

    def _members(self, name: str) -> tuple[list[str], tuple[float, ...]]:
        """Names of the larger model's tensors that an expert's tensor is made of, and their weights."""
        expert = _EXPERT.fullmatch(name)
        assert expert is not None, name
        reduction, number = self.reductions[int(expert[2])], int(expert[3])
        return [f"{expert[1]}{member}{expert[4]}" for member in reduction.groups[number]], reduction.weights[number]


def moved_lines(reductions: Mapping[int, Reduction], method: Method) -> list[str]:
    """What the reduction costs, a line for each layer and one for all."""
    words = "lost" if method == "prune" else "moved to a merged expert"
    shares = {layer: reduction.moved for layer, reduction in reductions.items()}
    lines = [f"layer {layer}: {share:.2%} of the trace's assignments {words}" for layer, share in shares.items()]
    worst = max(shares, key=lambda layer: shares[layer])
    mean = sum(shares.values()) / len(shares)
    return [*lines, f"all layers: {mean:.2%} of the assignments {words}, at most {shares[worst]:.2%} (layer {worst})"]
