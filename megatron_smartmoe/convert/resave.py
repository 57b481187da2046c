"""Megatron to Megatron: a checkpoint of any format and layout as a torch_dist checkpoint, with or without optimizer.

What it is for: the older `mp_rank_*` folders; another layer spec; and expert parallelism 1 to more than 1 with
optimizer state, which Megatron itself cannot load. Parameters are logical, so where experts were at the save has no
effect.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from megatron_smartmoe import __version__
from megatron_smartmoe.checkpoint.contents import WORDS, Contents, ParameterKey
from megatron_smartmoe.checkpoint.digest import MAIN_WEIGHT, WEIGHT
from megatron_smartmoe.checkpoint.directory import RELEASE, TRACKER, folder_of
from megatron_smartmoe.checkpoint.manifest import Manifest, write_manifest
from megatron_smartmoe.checkpoint.torch_dist import COMMON_OBJECT, is_torch_dist, read_common, read_index
from megatron_smartmoe.convert import numbers
from megatron_smartmoe.convert.layout import Layout, Place, Spec, extra_states, layout_of, without_spec
from megatron_smartmoe.convert.optimizer_groups import rearranged
from megatron_smartmoe.convert.output import check_space, partial_output, write_files
from megatron_smartmoe.convert.to_megatron import entries_of
from megatron_smartmoe.convert.torch_dist_files import StoredParameter, digests_of, files_of, write_index
from megatron_smartmoe.errors import CheckpointError, ConfigError

NO_OPTIMIZER = "--no-optim"
_LAYER = re.compile(r"decoder\.layers\.(\d+)\.")
_KEPT = ("checkpoint_version", "iteration", "opt_param_scheduler", "num_floating_point_operations_so_far")


def megatron_to_megatron(
    contents: Contents,
    out: Path,
    *,
    spec: Spec,
    dtype: str | None,
    expert_ranks: int | None,
    with_optimizer: bool,
    workers: int,
    plan: dict[str, Any],
) -> None:
    """Write the checkpoint.

    Args:
        contents: of the source.
        out: the output.
        spec: local or te.
        dtype: of the written weights; None as in the source.
        expert_ranks: expert parallelism that the optimizer's settings are for; None as in the source.
        with_optimizer: whether the optimizer's state is written too.
        workers: files that are written at a time.
        plan: see `output.partial_output`.

    Raises:
        ConfigError: the optimizer's state cannot be written so, or the output cannot be written.
        CheckpointError: the source cannot be read.
    """
    # Step 1: what goes where.
    arguments = dict(contents.arguments)
    layout = layout_of(arguments, spec)
    parameters = list(saved_parameters(contents, layout, dtype, with_optimizer=with_optimizer))
    common, objects = _common(contents, expert_ranks, with_optimizer=with_optimizer)
    name = RELEASE if contents.folder.name == RELEASE else folder_of(Path(), contents.iteration or 0).name
    files = files_of(parameters, name)
    check_space(out, sum(file.size_bytes for file in files))
    with partial_output(out, plan) as partial:
        # Step 2: weights and state.
        written = write_files(partial, files, workers)
        # Step 3: what makes them a checkpoint.
        folder = partial / name
        weights = [parameter.place for parameter in parameters if parameter.kind == WEIGHT]
        write_index(folder, parameters, written, common, extra_states(weights, spec), objects)
        plain = {key: value for key, value in vars(common["args"]).items() if key != "smartmoe_placement"}
        write_manifest(
            folder,
            Manifest(
                iteration=contents.iteration or 0,
                format="torch_dist",
                files=entries_of(folder, written),
                digests=digests_of(parameters, written),
                consumed_samples=plain.get("consumed_train_samples"),
                arguments=plain,
                placement=getattr(common["args"], "smartmoe_placement", None),
                software={"megatron_smartmoe": __version__, "torch": metadata.version("torch")},
            ),
        )
        (partial / TRACKER).write_text(RELEASE if name == RELEASE else str(contents.iteration or 0))


def saved_parameters(
    contents: Contents, layout: Layout, dtype: str | None, *, with_optimizer: bool
) -> Iterator[StoredParameter]:
    """The parameters of a checkpoint as they are written, each with a function that reads rows of it.

    Args:
        contents: of the checkpoint.
        layout: of the output.
        dtype: of the written weights; None as in the source.
        with_optimizer: whether the optimizer's state is written too.

    Raises:
        CheckpointError: a parameter is not whole.
    """
    _check_whole(contents, layout)
    main = "param" if contents.arguments.get("use_distributed_optimizer") else "fp32_param"
    for key in contents.parameters:
        if key.kind != WEIGHT and not with_optimizer:
            continue
        left = contents.missing_elements(key)
        if left:
            what = f"it lacks {left:,} elements of {key}" if left > 0 else f"it has elements of {key} twice"
            raise CheckpointError(str(contents.folder), "is incomplete", what)
        name = without_spec(key.name)
        place = layout.place(name, key.expert)
        if key.kind != WEIGHT:
            kind = main if key.kind == MAIN_WEIGHT else key.kind
            place = Place(key=f"optimizer.state.{kind}.{place.key}", index=place.index, sizes=place.sizes)
        wanted = dtype if dtype is not None and key.kind == WEIGHT else contents.dtype(key)
        yield StoredParameter(
            name=layout.saved_name(name),
            expert=key.expert,
            kind=key.kind,
            place=place,
            shape=contents.shape(key),
            dtype=wanted,
            rows=_rows(contents, key, wanted),
        )


def _check_whole(contents: Contents, layout: Layout) -> None:
    """Every layer is there, and of whatever experts have, all of them.

    Raises:
        CheckpointError: a layer or an expert is missing.
    """
    experts: dict[str, set[int]] = {}
    for key in contents.parameters:
        if key.expert is not None:
            experts.setdefault(f"{key.name}, {WORDS[key.kind]}", set()).add(key.expert)
    for what, found in experts.items():
        if len(found) != layout.num_experts:
            reason = f"of {what}, it has {len(found)} of {layout.num_experts} experts"
            raise CheckpointError(str(contents.folder), "is incomplete", reason)
    layers = {int(match[1]) for key in contents.parameters if (match := _LAYER.match(key.name))}
    if layers != set(range(layout.num_layers)):
        reason = f"it has {len(layers)} of {layout.num_layers} layers"
        raise CheckpointError(str(contents.folder), "is incomplete", reason)


def _rows(contents: Contents, key: ParameterKey, dtype: str) -> Callable[[int, int], NDArray[Any]]:
    return lambda first, end: numbers.converted(contents.rows(key, first, end), contents.dtype(key), dtype)


def plain_arguments(contents: Contents) -> dict[str, Any]:
    """The arguments of the run that saved a checkpoint, without those of types that only Megatron knows."""
    return {name: value for name, value in contents.arguments.items() if _is_plain(value)}


def _common(
    contents: Contents, expert_ranks: int | None, *, with_optimizer: bool
) -> tuple[dict[str, Any], dict[str, bytes]]:
    """The common state of the output, and the objects that are copied as they are: random states."""
    arguments = plain_arguments(contents) | {"ckpt_format": "torch_dist"}
    if expert_ranks is not None:
        arguments["expert_model_parallel_size"] = expert_ranks
    state: dict[str, Any] = {"checkpoint_version": 3.0, "iteration": contents.iteration or 0}
    objects: dict[str, bytes] = {}
    is_sharded = is_torch_dist(contents.folder)
    if is_sharded:
        saved = read_common(contents.folder)
        state |= {name: saved.get(name) for name in (*_KEPT, "content_metadata") if _is_plain(saved.get(name))}
        state = {name: value for name, value in state.items() if value is not None}
        objects = _copied_objects(contents.folder)
        if with_optimizer:
            state["optimizer"] = _optimizer(contents, saved, expert_ranks)
    arguments["no_save_optim"] = not with_optimizer
    arguments["no_save_rng"] = not objects
    return {**state, "args": argparse.Namespace(**arguments)}, objects


def _optimizer(contents: Contents, saved: Mapping[str, Any], expert_ranks: int | None) -> Any:
    settings = saved.get("optimizer")
    if not _is_plain(settings):
        raise CheckpointError(str(contents.folder), "cannot be converted", "its optimizer settings are no plain values")
    there = int(contents.arguments.get("expert_model_parallel_size") or 1)
    biases = any(key.expert is not None and len(contents.shape(key)) < 2 for key in contents.parameters)
    try:
        return rearranged(settings, expert_ranks=expert_ranks or there, expert_biases=biases)
    except ValueError as error:
        raise CheckpointError(str(contents.folder), "cannot be converted", str(error)) from None


def check_optimizer(contents: Contents, *, is_sharded: bool) -> bool:
    """Whether a checkpoint has optimizer state that can be written by parameter.

    Raises:
        ConfigError: it has some that cannot.
    """
    has_state = any(key.kind != WEIGHT for key in contents.parameters)
    way_out = f"Pass {NO_OPTIMIZER} for the weights alone."
    if contents.buffers:
        rule = "has its optimizer state buffer by buffer, in an order that only the run knows"
        way_out += " --dist-ckpt-optim-fully-reshardable saves it by parameter."
        raise ConfigError("SOURCE", str(contents.folder), rule, way_out)
    if has_state and not is_sharded:
        rule = "has optimizer state in Megatron's older format, which is not converted"
        raise ConfigError("SOURCE", str(contents.folder), rule, way_out)
    return has_state


def _copied_objects(folder: Path) -> dict[str, bytes]:
    """Objects of a torch_dist checkpoint that no parameter has, as they are in its files."""
    index = read_index(folder)
    found: dict[str, bytes] = {}
    for (key, offsets), item in index.items.items():
        if offsets or key in index.shapes or key == COMMON_OBJECT or "_extra_state" in key:
            continue
        with (folder / item.file).open("rb") as file:
            file.seek(item.offset_bytes)
            found[key] = file.read(item.length_bytes)
    return found


def _is_plain(value: object) -> bool:
    """Whether a value is of the types that JSON has, tuples aside."""
    if isinstance(value, Mapping):
        return all(_is_plain(key) and _is_plain(entry) for key, entry in value.items())
    if isinstance(value, list | tuple):
        return all(_is_plain(entry) for entry in value)
    return value is None or type(value) in (bool, int, float, str)
