"""A file of `torch.save` that a user names: its content as data, its tensors as numpy arrays.

`torch_save` reads it without torch and without running what it says. Added here are the bounds of a file that is small:
on the pickle, on tuples that stand for billions of entries, and on the numbers that a tensor asks for. Tensors of any
device are read: the device is only a word in the file.
"""

from __future__ import annotations

import pickletools
import zipfile
from typing import Any

from megatron_smartmoe.errors import CheckpointError, ConfigError, printable
from megatron_smartmoe.spec.readers import files
from megatron_smartmoe.spec.readers.files import MIB, Named
from megatron_smartmoe.spec.readers.numpy_files import Array, check_cells
from megatron_smartmoe.spec.readers.torch_save import StoredTensor, read_saved

_MOST_PICKLE_BYTES = 16 * MIB
_HEAVIEST_TUPLE = 100_000  # entries, those of inner tuples counted


def read_torch(named: Named) -> Any:
    """The object of a file of `torch.save`: tensors as `StoredTensor`, objects of unknown classes as `Opaque`.

    Raises:
        ConfigError: it cannot be read, is not such a file, or asks for more than it holds.
    """
    files.size_of(named)
    try:
        with zipfile.ZipFile(named.path) as archive:
            pickles = [info for info in archive.infolist() if info.filename.rpartition("/")[2] == "data.pkl"]
            if len(pickles) != 1:
                raise named.refused("is a zip file, and not one of torch.save")
            if pickles[0].file_size > _MOST_PICKLE_BYTES:
                raise named.refused(f"has a pickle of {pickles[0].file_size:,} bytes")
            _refuse_heavy_tuples(archive.read(pickles[0]), named)
        return read_saved(named.path, str(named.path))
    except ConfigError:
        raise
    except CheckpointError as error:
        raise named.refused(f"is not a file of torch.save that can be read: {printable(error.reason)}") from None
    except Exception as error:  # a damaged archive fails in any way: BadZipFile, zlib.error, NotImplementedError, ...
        rule = f"is not a file of torch.save: {type(error).__name__}: {printable(str(error))}"
        raise named.refused(rule) from None


def array_of(tensor: StoredTensor, what: str, named: Named) -> Array:
    """The numbers of a tensor of the file.

    Raises:
        ConfigError: it has a type that numpy lacks, too many numbers for its file, or cannot be read.
    """
    if tensor.dtype.startswith(("bfloat16", "float8", "bool")):
        raise named.refused(f"has {what} of type {tensor.dtype}: save it as float32 or int64")
    check_cells(tensor.num_elements, named.path.stat().st_size, what, named)
    try:
        return tensor.read().reshape(tensor.shape)
    except CheckpointError as error:
        raise named.refused(printable(str(error))) from None


def _refuse_heavy_tuples(data: bytes, named: Named) -> None:
    """Refuse a pickle with a tuple that stands for millions of entries, as 30 tuples do that each hold the last twice.

    Using one of them as a key would never end. So the pickle's stack is followed with a weight in place of each object.
    """
    stack: list[int] = []  # -1: a mark
    memo: dict[Any, int] = {}
    for opcode, argument, _ in pickletools.genops(data):
        taken: list[int] = []
        if pickletools.markobject in opcode.stack_before:
            while stack and (top := stack.pop()) >= 0:
                taken.append(top)
        fixed = [one for one in opcode.stack_before if one not in (pickletools.markobject, pickletools.stackslice)]
        taken += [stack.pop() for _ in fixed if stack]
        if opcode.name == "MARK":
            stack.append(-1)
        elif opcode.name.endswith("GET"):
            stack.append(memo.get(argument, 1))
        elif opcode.name.endswith("PUT"):
            memo[argument] = stack[-1] if stack else 1
        elif opcode.name == "MEMOIZE":
            stack += taken
            memo[len(memo)] = stack[-1] if stack else 1
        elif opcode.name == "DUP":
            stack += 2 * taken
        else:
            weight = 1 + sum(taken) if opcode.name.startswith(("TUPLE", "FROZENSET")) else 1
            if weight > _HEAVIEST_TUPLE:
                raise named.refused("has a pickle with tuples of tuples that stand for too many entries")
            stack += [weight] * len(opcode.stack_after)
