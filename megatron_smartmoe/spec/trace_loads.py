"""Expert loads that were recorded elsewhere, as traces: EPLB's weights, SGLang's and vLLM's records.

A load says how often each expert was chosen, not by which rank: it becomes a trace with one source rank. What is
counted by physical expert (a replica has a number of its own) is added up to logical experts with the map that stands
beside it. Loads with fractions (averages, shares) are scaled to whole numbers, and the trace's notes say so.

| keys | meaning |
|---|---|
| `logical_count` | SGLang, mode `stat`: `[passes, layers, experts]`, or without the first axis |
| `records`, `last_physical_to_logical_map` | SGLang, modes `per_pass` and `per_token`: a record per pass and rank |
| `expert_load`, `p2l_map` | vLLM, one record: `[layers, physical experts]` and their logical experts |
| `weight`, `expert_load_window`, `counts` and others of `_LOADS` | a matrix under its name |
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from megatron_smartmoe.errors import ConfigError
from megatron_smartmoe.spec.arrays import IntArray
from megatron_smartmoe.spec.readers import values
from megatron_smartmoe.spec.readers.csv_rows import read_rows
from megatron_smartmoe.spec.readers.files import Named
from megatron_smartmoe.spec.readers.json_text import CUT, kind_of, read_json, read_json_lines
from megatron_smartmoe.spec.readers.numpy_files import Array, check_cells, read_npy, read_npz
from megatron_smartmoe.spec.readers.torch_files import array_of, read_torch
from megatron_smartmoe.spec.readers.torch_save import StoredTensor
from megatron_smartmoe.spec.routing_trace import MOST_COUNT, MOST_EXPERTS, MOST_LAYERS, RoutingTrace

SCALE = 2**20  # assignments of a layer's busiest record, where a load has fractions
_LOADS = (
    *("logical_count", "expert_load", "global_expert_load", "global_expert_load_window", "expert_load_window"),
    *("expert_load_pass", "counts", "load", "weight", "weights", "tokens_per_expert", "expert_counts"),
)
_MAPS = ("p2l_map", "physical_to_logical_map", "last_physical_to_logical_map")
_SHAPES = "[layers, experts], [records, layers, experts] or [records, layers, ranks, experts]"


def read_npy_load(named: Named) -> RoutingTrace:
    """A matrix in an `.npy` file."""
    return _trace(_checked(read_npy(named), "the array", named), named, [])


def read_npz_load(named: Named) -> RoutingTrace:
    """A matrix in an `.npz` file that is no trace: the only array, or the one with a name of `_LOADS`."""
    return _of_mapping(dict(read_npz(named)), named)


def read_torch_load(named: Named) -> RoutingTrace:
    """A tensor, or a dictionary with tensors, that `torch.save` wrote."""
    content = read_torch(named)
    return _of_mapping(content, named) if isinstance(content, dict) else _trace(_array(content, "", named), named, [])


def read_json_load(named: Named) -> RoutingTrace:
    """A matrix as nested lists, or an object that holds one."""
    content = read_json(named)
    return _of_mapping(content, named) if isinstance(content, dict) else _trace(_array(content, "", named), named, [])


def read_csv_load(named: Named) -> RoutingTrace:
    """`layer_id,expert_id,count`, as SGLang's first recorder wrote it."""
    rows = read_rows(named, ("layer_id", "expert_id", "count"))
    cells = [
        (row.whole("layer_id", most=MOST_LAYERS), row.whole("expert_id", most=MOST_EXPERTS - 1), row.whole("count"))
        for row in rows
    ]
    if not cells:
        raise named.refused("has no rows")
    layers = sorted({layer for layer, _, _ in cells})
    num_experts = -(-(1 + max(expert for _, expert, _ in cells)) // 8) * 8
    check_cells(len(layers) * num_experts, 0, "layers and experts", named)
    load_LE = np.zeros((len(layers), num_experts), dtype=np.int64)
    for layer, expert, count in cells:
        load_LE[layers.index(layer), expert] += count
    return _trace(load_LE, named, [], layers)


def read_vllm(named: Named) -> RoutingTrace:
    """vLLM's JSON lines: a record of `[layers, physical experts]` per step, each with its map to logical experts."""
    steps: list[int] = []
    loads: list[Array] = []
    notes: list[str] = []
    for number, record, _ in read_json_lines(named):
        if record is CUT:
            notes.append("the last line is cut short and left out")
        elif not isinstance(record, dict):
            raise ConfigError(named.at(number), None, "is no JSON object", "Delete the line.")
        elif "expert_load" in record:
            steps.append(values.whole(record.get("step", len(steps)), f"{named.at(number)}: step"))
            loads.append(_logical(record, "expert_load", named, f"{named.at(number)}: "))
            if loads[-1].ndim != 2 or loads[-1].shape != loads[0].shape:
                rule = f"has a load of shape {loads[-1].shape}: must be [layers, experts], like the records before it"
                raise ConfigError(named.at(number), steps[-1], rule, "Delete the line.")
            check_cells(len(loads) * loads[0].size, named.path.stat().st_size, "all records", named)
    if not loads:
        raise named.refused("has no record with expert_load")
    order = np.argsort(steps, kind="stable")
    kept = [
        int(at)
        for at, later in zip(order, [*order[1:], None], strict=True)
        if later is None or steps[at] != steps[later]
    ]
    if len(kept) < len(steps):
        notes.append(f"{len(steps) - len(kept)} records repeat a step and are left out: the last one of a step is used")
    stacked = np.stack([loads[at] for at in kept])
    return _trace(stacked, named, notes, iteration=[steps[at] for at in kept])


def read_recorders(named: Named) -> RoutingTrace:
    """A directory of SGLang's dumps: one of mode `stat`, or a file per rank of modes `per_pass` and `per_token`."""
    paths = sorted(named.path.glob("*.pt"))[:1000]
    contents = [read_torch(Named(path=path, field=named.field, way_out=named.way_out)) for path in paths]
    detailed = [one for one in contents if isinstance(one, dict) and "records" in one]
    if detailed:
        notes = (
            [f"{len(paths) - len(detailed)} files have no records and are left out"]
            if len(detailed) < len(paths)
            else []
        )
        return _of_records(detailed, named, notes)
    if len(paths) > 1:
        rule = f"has {len(paths)} files that are not records of one run"
        raise ConfigError(named.field, str(named.path), rule, f"Give one of them, for example {paths[-1]}.")
    return read_torch_load(Named(path=paths[0], field=named.field, way_out=named.way_out))


def is_torch(named: Named) -> bool:
    """Whether a zip is a file of `torch.save`."""
    return any(name.endswith("/data.pkl") for name in _names(named))


def has_members(named: Named, wanted: Sequence[str]) -> bool:
    """Whether an `.npz` file has all these arrays."""
    return {f"{name}.npy" for name in wanted} <= set(_names(named))


def _names(named: Named) -> list[str]:
    try:
        with zipfile.ZipFile(named.path) as archive:
            return archive.namelist()
    except Exception as error:  # a damaged directory fails in any way
        raise named.refused(f"is not an .npz or .pt file: {type(error).__name__}") from None


def _of_mapping(content: Mapping[Any, Any], named: Named) -> RoutingTrace:
    """The load in an object or a dictionary."""
    if isinstance(content.get("records"), list):
        return _of_records([content], named, [])
    found = [name for name in _LOADS if name in content]
    if found:
        return _trace(_logical(content, found[0], named, ""), named, [])
    if content and all(isinstance(key, str) and key.isascii() and key.isdecimal() and len(key) < 6 for key in content):
        numbers = sorted(content, key=int)
        rows = [_array(content[key], f"{key}: ", named) for key in numbers]
        if any(row.ndim != 1 or row.shape != rows[0].shape for row in rows):
            raise named.refused("has layers whose loads are not lists of one length")
        return _trace(np.stack(rows), named, [], [int(key) for key in numbers])
    if len(content) == 1:
        (name,) = content
        return _trace(_array(content[name], f"{name}: ", named), named, [])
    keys = ", ".join(str(key)[:40] for key in list(content)[:10])
    raise ConfigError(
        named.field, str(named.path), f"has none of the keys of a load, but {keys}", f"Name it {_LOADS[0]}."
    )


def _of_records(contents: Sequence[Mapping[str, Any]], named: Named, notes: list[str]) -> RoutingTrace:
    """SGLang's records of passes: `[passes, layers, ranks, experts]`, of the passes that all ranks have."""
    found: dict[int, dict[int, Array]] = {}  # rank -> pass -> load
    for content in contents:
        table = content.get("last_physical_to_logical_map")
        if not isinstance(content["records"], list):
            raise named.refused("is no recorder's dump: its records are no list")
        for at, record in enumerate(content["records"]):
            where = f"records[{at}]"
            if not isinstance(record, dict) or "global_physical_count" not in record:
                raise named.refused(f"is no recorder's dump: {where} has no global_physical_count")
            rank = values.whole(record.get("rank", 0), f"{named.path}: {where}.rank")
            number = values.whole(record.get("forward_pass_id", at), f"{named.path}: {where}.forward_pass_id")
            load = {"global_physical_count": record["global_physical_count"], "last_physical_to_logical_map": table}
            counts_LE = _logical(load, "global_physical_count", named, f"{where}.")
            before = found.setdefault(rank, {}).get(number)
            if before is not None and before.shape == counts_LE.shape:
                counts_LE = before + counts_LE  # the two halves of a pass whose batches overlap
            found[rank][number] = counts_LE
    if not found:
        raise named.refused("has no records")
    passes = sorted(set.intersection(*(set(one) for one in found.values())))
    every = set.union(*(set(one) for one in found.values()))
    if not passes:
        raise named.refused("has no pass that all of its ranks have recorded")
    if len(passes) < len(every):
        notes.append(f"{len(passes)} of {len(every)} passes are used: those that all {len(found)} ranks have")
    loads = [[found[rank][number] for rank in sorted(found)] for number in passes]
    if any(load.ndim != 2 or load.shape != loads[0][0].shape for one in loads for load in one):
        raise named.refused("has records of different shapes")
    return _trace(np.stack([np.stack(one, axis=1) for one in loads]), named, notes, iteration=passes)


def _logical(content: Mapping[str, Any], name: str, named: Named, where: str) -> Array:
    """The load under `name`, by logical expert if a map of the physical ones stands beside it."""
    load = _array(content[name], f"{where}{name}: ", named)
    table = next((content[key] for key in _MAPS if content.get(key) is not None), None)
    if table is None or name == "logical_count":
        return load
    map_LP = _array(table, f"{where}map: ", named)
    if map_LP.dtype.kind not in "iu" or map_LP.ndim != 2 or map_LP.shape != load.shape[-2:]:
        rule = f"has a map of shape {map_LP.shape} and type {map_LP.dtype} for a load of shape {load.shape}"
        raise ConfigError(
            f"{named.path}: {where}map", None, rule, "It must name the logical expert of each physical one."
        )
    if map_LP.min(initial=0) < 0 or map_LP.max(initial=0) >= MOST_EXPERTS:
        raise ConfigError(
            f"{named.path}: {where}map", int(map_LP.max(initial=0)), "names no expert", "Correct the map."
        )
    logical = np.zeros((*load.shape[:-1], int(map_LP.max(initial=0)) + 1), dtype=load.dtype)
    check_cells(logical.size, load.size, "logical experts", named)
    for layer, map_P in enumerate(map_LP):
        for physical, expert in enumerate(map_P):
            logical[..., layer, expert] += load[..., layer, physical]
    return logical


def _array(value: object, where: str, named: Named) -> Array:
    """Nested lists or an array of numbers that are no negative ones, checked."""
    if isinstance(value, StoredTensor):
        value = array_of(value, f"{where}load", named)
    if not isinstance(value, np.ndarray):
        if not isinstance(value, list):
            what = type(value).__name__ if not isinstance(value, str | int | float | dict) else kind_of(value)
            raise ConfigError(
                f"{named.path}: {where}load".replace(": load", ""), None, f"is {what}", f"Give {_SHAPES}."
            )
        if _holds_no_number(value):
            raise ConfigError(f"{named.path}: {where}load", value, "must hold numbers only", f"Give {_SHAPES}.")
        try:
            value = np.asarray(value)
        except (ValueError, OverflowError):
            raise ConfigError(
                f"{named.path}: {where}load", value, "has rows of different lengths", "Fill them."
            ) from None
    return _checked(value, f"{where}load", named)


def _holds_no_number(value: list[Any], levels: int = 5) -> bool:
    if levels == 0:
        return True
    return any(
        _holds_no_number(one, levels - 1) if isinstance(one, list) else type(one) not in (int, float) for one in value
    )


def _checked(array: Array, what: str, named: Named) -> Array:
    """The array, if it is one of finite numbers that are not negative."""
    rule = ""
    if array.dtype.kind not in "iuf" or not 1 <= array.ndim <= 4 or 0 in array.shape:
        rule = f"has shape {array.shape} and type {array.dtype}"
    elif array.dtype.kind == "f" and not np.isfinite(array).all():
        rule = "has a number that is not finite"
    elif array.dtype.kind in "if" and array.min() < 0:
        rule = f"has a negative number, {array.min()}"
    if rule:
        raise ConfigError(f"{named.path}: {what}", None, rule, f"Give numbers of at least 0, {_SHAPES}.")
    return array


def _trace(
    load: Array,
    named: Named,
    notes: Sequence[str],
    layers: Sequence[int] | None = None,
    iteration: Sequence[int] | None = None,
) -> RoutingTrace:
    """The trace of a load with one to four axes; fractions are scaled to whole numbers."""
    notes = list(notes)
    load = load.reshape((1,) * max(0, 2 - load.ndim) + load.shape)
    load_NLRE = load[None, :, None] if load.ndim == 2 else load[:, :, None] if load.ndim == 3 else load
    load_NLRE, scaled = _whole(load_NLRE)
    notes += scaled
    if load_NLRE.shape[2] == 1:
        notes.append("it has no source ranks: each rank is taken to route an equal share")
    num_records, num_layers = load_NLRE.shape[:2]
    return RoutingTrace(
        counts=load_NLRE,
        iteration=np.array(range(num_records) if iteration is None else iteration, dtype=np.int64),
        layer=np.array(range(num_layers) if layers is None else layers, dtype=np.int64),
        meta={"experts": load_NLRE.shape[-1], "source_ranks": load_NLRE.shape[2], "source": named.path.name},
        notes=tuple(notes),
    )


def _whole(load: Array) -> tuple[IntArray, list[str]]:
    """The load in whole numbers, and what was done to it."""
    whole = load.dtype.kind in "iu" or bool((load == np.floor(load)).all())
    if whole and load.max() <= MOST_COUNT:
        return load.astype(np.int64), []
    share = np.asarray(load, dtype=np.float64) / max(float(load.max()), 1e-300)
    scaled = np.rint(share * (SCALE / max(float(share.sum(axis=-1).max()), 1.0))).astype(np.int64)
    why = "numbers above 2^32" if whole else "fractions"
    return scaled, [f"it has {why}: scaled so that the busiest layer has {SCALE:,} assignments"]
