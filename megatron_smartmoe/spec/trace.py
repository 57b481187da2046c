"""Reading a routing trace, whatever wrote it; which format it is shows in its content, not in its name.

| content | written by |
|---|---|
| `.npz` with `counts`, `iteration`, `layer`, `meta` | `--smartmoe-record-trace`, `RoutingTrace.save` |
| JSON lines with `top_indices`; a directory of `router_trace_rank*.jsonl` | Megatron's `--moe-routing-trace-path` |
| JSON lines with `expert_load` | vLLM's record of expert load |
| a zip of torch (`.pt`) with `logical_count` or `records`; a directory of them | SGLang's expert distribution recorder |
| a matrix `[layers, experts]` or `[records, layers, experts]`: `.npy`, `.npz`, JSON, `.pt`; CSV `layer_id,expert_id,count` | the weights that EPLB takes, SGLang's first recorder, own scripts |

A load without source ranks becomes a trace with one, whose tokens `RoutingTrace.groups` shares evenly among the ranks.
"""  # noqa: E501 (a table)

from __future__ import annotations

import os
from collections.abc import Container
from pathlib import Path
from typing import Any

from megatron_smartmoe.errors import ConfigError, PlanError
from megatron_smartmoe.spec import trace_loads, trace_megatron
from megatron_smartmoe.spec.readers import files
from megatron_smartmoe.spec.readers.files import Named
from megatron_smartmoe.spec.readers.json_text import parse
from megatron_smartmoe.spec.readers.numpy_files import NPY_MAGIC, ZIP_MAGIC, Array, read_npz, whole_numbers
from megatron_smartmoe.spec.routing_trace import VERSION, RoutingTrace
from megatron_smartmoe.spec.trace_megatron import MegatronChoice, from_megatron

__all__ = ["RoutingTrace", "from_megatron", "load_trace"]

WAY_OUT = "Give an .npz trace, Megatron's trace directory, or a load of EPLB, SGLang or vLLM (docs/traces.md)."
_ARRAYS = ("counts", "iteration", "layer", "meta")


def load_trace(
    path: Path,
    *,
    num_experts: int | None = None,
    ranks: Container[int] | None = None,
    stages: int | None = None,
    field: str = "--trace",
) -> RoutingTrace:
    """Read a trace or a load in any of the formats above.

    Args:
        path: the file or directory.
        num_experts: see `from_megatron`; None for other formats, which have it.
        ranks: see `from_megatron`; None for other formats, which have no ranks to choose from.
        stages: see `from_megatron`; None for other formats.
        field: the flag that named the path, for errors.

    Raises:
        ConfigError: missing, unreadable, of an unknown format or version; names file and line.
        PlanError: records of Megatron contradict each other.
    """
    named = Named(path=path, field=field, way_out=WAY_OUT)
    choice = MegatronChoice(num_experts=num_experts, ranks=ranks, stages=stages)
    reader = _reader_of(named)
    if reader is not trace_megatron.read:
        for flag, given in (("--trace-experts", num_experts), ("--trace-ranks", ranks), ("--trace-stages", stages)):
            if given is not None:
                rule = "is for Megatron's JSONL; this file has its layers and experts already"
                raise ConfigError(flag, given, rule, f"Remove {flag}.")
        try:
            trace: RoutingTrace = reader(named)
        except PlanError as error:
            raise named.refused(f"is not a routing trace: {error}") from None
    else:
        trace = trace_megatron.read(named, choice)
    if trace.total == 0:
        raise named.refused("has no assignment of a token to an expert")
    return trace


def _reader_of(named: Named) -> Any:
    """The function that reads what the file, or the files of the directory, hold."""
    if os.path.isdir(named.path):
        return trace_loads.read_recorders if any(named.path.glob("*.pt")) else trace_megatron.read
    files.size_of(named)
    with named.path.open("rb") as file:
        head = file.read(16)
    if head.startswith(ZIP_MAGIC):
        return _read_zip
    if head.startswith(NPY_MAGIC):
        return trace_loads.read_npy_load
    if named.path.suffix in (".npz", ".npy", ".pt", ".pth"):
        raise named.refused(f"is not {'an' if named.path.suffix[1] == 'n' else 'a'} {named.path.suffix} file")
    if named.path.suffix == ".csv" or head.startswith((b"layer_id", b'"layer_id')):
        return trace_loads.read_csv_load
    return _reader_of_text(named)


def _reader_of_text(named: Named) -> Any:
    """Told by the first value of the file: JSON lines of Megatron or vLLM, or one JSON document."""
    for number, line in files.read_lines(named):
        if not line.strip():
            continue
        try:
            value = parse(files.decode(line, named, number), named, number)
        except ConfigError:
            if named.path.suffix == ".jsonl":
                raise
            return trace_loads.read_json_load  # one document over several lines, or no JSON at all
        if isinstance(value, dict) and ("record_type" in value or ("expert_load" in value and "step" in value)):
            return trace_loads.read_vllm
        several = named.path.suffix == ".jsonl" or (isinstance(value, dict) and "top_indices" in value)
        return trace_megatron.read if several else trace_loads.read_json_load
    if named.path.suffix == ".jsonl":
        return trace_megatron.read
    raise named.refused("is empty")


def _read_zip(named: Named) -> RoutingTrace:
    """A zip is numpy's (ours, or somebody's matrix) or torch's."""
    if trace_loads.is_torch(named):
        return trace_loads.read_torch_load(named)
    if not trace_loads.has_members(named, ("meta",)) and not trace_loads.has_members(named, ("iteration",)):
        return trace_loads.read_npz_load(named)
    arrays = read_npz(named, _ARRAYS)
    meta = _meta(arrays["meta"], named)
    return RoutingTrace(
        counts=arrays["counts"],
        iteration=whole_numbers(arrays["iteration"], "iteration", named),
        layer=whole_numbers(arrays["layer"], "layer", named),
        meta=meta,
    )


def _meta(array: Array, named: Named) -> dict[str, Any]:
    if array.dtype.kind != "U" or array.size != 1:
        raise named.refused("is not a routing trace: its meta is no text")
    meta = parse(str(array.reshape(-1)[0]), Named(path=named.path, field=f"{named.field}: meta", way_out=named.way_out))
    version = meta.get("version") if isinstance(meta, dict) else None
    if type(version) is not int or version != VERSION:
        raise ConfigError(
            named.field, str(named.path), f"has version {version!r:.60}", f"Only version {VERSION} is known."
        )
    return dict(meta)
