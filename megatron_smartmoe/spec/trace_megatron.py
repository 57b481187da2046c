"""What Megatron writes with `--moe-routing-trace-path`: JSON lines, one per step, layer and micro-batch.

A line has the experts that every token of the micro-batch chose. Three things are not in it, and are found here:

- *The pipeline stage.* Megatron numbers layers by their place in the rank's own stage, and ranks stage by stage.
  Consecutive ranks with the same layers form a stage. Where all stages have equally many layers, their loads tell them
  apart: ranks of a stage have the same routers, and choose experts alike. With few tokens, or one rank a stage, nothing
  does, and `stages` says how many there are. Layers are then numbered over all stages.
- *Where a rank stopped.* Ranks write when a step ends, so a killed one is behind. A step is used as far as all ranks
  have it: the micro-batches that each of them has of every layer; a step that one of them lacks is left out.
- *The micro-batch.* A rank's n-th line of a step and layer is micro-batch n. Steps with fewer than others (batch size
  ramps up) end with empty ones.

Whatever is left out or assumed becomes a note of the trace.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_smartmoe.errors import ConfigError, PlanError
from megatron_smartmoe.spec.readers import files, values
from megatron_smartmoe.spec.readers.files import Named
from megatron_smartmoe.spec.readers.json_text import CUT, read_json_lines
from megatron_smartmoe.spec.routing_trace import MOST_EXPERTS, RoutingTrace

WAY_OUT = "Run with --moe-routing-trace-path, and give its directory."
OTHER_ROUTERS = 4.0  # an estimate; halves of a recorded model differ 11 (one record) to 128 times as much as ranks do
ALWAYS_CELLS = 2**25  # counts of a trace that files of any size may give: 128 MiB
_RANK_FILE = re.compile(r"router_trace_rank(\d+)\.jsonl$")
_KEYS = ("step", "block", "layer", "rank", "topk", "top_indices")

Layer = tuple[str, int, int]  # block ("decoder", "mtp"), index of the prediction block, layer in the rank's stage
Sparse = tuple[NDArray[np.int64], NDArray[np.int64]]  # experts that were chosen, how often


@dataclass(frozen=True, kw_only=True)
class MegatronChoice:
    """What a user says about a trace directory.

    Attributes:
        num_experts: E; None takes the highest expert seen plus one, rounded up to a multiple of 8.
        ranks: ranks to read; None reads all.
        stages: pipeline stages that the ranks belong to; None finds them by their layers.
    """

    num_experts: int | None = None
    ranks: Container[int] | None = None
    stages: int | None = None


@dataclass
class RankRecords:
    """What one rank has written.

    Attributes:
        steps: step -> layer -> the choices of each micro-batch.
        top_k: of the largest record.
        highest: expert that was named.
        cut: whether the last line was cut short.
    """

    steps: dict[int, dict[Layer, list[Sparse]]] = field(default_factory=dict)
    top_k: int = 0
    highest: int = -1
    cut: bool = False

    @property
    def layers(self) -> frozenset[Layer]:
        """Layers of the rank's stage: those of any step."""
        return frozenset(layer for step in self.steps.values() for layer in step)


def from_megatron(
    path: Path, *, num_experts: int | None = None, ranks: Container[int] | None = None, stages: int | None = None
) -> RoutingTrace:
    """Import a trace directory of Megatron, or one rank's file; see `MegatronChoice` for the arguments.

    Ranks become source ranks in rank order, within their stage. Multi-token-prediction blocks are numbered after the
    decoder's layers. Tensor-parallel ranks without sequence parallelism record the same tokens, and chunks of the
    interleaved schedule are all numbered from 0: name the `ranks` whose tokens and layers are their own.

    Raises:
        ConfigError: no file, no record, a line that is not one of Megatron's, or none of the `ranks`.
        PlanError: an expert is not below `num_experts`, or stages have different numbers of ranks.
    """
    named = Named(path=path, field="--trace", way_out=WAY_OUT)
    return read(named, MegatronChoice(num_experts=num_experts, ranks=ranks, stages=stages))


def read(named: Named, choice: MegatronChoice) -> RoutingTrace:
    """See `from_megatron`."""
    if choice.num_experts is not None:
        values.whole(choice.num_experts, "--trace-experts", least=1, most=MOST_EXPERTS, example=64)
    # Step 1: read the files, rank by rank.
    by_rank, size, notes = _read_files(named, choice)
    # Step 2: tell the stages apart, and give their layers numbers over all of them.
    stages = _stages(by_rank, named, choice, notes)
    numbers = _layer_numbers(stages, by_rank)
    # Step 3: find what all ranks have, and put it into one array.
    micro_of_step = _agreed_steps(stages, numbers, by_rank, notes, named)
    return _assemble(stages, numbers, by_rank, micro_of_step, named, choice, size, notes)


def _read_files(named: Named, choice: MegatronChoice) -> tuple[dict[int, RankRecords], int, list[str]]:
    """Records by rank, bytes read, and notes."""
    path = named.path
    paths = sorted(path.glob("router_trace_rank*.jsonl"), key=_rank_of) if os.path.isdir(path) else [path]
    if not paths:
        raise ConfigError(named.field, str(path), "has no router_trace_rank*.jsonl", WAY_OUT)
    chosen = [file for file in paths if choice.ranks is None or _rank_of(file) in choice.ranks]
    if not chosen:
        way_out = f"There are ranks {', '.join(str(_rank_of(file)) for file in paths[:20])}."
        raise ConfigError("--trace-ranks", choice.ranks, f"names no rank of {path.name}", way_out)
    notes: list[str] = []
    by_rank: dict[int, RankRecords] = {}
    size = 0
    limit = choice.num_experts or MOST_EXPERTS
    for file in chosen:
        one = Named(path=file, field=named.field, way_out=WAY_OUT)
        size += files.size_of(one)
        rank = _rank_of(file)
        for record in _records(one, limit):
            if record is None:
                by_rank.setdefault(rank, RankRecords()).cut = True
                continue
            rank = record["rank"]
            _add(by_rank.setdefault(rank, RankRecords()), record)
    empty = [file.name for file in chosen if files.size_of(Named(path=file, field="", way_out="")) == 0]
    if len(chosen) > len(empty) > 0:
        notes.append(f"{len(empty)} of {len(chosen)} files have no records (the first is {empty[0]}) and are left out")
    cut = [rank for rank, records in by_rank.items() if records.cut]
    if cut:
        notes.append(f"the last line of rank {_listed(cut)} is cut short and left out")
    by_rank = {rank: records for rank, records in sorted(by_rank.items()) if records.steps}
    if not by_rank:
        way_out = "Run at least one step with --moe-routing-trace-path."
        raise ConfigError(named.field, str(path), "has no records", way_out)
    return by_rank, size, notes


def _rank_of(file: Path) -> int:
    match = _RANK_FILE.search(file.name)
    return int(match.group(1)) if match and len(match.group(1)) < 19 else -1


def _records(named: Named, limit: int) -> Iterator[dict[str, Any] | None]:
    """The checked records of a file; None in place of a last line that was cut short.

    Args:
        named: the file.
        limit: experts must be below it.
    """
    for number, record, line in read_json_lines(named):
        where = named.at(number)
        if record is CUT:
            yield None
            continue
        shown = line[:60].decode("utf-8", "backslashreplace").strip()
        if not isinstance(record, dict):
            rule = "is not a JSON object with whole numbers in top_indices"
            raise ConfigError(where, shown, rule, "Delete the line if a killed run cut it short.")
        missing = [key for key in _KEYS if key not in record]
        if missing:
            rule = f"lacks {', '.join(missing)}"
            raise ConfigError(where, shown, rule, "Delete the line if a killed run cut it short.")
        for key in ("step", "layer", "rank", "topk"):
            values.whole(record[key], f"{where}: {key}")
        if "mtp_idx" in record:
            values.whole(record["mtp_idx"], f"{where}: mtp_idx")
        values.text(record["block"], f"{where}: block", example='"decoder"')
        record["top_indices"] = _chosen(record["top_indices"], where, shown, limit, b"true" in line or b"false" in line)
        yield record


def _chosen(chosen: object, where: str, shown: str, limit: int, has_booleans: bool) -> NDArray[np.int64]:
    """The experts in `top_indices`, without the -1 of tokens that were dropped."""
    rule = "is not a JSON object with whole numbers in top_indices"
    wrong = ConfigError(where, shown, rule, "Delete the line if a killed run cut it short.")
    if not isinstance(chosen, list) or (has_booleans and _holds_boolean(chosen)):
        raise wrong
    try:
        experts = np.asarray(chosen)
    except ValueError:  # rows of different lengths
        raise wrong from None
    if experts.size == 0:
        return np.zeros(0, dtype=np.int64)
    if experts.dtype.kind != "i" or experts.ndim > 2:
        raise wrong
    if experts.min() < -1 or experts.max() >= limit:
        expert = int(experts.min() if experts.min() < -1 else experts.max())
        raise PlanError(f"{where}: the trace names expert {expert}: must be below {limit:,}")
    return np.asarray(experts[experts >= 0], dtype=np.int64)


def _holds_boolean(chosen: list[Any]) -> bool:
    return any(isinstance(one, bool) or (isinstance(one, list) and _holds_boolean(one)) for one in chosen)


def _add(records: RankRecords, record: Mapping[str, Any]) -> None:
    layer = (record["block"], record.get("mtp_idx", 0), record["layer"])
    counts_E = np.bincount(record["top_indices"])
    experts = np.flatnonzero(counts_E)
    records.steps.setdefault(record["step"], {}).setdefault(layer, []).append((experts, counts_E[experts]))
    records.top_k = max(records.top_k, record["topk"])
    records.highest = max(records.highest, int(experts[-1]) if len(experts) else -1)


def _stages(
    by_rank: Mapping[int, RankRecords], named: Named, choice: MegatronChoice, notes: list[str]
) -> list[list[int]]:
    """The ranks of each pipeline stage, in the order of the stages."""
    ranks = list(by_rank)
    if choice.stages is not None:
        values.whole(choice.stages, "--trace-stages", least=1, most=len(ranks), example=2)
        if len(ranks) % choice.stages:
            rule = f"must divide the trace's {len(ranks)} ranks"
            raise ConfigError("--trace-stages", choice.stages, rule, "Give the run's pipeline-parallel size.")
        size = len(ranks) // choice.stages
        return [ranks[begin : begin + size] for begin in range(0, len(ranks), size)]
    stages: list[list[int]] = []
    layers: list[frozenset[Layer]] = []
    for rank in ranks:
        if stages and layers[-1] == by_rank[rank].layers:
            stages[-1].append(rank)
        else:
            stages.append([rank])
            layers.append(by_rank[rank].layers)
    if len(set(map(len, stages))) > 1:
        # A rank that stopped in its first step lacks layers of its stage; what it has must be part of theirs.
        stages = [ranks] if len(frozenset.union(*layers)) == max(map(len, layers)) else stages
    if len(stages) == 1 and (by_load := _stages_by_load(by_rank)) > 1:
        size = len(ranks) // by_load
        stages = [ranks[begin : begin + size] for begin in range(0, len(ranks), size)]
        text = f"{by_load} pipeline stages of {size} ranks, told apart by their loads"
        notes.append(f"{text}; if they are one, pass --trace-stages 1")
        return stages
    if len(set(map(len, stages))) > 1:
        found = ", ".join(str(len(stage)) for stage in stages)
        raise PlanError(f"pipeline stages, told apart by their layers, have {found} ranks: pass --trace-ranks")
    if len(stages) > 1:
        text = "; ".join(f"ranks {stage[0]} to {stage[-1]}" for stage in stages[:8])
        notes.append(f"{len(stages)} pipeline stages, told apart by their layers: {text}")
    elif len(ranks) > 1:
        notes.append(f"{len(ranks)} ranks are read as one pipeline stage; if they are N of them, pass --trace-stages N")
    return stages


def _stages_by_load(by_rank: Mapping[int, RankRecords]) -> int:
    """The number of stages into which the loads of consecutive ranks fall; 1 where they do not.

    Neighbours are compared by the two-sample chi-square statistic over its degrees of freedom, which is about 1 for
    tokens that were drawn alike and a few times that for real batches. Other routers differ by far more.
    """
    loads_LE = [_total_load(records) for records in by_rank.values()]
    differences = [_difference(one, other) for one, other in itertools.pairwise(loads_LE)]
    for size in range(2, len(by_rank) // 2 + 1):
        if len(by_rank) % size == 0:
            borders = differences[size - 1 :: size]
            inside = [found for at, found in enumerate(differences, 1) if at % size]
            if min(borders) > OTHER_ROUTERS * max(1.0, *inside):
                return len(by_rank) // size
    return 1


def _total_load(records: RankRecords) -> dict[Layer, NDArray[np.int64]]:
    """Assignments to each expert in all steps, by layer."""
    loads: dict[Layer, NDArray[np.int64]] = {}
    for layers in records.steps.values():
        for layer, batches in layers.items():
            load_E = loads.setdefault(layer, np.zeros(records.highest + 1, dtype=np.int64))
            for experts, times in batches:
                load_E[experts] += times
    return loads


def _difference(one: Mapping[Layer, NDArray[np.int64]], other: Mapping[Layer, NDArray[np.int64]]) -> float:
    """Mean over the layers of chi-square over degrees of freedom."""
    found = []
    for layer in one.keys() & other.keys():
        pair = np.zeros((2, max(len(one[layer]), len(other[layer]))))
        pair[0, : len(one[layer])], pair[1, : len(other[layer])] = one[layer], other[layer]
        pair = pair[:, pair.any(axis=0)]
        totals = pair.sum(axis=1)
        if totals.all() and pair.shape[1] > 1:
            scaled = pair * np.sqrt(totals[::-1] / totals)[:, None]
            found.append(((scaled[0] - scaled[1]) ** 2 / pair.sum(axis=0)).sum() / (pair.shape[1] - 1))
    return float(np.mean(found)) if found else 0.0


def _layer_numbers(stages: Sequence[Sequence[int]], by_rank: Mapping[int, RankRecords]) -> list[dict[Layer, int]]:
    """For each stage, its layers and their numbers over all stages: decoder layers first, then prediction blocks."""
    layers = [sorted(frozenset.union(*(by_rank[rank].layers for rank in stage))) for stage in stages]
    decoders = [[layer for layer in one if layer[0] == "decoder"] for one in layers]
    counted = [layer for one in decoders for layer in one]
    offset, offsets = 0, []
    for one in decoders:  # distinct numbers are those of the model already: a release that numbers over all stages
        offsets.append(0 if len(set(counted)) == len(counted) else offset)
        offset += max((layer[2] + 1 for layer in one), default=0)
    last = max((layer[2] + offsets[at] for at, one in enumerate(decoders) for layer in one), default=-1)
    numbers: list[dict[Layer, int]] = []
    for at, one in enumerate(layers):
        numbers.append({layer: layer[2] + offsets[at] for layer in decoders[at]})
        for layer in one:
            if layer[0] != "decoder":
                last += 1
                numbers[at][layer] = last
    return numbers


def _agreed_steps(
    stages: Sequence[Sequence[int]],
    numbers: Sequence[Mapping[Layer, int]],
    by_rank: Mapping[int, RankRecords],
    notes: list[str],
    named: Named,
) -> dict[int, int]:
    """The steps that every rank has, and how many micro-batches of every layer of its stage all of them have."""
    steps = sorted({step for records in by_rank.values() for step in records.steps})
    agreed: dict[int, int] = {}
    partly: list[str] = []
    for step in steps:
        found = {
            rank: [len(by_rank[rank].steps.get(step, {}).get(layer, ())) for layer in numbers[at]]
            for at, stage in enumerate(stages)
            for rank in stage
        }
        least, most = min(map(min, found.values())), max(map(max, found.values()))
        if least:
            agreed[step] = least
        if 0 < least < most:
            rank = next(rank for rank, counts in found.items() if min(counts) == least)
            partly.append(f"step {step}: {least} of {most} micro-batches are used, rank {rank} has no more")
    if not agreed:
        rule = "has no step that all of its ranks have recorded"
        raise ConfigError(named.field, str(named.path), rule, "Name ranks of one run with --trace-ranks.")
    if len(agreed) < len(steps):
        behind = [rank for rank, records in by_rank.items() if max(records.steps) < steps[-1]]
        why = f"rank {_listed(behind)} stopped at step {max(agreed)}" if behind else "a rank lacks them"
        notes.append(f"{len(agreed)} of {len(steps)} steps are used: {why}")
    notes += partly[:3]
    sizes = sorted(set(agreed.values()))
    if len(sizes) > 1:
        notes.append(f"steps have {_listed(sizes)} micro-batches: each is used with its own")
    return agreed


def _assemble(
    stages: Sequence[Sequence[int]],
    numbers: Sequence[Mapping[Layer, int]],
    by_rank: Mapping[int, RankRecords],
    micro_of_step: Mapping[int, int],
    named: Named,
    choice: MegatronChoice,
    size: int,
    notes: Sequence[str],
) -> RoutingTrace:
    """Put what all ranks have into one array, `[steps, layers, source ranks, micro-batches, experts]`."""
    # Step 1: the axes.
    steps, num_micro, num_sources = list(micro_of_step), max(micro_of_step.values()), len(stages[0])
    layers = sorted(number for one in numbers for number in one.values())
    num_experts = choice.num_experts or -(-(max(records.highest for records in by_rank.values()) + 1) // 8) * 8
    shape = (len(steps), len(layers), num_sources, num_micro, max(num_experts, 8 if not choice.num_experts else 1))
    cells = int(np.prod([float(length) for length in shape]))
    if cells > max(ALWAYS_CELLS, size):
        rule = f"would become {cells:,} counts ({' x '.join(map(str, shape))}), too many for {size:,} bytes of records"
        raise ConfigError(named.field, str(named.path), rule, "Read fewer ranks with --trace-ranks.")
    # Step 2: the counts.
    counts = np.zeros(shape, dtype=np.uint32)
    for at_stage, stage in enumerate(stages):
        for at_source, rank in enumerate(stage):
            for at_step, step in enumerate(steps):
                for layer, batches in by_rank[rank].steps[step].items():
                    row = layers.index(numbers[at_stage][layer])
                    for micro, (experts, times) in enumerate(batches[: micro_of_step[step]]):
                        counts[at_step, row, at_source, micro, experts] = times
    meta = {
        "experts": shape[-1],
        "top_k": max(records.top_k for records in by_rank.values()),
        "source_ranks": num_sources,
        "source": named.path.name,
    }
    return RoutingTrace(
        counts=counts[:, :, :, 0] if num_micro == 1 else counts,
        iteration=np.array(steps, dtype=np.int64),
        layer=np.array(layers, dtype=np.int64),
        meta=meta,
        notes=tuple(notes),
    )


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers[:8])) + (", ..." if len(numbers) > 8 else "")
