"""Megatron to Hugging Face: each tensor put together from the rows of the parameters that hold it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from megatron_smartmoe.convert import numbers
from megatron_smartmoe.convert.carried import carried_files, copy_carried
from megatron_smartmoe.convert.families.table import ModelTable
from megatron_smartmoe.convert.hf_config import CONFIG_FILE
from megatron_smartmoe.convert.hf_files import SLICE_BYTES, StoredTensorOut, files_of
from megatron_smartmoe.convert.hf_tensors import INDEX_FILE
from megatron_smartmoe.convert.megatron_tensors import MegatronTensors
from megatron_smartmoe.convert.output import check_space, partial_output, write_files
from megatron_smartmoe.convert.packing import Run, by_tensor

GENERATION_FILE = "generation_config.json"
CARD_FILE = "README.md"


def megatron_to_hf(
    source: MegatronTensors,
    table: ModelTable,
    out: Path,
    *,
    dtype: str,
    workers: int,
    plan: dict[str, Any],
    beside: Path | None,
    card: str,
) -> None:
    """Write the folder.

    Args:
        source: the parameters, checked.
        table: of the model.
        out: the output.
        dtype: of the written weights.
        workers: files that are written at a time.
        plan: see `output.partial_output`.
        beside: folder with the tokenizer and configuration that the model began with; None without one.
        card: text of the model card.

    Raises:
        ConfigError: the output cannot be written.
        CheckpointError: the source cannot be read.
    """
    # Step 1: what goes where.
    files, index = files_of(list(stored_tensors(source, table, dtype)))
    check_space(out, sum(file.size_bytes for file in files))
    with partial_output(out, plan) as partial:
        # Step 2: the weights.
        write_files(partial, files, workers)
        # Step 3: what belongs to them.
        if index:
            (partial / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")
        if beside is not None:
            copy_carried(beside, partial)
        _write_config(partial / CONFIG_FILE, table, dtype)
        if beside is None or not any(path.name == GENERATION_FILE for path in carried_files(beside)):
            _write_generation(partial / GENERATION_FILE, table)
        (partial / CARD_FILE).write_text(card)


def stored_tensors(source: MegatronTensors, table: ModelTable, dtype: str) -> Iterator[StoredTensorOut]:
    """The tensors as they are written, in the order of the table."""
    runs = by_tensor(table.parameters)
    copied = {name: of for name, of in table.copies.items() if name != "lm_head.weight"}  # of a tied one there is none
    names = {**{name: name for name in table.shapes}, **copied}
    for name, of in names.items():
        shape = table.shapes[of]
        kept = runs[of][0].parameter.is_float32
        wanted = "float32" if kept else dtype
        yield StoredTensorOut(name=name, shape=shape, dtype=wanted, slices=_slices(source, runs[of], shape, wanted))


def _slices(
    source: MegatronTensors, runs: Sequence[Run], shape: tuple[int, ...], dtype: str
) -> Callable[[], Iterator[NDArray[Any]]]:
    covered = 0
    for run in runs:
        assert run.first == covered, (run.tensor, run.first, covered)
        covered += run.count
    assert covered == shape[0], (runs[0].tensor, covered, shape)
    step = max(1, SLICE_BYTES // max(1, numbers.size_bytes(math.prod(shape[1:]), "float32")))

    def read() -> Iterator[NDArray[Any]]:
        for run in runs:
            for first in range(0, run.count, step):
                low, high = run.at + first, run.at + min(first + step, run.count)
                found = source.rows(run.parameter, low, high)
                yield numbers.converted(found, source.dtype(run.parameter), dtype)

    return read


def _write_config(path: Path, table: ModelTable, dtype: str) -> None:
    """The model's config.json. Weights that were quantised in the source are not any more."""
    content = {key: value for key, value in table.config.content.items() if key != "quantization_config"}
    name = "torch_dtype" if "torch_dtype" in content else "dtype"
    keys = [key for key in ("num_nextn_predict_layers", "num_mtp_layers") if key in content]
    content |= dict.fromkeys(keys, table.flags.get("mtp-num-layers", 0))
    path.write_text(json.dumps({**content, name: dtype}, indent=2) + "\n")


def _write_generation(path: Path, table: ModelTable) -> None:
    keys = ("bos_token_id", "eos_token_id", "pad_token_id")
    known = {key: table.config.content[key] for key in keys if table.config.content.get(key) is not None}
    path.write_text(json.dumps({"_from_model_config": True, **known}, indent=2) + "\n")
