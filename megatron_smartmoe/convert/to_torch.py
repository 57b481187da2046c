"""Megatron's older `torch` format as output: a file of `torch.save` for each model-parallel rank.

Megatron loads this format only at the parallelism that it was written for, so that is chosen here. Weights alone are
written: the format numbers optimizer state in the order of a run's optimizer.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from megatron_smartmoe import __version__, ops
from megatron_smartmoe.checkpoint.contents import Contents
from megatron_smartmoe.checkpoint.digest import WEIGHT, combine, digest
from megatron_smartmoe.checkpoint.directory import RELEASE, TRACKER, folder_of
from megatron_smartmoe.checkpoint.manifest import FileEntry, Manifest, ParameterDigest, write_manifest
from megatron_smartmoe.checkpoint.rank_files import RANK_FILE
from megatron_smartmoe.convert.arguments import arguments_of
from megatron_smartmoe.convert.carried import PADDED_TO, padded_vocab, seq_length_of, write_beside
from megatron_smartmoe.convert.families.blocks import EMBEDDING, OUTPUT
from megatron_smartmoe.convert.families.table import ModelTable
from megatron_smartmoe.convert.hf_tensors import HFTensors
from megatron_smartmoe.convert.layout import Layout, Spec, layout_of
from megatron_smartmoe.convert.output import OutputFile, Sink, Written, check_space, partial_output, write_files
from megatron_smartmoe.convert.rank_layout import (
    RankTensor,
    check_ranks,
    extra_state_names,
    rank_tensors,
    with_padding,
)
from megatron_smartmoe.convert.ranks import Ranks
from megatron_smartmoe.convert.resave import plain_arguments, saved_parameters
from megatron_smartmoe.convert.to_megatron import layout_of_table, stored_parameters
from megatron_smartmoe.convert.torch_dist_files import StoredParameter
from megatron_smartmoe.convert.torch_save_files import StreamedTensor, write_saved

# Arguments that say how layers are spread over stages, and what they are where that is even.
_EVEN = {
    "virtual_pipeline_model_parallel_size": None,
    "num_layers_per_virtual_pipeline_stage": None,
    "num_virtual_stages_per_pipeline_rank": None,
    "decoder_first_pipeline_num_layers": None,
    "decoder_last_pipeline_num_layers": None,
    "pipeline_model_parallel_layout": None,
    "account_for_embedding_in_pipeline_split": False,
    "account_for_loss_in_pipeline_split": False,
}


@dataclass(frozen=True, kw_only=True)
class _Model:
    """What is written.

    Attributes:
        parameters: all of the model.
        layout: of the model.
        ranks: that will load it.
        arguments: Megatron's.
        iteration: of the training; None for a model without one.
    """

    parameters: list[StoredParameter]
    layout: Layout
    ranks: Ranks
    arguments: Mapping[str, Any]
    iteration: int | None

    @property
    def folder(self) -> str:
        """Its name in the output."""
        return RELEASE if self.iteration is None else folder_of(Path(), self.iteration).name


def hf_to_torch(
    source: HFTensors,
    table: ModelTable,
    out: Path,
    *,
    spec: Spec,
    ranks: Ranks,
    dtype: str,
    workers: int,
    plan: dict[str, Any],
) -> None:
    """Write a Hugging Face model.

    Args:
        source: the tensors, checked.
        table: of the model.
        out: the output.
        spec: local or te.
        ranks: that will load it.
        dtype: of the written weights.
        workers: files that are written at a time.
        plan: see `output.partial_output`.

    Raises:
        ConfigError: the model cannot be spread over these ranks, or the output cannot be written.
        CheckpointError: the source cannot be read.
    """
    arguments = arguments_of(table.flags, dtype=dtype, seq_length=seq_length_of(table.flags))
    layout = layout_of_table(table, spec)
    parameters = list(stored_parameters(source, table, spec="local", dtype=dtype))
    vocab = padded_vocab(table.vocab_size, ranks.tensor)
    model = _model(parameters, layout, ranks, arguments, vocab, iteration=None)
    _write(
        model,
        out,
        workers=workers,
        plan=plan,
        finish=lambda partial: write_beside(partial, source.folder, table, out, dtype=dtype, ranks=ranks),
    )


def megatron_to_torch(
    contents: Contents,
    out: Path,
    *,
    spec: Spec,
    ranks: Ranks,
    dtype: str | None,
    workers: int,
    plan: dict[str, Any],
) -> None:
    """Write the weights of a checkpoint.

    Args:
        contents: of the source.
        out: the output.
        spec: local or te.
        ranks: that will load it.
        dtype: of the written weights; None as in the source.
        workers: files that are written at a time.
        plan: see `output.partial_output`.

    Raises:
        ConfigError: the model cannot be spread over these ranks, or the output cannot be written.
        CheckpointError: the source cannot be read.
    """
    arguments = plain_arguments(contents)
    layout = layout_of(arguments, spec)
    parameters = list(saved_parameters(contents, layout_of(arguments, "local"), dtype, with_optimizer=False))
    vocab = next((parameter.shape[0] for parameter in parameters if parameter.name == EMBEDDING), 0)
    if ranks.tensor != arguments.get("tensor_model_parallel_size"):
        vocab = padded_vocab(vocab, ranks.tensor, int(arguments.get("make_vocab_size_divisible_by") or PADDED_TO))
    iteration = None if contents.folder.name == RELEASE else contents.iteration or 0
    model = _model(parameters, layout, ranks, arguments, vocab, iteration=iteration)
    _write(model, out, workers=workers, plan=plan)


def _model(
    parameters: list[StoredParameter],
    layout: Layout,
    ranks: Ranks,
    arguments: Mapping[str, Any],
    vocab: int,
    *,
    iteration: int | None,
) -> _Model:
    """The model as these ranks have it: its vocabulary padded, its arguments those of their run."""
    check_ranks(ranks, arguments)
    parameters = [
        with_padding(parameter, vocab) if parameter.name in (EMBEDDING, OUTPUT) else parameter
        for parameter in parameters
    ]
    changes: dict[str, Any] = {
        "tensor_model_parallel_size": ranks.tensor,
        "pipeline_model_parallel_size": ranks.stages,
        "expert_model_parallel_size": ranks.expert,
        "expert_tensor_parallel_size": ranks.tensor,
        "sequence_parallel": ranks.tensor > 1,
        "padded_vocab_size": vocab,
        "ckpt_format": "torch",
        "no_save_optim": True,
        "no_save_rng": True,
    }
    kept = {name: value for name, value in arguments.items() if name != "smartmoe_placement"}
    return _Model(
        parameters=parameters,
        layout=layout,
        ranks=ranks,
        arguments={**kept, **_EVEN, **changes},
        iteration=iteration,
    )


def _write(
    model: _Model,
    out: Path,
    *,
    workers: int,
    plan: dict[str, Any],
    finish: Callable[[Path], object] = lambda _: None,
) -> None:
    # Step 1: what goes where.
    files = list(_files(model))
    check_space(out, sum(file.size_bytes for file in files))
    with partial_output(out, plan) as partial:
        # Step 2: the ranks' files.
        written = write_files(partial, files, workers)
        # Step 3: what belongs to them, and last the manifest and the tracker.
        finish(partial)
        folder = partial / model.folder
        write_manifest(
            folder,
            Manifest(
                iteration=model.iteration or 0,
                format="torch",
                files=tuple(
                    FileEntry(
                        name=file.entry.name.removeprefix(f"{model.folder}/"),
                        size_bytes=file.entry.size_bytes,
                        checksum=file.entry.checksum,
                    )
                    for file in written
                ),
                digests=_digests_of(model, written),
                consumed_samples=model.arguments.get("consumed_train_samples"),
                arguments=model.arguments,
                software={"megatron_smartmoe": __version__, "torch": metadata.version("torch")},
            ),
        )
        (partial / TRACKER).write_text(RELEASE if model.iteration is None else str(model.iteration))


def _files(model: _Model) -> Iterator[OutputFile]:
    for place in model.ranks.places():
        tensors = list(rank_tensors(model.parameters, model.ranks, place, model.layout, model.arguments))
        yield OutputFile(
            name=f"{model.folder}/{model.ranks.folder(*place)}/{RANK_FILE}",
            size_bytes=sum(tensor.size_bytes for tensor in tensors),
            write=_Writer(model, tensors, is_last=place[1] == model.ranks.stages - 1),
        )


class _Writer:
    """Writes one rank's file; its record is a line for each slice that no other file counts: parameter and digest."""

    def __init__(self, model: _Model, tensors: Sequence[RankTensor], *, is_last: bool) -> None:
        self._model, self._tensors, self._is_last = model, tensors, is_last

    def __call__(self, sink: Sink, progress: Callable[[int], object]) -> Any:
        """Write it."""
        record: list[tuple[str, int | None, str]] = []
        streamed = [
            StreamedTensor(
                number=number,
                dtype=tensor.parameter.dtype,
                shape=tensor.shape,
                slices=self._slices(tensor, record, progress),
            )
            for number, tensor in enumerate(self._tensors)
        ]
        names = [tensor.name for tensor in self._tensors]
        state: dict[str, StreamedTensor | None] = dict(zip(names, streamed, strict=True))
        state |= dict.fromkeys(extra_state_names(names, self._model.layout.spec, is_last=self._is_last))
        content = {
            "args": argparse.Namespace(**self._model.arguments),
            "checkpoint_version": 3.0,
            "iteration": self._model.iteration or 0,
            "model": state,
        }
        write_saved(sink, content, streamed)
        return record

    def _slices(
        self, tensor: RankTensor, record: list[tuple[str, int | None, str]], progress: Callable[[int], object]
    ) -> Callable[[], Iterator[Any]]:
        parameter = tensor.parameter
        sum_of_rows = ops.sum_of_rows if ops.is_compiled() else None

        def read() -> Iterator[Any]:
            for piece, numbers in tensor.slices():
                if tensor.is_first:
                    found = digest(numbers, parameter.dtype, piece, sum_of_rows)
                    record.append((parameter.name, parameter.expert, f"{found:016x}"))
                yield numbers
                progress(numbers.nbytes)

        return read


def _digests_of(model: _Model, written: Sequence[Written]) -> tuple[ParameterDigest, ...]:
    """The digests of the parameters, of all experts of a layer together, from the records of the files."""
    parts: dict[str, dict[int, list[int]]] = {}
    for file in written:
        for name, expert, value in file.record:
            parts.setdefault(name, {}).setdefault(expert or 0, []).append(int(value, 16))
    described = {parameter.name: parameter for parameter in model.parameters}
    return tuple(
        ParameterDigest(
            name=model.layout.saved_name(name),
            kind=WEIGHT,
            dtype=described[name].dtype,
            shape=described[name].shape,
            digests=tuple(combine(of_expert[expert]) for expert in sorted(of_expert)),
        )
        for name, of_expert in parts.items()
    )
