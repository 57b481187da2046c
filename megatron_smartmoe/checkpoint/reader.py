"""Reading a checkpoint of either format: where its parameters are."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatron_smartmoe.checkpoint.contents import Contents, ParameterKey, Part, arguments_in, iteration_in
from megatron_smartmoe.checkpoint.names import logical_pieces
from megatron_smartmoe.checkpoint.rank_files import read_rank_files
from megatron_smartmoe.checkpoint.torch_dist import is_torch_dist, read_common, read_index
from megatron_smartmoe.errors import CheckpointError
from megatron_smartmoe.spec.readers.torch_save import StoredTensor

_WRONG_CONTENT = (
    KeyError,
    TypeError,
    ValueError,
    IndexError,
    AttributeError,
    AssertionError,
    OverflowError,
    ZeroDivisionError,
    RecursionError,
)


def read_contents(folder: Path) -> Contents:
    """Where everything in a checkpoint is; its index and the heads of its files are read.

    Raises:
        CheckpointError: it is damaged, or of a format that is not known here.
    """
    try:
        return _torch_dist(folder) if is_torch_dist(folder) else read_rank_files(folder)
    except _WRONG_CONTENT as error:  # what is in the files is of other types and sizes than anybody writes
        raise CheckpointError(str(folder), "is damaged", f"{type(error).__name__}: {error!s:.200}") from None


def _torch_dist(folder: Path) -> Contents:
    index = read_index(folder)
    common = read_common(folder, index)
    contents = Contents(folder=folder, iteration=iteration_in(common), arguments=arguments_in(common))
    for key, offsets, tensor in index.tensors():
        _add_tensor(contents, key, index.shapes[key], offsets, tensor)
    return contents


def _add_tensor(
    contents: Contents, key: str, shape: Sequence[int], offsets: Sequence[int], tensor: StoredTensor
) -> None:
    """Add a box of a tensor of a torch_dist checkpoint."""
    is_parameter = False
    for found in logical_pieces(key, shape, offsets, tensor.shape):
        part = Part(piece=found.piece, tensor=tensor.at(found.index))
        where = ParameterKey(found.name, found.expert, found.kind)
        contents.parameters.setdefault(where, []).append(part)
        is_parameter = True
    if not is_parameter:
        contents.buffers[key] = contents.buffers.get(key, 0) + tensor.num_elements
