"""Hugging Face to Megatron: the slices of the parameters, and what makes them a checkpoint."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from megatron_smartmoe import __version__
from megatron_smartmoe.checkpoint.checksum import checksums
from megatron_smartmoe.checkpoint.digest import WEIGHT
from megatron_smartmoe.checkpoint.directory import RELEASE, TRACKER
from megatron_smartmoe.checkpoint.manifest import FileEntry, Manifest, write_manifest
from megatron_smartmoe.convert import numbers
from megatron_smartmoe.convert.arguments import arguments_of
from megatron_smartmoe.convert.carried import seq_length_of, write_beside
from megatron_smartmoe.convert.families.table import ModelTable
from megatron_smartmoe.convert.hf_tensors import HFTensors
from megatron_smartmoe.convert.layout import Layout, Spec, extra_states
from megatron_smartmoe.convert.output import Written, check_space, partial_output, write_files
from megatron_smartmoe.convert.packing import Parameter, runs_of
from megatron_smartmoe.convert.ranks import Ranks
from megatron_smartmoe.convert.torch_dist_files import (
    StoredParameter,
    common_state,
    digests_of,
    files_of,
    write_index,
)


def hf_to_megatron(
    source: HFTensors, table: ModelTable, out: Path, *, spec: Spec, dtype: str, workers: int, plan: dict[str, Any]
) -> None:
    """Write the checkpoint.

    Args:
        source: the tensors, checked.
        table: of the model.
        out: the output.
        spec: local or te.
        dtype: of the written weights.
        workers: files that are written at a time.
        plan: see `output.partial_output`.

    Raises:
        ConfigError: the output cannot be written.
        CheckpointError: the source cannot be read.
    """
    # Step 1: what goes where.
    parameters = list(stored_parameters(source, table, spec=spec, dtype=dtype))
    files = files_of(parameters, RELEASE)
    check_space(out, sum(file.size_bytes for file in files))
    with partial_output(out, plan) as partial:
        # Step 2: the weights.
        written = write_files(partial, files, workers)
        # Step 3: index, arguments, tokenizer, a run, and last the manifest and the tracker.
        arguments = arguments_of(table.flags, dtype=dtype, seq_length=seq_length_of(table.flags))
        folder = partial / RELEASE
        objects = extra_states([parameter.place for parameter in parameters], spec)
        write_index(folder, parameters, written, common_state(arguments, 0), objects)
        write_beside(partial, source.folder, table, out, dtype=dtype, ranks=Ranks())
        write_manifest(
            folder,
            Manifest(
                iteration=0,
                format="torch_dist",
                files=entries_of(folder, written),
                digests=digests_of(parameters, written),
                arguments=arguments,
                software={"megatron_smartmoe": __version__, "torch": metadata.version("torch")},
            ),
        )
        (partial / TRACKER).write_text(RELEASE)


def entries_of(folder: Path, written: Sequence[Written]) -> tuple[FileEntry, ...]:
    """All files of a checkpoint; the ones that were hashed as they were written are not read again."""
    known = {file.entry.name.rpartition("/")[2]: file.entry for file in written}
    found = [replace(entry, name=name) for name, entry in known.items()]
    small = [path for path in sorted(folder.iterdir()) if path.name not in known]
    for path, result in checksums(small).items():
        if isinstance(result, OSError):
            raise result
        found.append(FileEntry(name=path.name, size_bytes=result[0], checksum=result[1]))
    return tuple(sorted(found, key=lambda entry: entry.name))


def layout_of_table(table: ModelTable, spec: Spec) -> Layout:
    """The layout of a table's model."""
    return Layout(
        num_layers=table.num_layers,
        expert_layers=table.expert_layers,
        num_experts=table.num_experts or 0,
        has_latent_attention=bool(table.flags.get("multi-latent-attention")),
        spec=spec,
    )


def stored_parameters(source: HFTensors, table: ModelTable, *, spec: Spec, dtype: str) -> Iterator[StoredParameter]:
    """The parameters as they are written, each with a function that reads rows of it."""
    layout = layout_of_table(table, spec)
    for parameter in table.parameters:
        wanted = "float32" if parameter.is_float32 else dtype
        yield StoredParameter(
            name=layout.saved_name(parameter.name),
            expert=parameter.expert,
            kind=WEIGHT,
            place=layout.place(parameter.name, parameter.expert),
            shape=parameter.shape,
            dtype=wanted,
            rows=_rows(source, parameter, wanted),
        )


def _rows(source: HFTensors, parameter: Parameter, dtype: str) -> Callable[[int, int], NDArray[Any]]:
    def read(first: int, end: int) -> NDArray[Any]:
        runs = list(runs_of(parameter, first, end))
        if len(runs) == 1:
            run = runs[0]
            found = source.rows(run.tensor, run.first, run.first + run.count)
            return numbers.converted(found, source.dtype(run.tensor), dtype)
        width = math.prod(parameter.shape[1:])
        whole = numbers.empty((end - first) * width, dtype)
        for run in runs:
            found = source.rows(run.tensor, run.first, run.first + run.count)
            at = (run.at - first) * width
            whole[at : at + found.size] = numbers.converted(found, source.dtype(run.tensor), dtype)
        return whole

    return read
