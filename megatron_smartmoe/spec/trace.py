"""RoutingTrace: how many tokens each rank routed to each expert, record by record.

File format (`.npz`, readable without this project): `counts` unsigned int `[iterations, layers, source_ranks,
experts]`, with an optional micro-batch axis before `experts`; assignments (tokens x top-k) by logical expert, before
dropping. `iteration` and `layer` (global layer number) int64; `meta` a JSON string with `version, experts, top_k,
source_ranks, source`. Counts by source rank, not totals: the split and the all-to-all depend on where tokens come
from.

`from_megatron` imports what Megatron writes with `--moe-routing-trace-path` (a JSONL file per rank, one line per
step, layer and micro-batch, with the chosen experts of every token).
"""

from __future__ import annotations

import json
import math
import re
import zipfile
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_smartmoe.errors import ConfigError, PlanError
from megatron_smartmoe.spec.arrays import IntArray

VERSION = 1

_RANK_FILE = re.compile(r"router_trace_rank(\d+)\.jsonl$")


@dataclass(frozen=True, kw_only=True, eq=False)
class RoutingTrace:
    """Routing counts of a run.

    Attributes:
        counts: unsigned `[N, L, source ranks, E]` or, with micro-batches, `[N, L, source ranks, M, E]`.
        iteration: training iteration of each record, `[N]`, increasing.
        layer: global number of each layer, `[L]`.
        meta: `experts`, `top_k`, `source_ranks`, `source`, and anything else worth keeping.
    """

    counts: NDArray[Any]
    iteration: IntArray
    layer: IntArray
    meta: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        counts, iteration, layer = self.counts, self.iteration, self.layer
        if counts.ndim not in (4, 5) or 0 in counts.shape:
            raise PlanError(f"trace counts must have 4 or 5 axes, none of them empty, got shape {counts.shape}")
        if counts.dtype.kind not in "ui":
            raise PlanError(f"trace counts must be whole numbers, got {counts.dtype}")
        if counts.dtype.kind == "i" and (counts < 0).any():
            at = tuple(int(i) for i in np.argwhere(counts < 0)[0])
            raise PlanError(f"trace counts{list(at)} = {counts[at]}: must not be negative")
        for name, values, length in (("iteration", iteration, counts.shape[0]), ("layer", layer, counts.shape[1])):
            if values.shape != (length,):
                raise PlanError(f"trace {name} has shape {values.shape}, counts say ({length},)")
        late = np.nonzero(np.diff(iteration) <= 0)[0]
        if len(late):
            record = int(late[0]) + 1
            raise PlanError(f"trace iteration[{record}] = {iteration[record]}: must be above the one before it")
        for name, found in (("experts", counts.shape[-1]), ("source_ranks", counts.shape[2])):
            if self.meta.get(name, found) != found:
                raise PlanError(f"trace meta {name} = {self.meta[name]!r}: counts have {found}")

    @property
    def num_records(self) -> int:
        """N."""
        return int(self.counts.shape[0])

    @property
    def num_layers(self) -> int:
        """L."""
        return int(self.counts.shape[1])

    @property
    def num_sources(self) -> int:
        """Source ranks, over all expert-parallel groups of the pipeline stage."""
        return int(self.counts.shape[2])

    @property
    def num_experts(self) -> int:
        """E."""
        return int(self.counts.shape[-1])

    @property
    def has_micro_batches(self) -> bool:
        """Whether micro-batches are kept apart."""
        return self.counts.ndim == 5

    def groups(self, num_ranks: int, record: int | slice = slice(None)) -> NDArray[np.int64]:
        """Counts by group of `num_ranks` source ranks, `[N, L, G, M, R, E]`; M is 1 without micro-batches.

        Consecutive source ranks form a group. Fewer source ranks than `num_ranks` are spread: each one's tokens are
        shared evenly by R / source_ranks consecutive ranks, remainders to the first.

        Args:
            num_ranks: R.
            record: which records; for a single one the first axis is left out.
        """
        counts = self.counts[record].astype(np.int64)
        if not self.has_micro_batches:
            counts = counts[..., None, :]
        *front, num_sources, num_micro, num_experts = counts.shape
        if num_sources % num_ranks == 0:
            grouped = counts.reshape(*front, num_sources // num_ranks, num_ranks, num_micro, num_experts)
        elif num_ranks % num_sources == 0:
            parts = num_ranks // num_sources
            spread = (counts[..., None, :, :] + np.arange(parts)[::-1, None, None]) // parts
            grouped = spread.reshape(*front, 1, num_ranks, num_micro, num_experts)
        else:
            rule = f"must divide, or be a multiple of, the trace's {num_sources} source ranks"
            raise ConfigError("--ep", num_ranks, rule, f"For example: {math.gcd(num_ranks, num_sources)}.")
        return np.swapaxes(grouped, -3, -2)

    def save(self, path: Path) -> None:
        """Write the `.npz` file."""
        meta = {
            **self.meta,
            "version": VERSION,
            "experts": self.num_experts,
            "source_ranks": self.num_sources,
        }
        counts = self.counts.astype(np.min_scalar_type(int(self.counts.max())))
        np.savez_compressed(path, counts=counts, iteration=self.iteration, layer=self.layer, meta=json.dumps(meta))


def load_trace(path: Path, *, num_experts: int | None = None, ranks: Container[int] | None = None) -> RoutingTrace:
    """Read a trace: an `.npz` file, or a directory (or one file) of Megatron's JSONL.

    Args:
        path: the file or directory.
        num_experts: see `from_megatron`; None for an `.npz` file, which has it.
        ranks: see `from_megatron`; None for an `.npz` file, which has no ranks to choose from.

    Raises:
        ConfigError: missing, unreadable, or of an unknown version.
        PlanError: its numbers contradict each other.
    """
    if path.is_dir() or (path.suffix == ".jsonl" and path.is_file()):
        return from_megatron(path, num_experts=num_experts, ranks=ranks)
    for flag, given in (("--trace-experts", num_experts), ("--trace-ranks", ranks)):
        if given is not None:
            rule = "is for Megatron's JSONL; an .npz trace has its ranks and experts already"
            raise ConfigError(flag, given, rule, f"Remove {flag}.")
    if not path.is_file():
        raise ConfigError("--trace", str(path), "does not exist", "Give an .npz file or Megatron's trace directory.")
    try:
        with np.load(path, allow_pickle=False) as content:
            arrays = {name: content[name] for name in ("counts", "iteration", "layer", "meta")}
        meta = json.loads(str(arrays["meta"]))
    except (KeyError, ValueError, TypeError, EOFError, OSError, zipfile.BadZipFile) as error:
        rule = f"is not a routing trace: {error}"
        raise ConfigError("--trace", str(path), rule, "It needs counts, iteration, layer and meta.") from None
    if not isinstance(meta, dict) or meta.get("version") != VERSION:
        found = meta.get("version") if isinstance(meta, dict) else meta
        raise ConfigError("--trace", str(path), f"has version {found!r}", f"Only version {VERSION} is known.")
    return RoutingTrace(
        counts=arrays["counts"],
        iteration=arrays["iteration"].astype(np.int64),
        layer=arrays["layer"].astype(np.int64),
        meta=meta,
    )


def from_megatron(path: Path, *, num_experts: int | None = None, ranks: Container[int] | None = None) -> RoutingTrace:
    """Import what `--moe-routing-trace-path` wrote: `router_trace_rank{N}.jsonl`.

    A file has one line per step, layer and micro-batch; a rank's n-th line for a step and layer is micro-batch n. Ranks
    become source ranks in rank order. Multi-token-prediction blocks are numbered after the decoder's layers. Megatron
    numbers layers by their place in the rank's own pipeline stage, and tensor-parallel ranks without sequence
    parallelism record the same tokens: name the `ranks` of one stage, each of whose tokens are its own.

    Args:
        path: the directory, or one rank's file.
        num_experts: E; None takes the highest expert seen plus one, rounded up to a multiple of 8.
        ranks: ranks to read; None reads all.

    Raises:
        ConfigError: no file, no record, a line that is not one of Megatron's, or none of the `ranks`.
        PlanError: ranks or micro-batches are missing somewhere, or an expert is not below `num_experts`.
    """
    files = [path] if path.is_file() else sorted(path.glob("router_trace_rank*.jsonl"), key=_rank_of)
    if not files:
        raise ConfigError("--trace", str(path), "has no router_trace_rank*.jsonl", "Run with --moe-routing-trace-path.")
    there = [_rank_of(file) for file in files]
    files = [file for file in files if ranks is None or _rank_of(file) in ranks]
    if not files:
        way_out = f"There are ranks {', '.join(map(str, there))}."
        raise ConfigError("--trace-ranks", ranks, f"names no rank of {path.name}", way_out)
    tallies: dict[tuple[int, str, int, int, int], list[NDArray[np.int64]]] = {}
    top_k = 0
    for file in files:
        for record in _records(file):
            key = (record["step"], record["block"], record.get("mtp_idx", 0), record["layer"], record["rank"])
            experts = record["top_indices"]
            tallies.setdefault(key, []).append(np.bincount(experts[experts >= 0]))
            top_k = max(top_k, int(record["topk"]))
    if not tallies:
        raise ConfigError(
            "--trace", str(path), "has no records", "Run at least one step with --moe-routing-trace-path."
        )
    return _assemble(tallies, num_experts, top_k, str(path.name))


def _rank_of(file: Path) -> int:
    match = _RANK_FILE.search(file.name)
    return int(match.group(1)) if match else -1


def _records(file: Path) -> Iterator[dict[str, Any]]:
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                record = json.loads(line)
                missing = [k for k in ("step", "block", "layer", "rank", "topk", "top_indices") if k not in record]
                rule = f"lacks {', '.join(missing)}"
                if not missing:
                    record["top_indices"] = np.asarray(record["top_indices"], dtype=np.int64).ravel()
            except (ValueError, TypeError):
                missing, rule = ["all"], "is not a JSON object with whole numbers in top_indices"
            if missing:
                where = f"{file.name}:{number}"
                raise ConfigError(where, line[:60].strip(), rule, "Delete the line if a killed run cut it short.")
            yield record


def _assemble(
    tallies: Mapping[tuple[int, str, int, int, int], list[NDArray[np.int64]]],
    num_experts: int | None,
    top_k: int,
    source: str,
) -> RoutingTrace:
    """Put the tallies of (step, block, mtp index, layer, rank) into one array; every layer needs as many ranks."""
    # Step 1: the axes: steps, layers (decoder first, then prediction blocks), ranks, micro-batches, experts.
    steps = sorted({key[0] for key in tallies})
    blocks = sorted({key[1:4] for key in tallies})  # "decoder" sorts before "mtp"
    ranks_of = {block: sorted({key[4] for key in tallies if key[1:4] == block}) for block in blocks}
    num_sources, num_micro = len(ranks_of[blocks[0]]), max(len(batches) for batches in tallies.values())
    highest = max(len(batch) for batches in tallies.values() for batch in batches)
    num_experts = num_experts or -(-highest // 8) * 8
    if highest > num_experts:
        raise PlanError(f"the trace names expert {highest - 1}: must be below {num_experts}")
    # Step 2: fill the counts; a missing rank or micro-batch is an error.
    counts = np.zeros((len(steps), len(blocks), num_sources, num_micro, num_experts), dtype=np.uint32)
    for at_block, block in enumerate(blocks):
        if len(ranks_of[block]) != num_sources:
            raise PlanError(f"{block[0]} layer {block[2]} has {len(ranks_of[block])} ranks, others have {num_sources}")
        for at_step, step in enumerate(steps):
            for at_rank, rank in enumerate(ranks_of[block]):
                batches = tallies.get((step, *block, rank), [])
                if len(batches) != num_micro:
                    raise PlanError(
                        f"step {step}, {block[0]} layer {block[2]}, rank {rank} has {len(batches)} micro-batches, "
                        f"others have {num_micro}"
                    )
                for micro, batch in enumerate(batches):
                    counts[at_step, at_block, at_rank, micro, : len(batch)] = batch
    # Step 3: number the layers, prediction blocks after the decoder's.
    last_decoder = max([block[2] for block in blocks if block[0] == "decoder"], default=-1)
    num_decoder = sum(block[0] == "decoder" for block in blocks)
    layer = [b[2] if b[0] == "decoder" else last_decoder + 1 + at - num_decoder for at, b in enumerate(blocks)]
    return RoutingTrace(
        counts=counts[:, :, :, 0] if num_micro == 1 else counts,
        iteration=np.array(steps, dtype=np.int64),
        layer=np.array(layer, dtype=np.int64),
        meta={"experts": num_experts, "top_k": top_k, "source_ranks": num_sources, "source": source},
    )
