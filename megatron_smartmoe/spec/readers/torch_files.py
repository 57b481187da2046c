"""Tensors of a file of `torch.save`, read without torch and without running what the file says.

The file is a zip with a pickle (`data.pkl`) and the bytes of each storage (`data/0`, ...). The pickle is read by
`unpickle.read_pickle`; of the names that it may ask for, only the rebuilding of a tensor does something here: it cuts
an array out of a storage, after the declared sizes were compared with what the archive holds. Tensors of any device
are read: the device is only a word in the file.
"""

from __future__ import annotations

import functools
import pickletools
import zipfile
from typing import Any

import numpy as np

from megatron_smartmoe.errors import CheckpointError, ConfigError, printable
from megatron_smartmoe.spec.readers import files
from megatron_smartmoe.spec.readers.files import MIB, Named
from megatron_smartmoe.spec.readers.numpy_files import Array, check_cells
from megatron_smartmoe.spec.readers.unpickle import Opaque, read_pickle

_MOST_PICKLE_BYTES = 16 * MIB
_HEAVIEST_TUPLE = 100_000  # entries, those of inner tuples counted
_INERT = dict.fromkeys(("builtins.tuple", "builtins.frozenset", "builtins.set", "torch.Size"), Opaque)  # see below
_DTYPES = {
    "torch.DoubleStorage": "<f8",
    "torch.FloatStorage": "<f4",
    "torch.HalfStorage": "<f2",
    "torch.LongStorage": "<i8",
    "torch.IntStorage": "<i4",
    "torch.ShortStorage": "<i2",
    "torch.CharStorage": "<i1",
    "torch.ByteStorage": "<u1",
}


def read_torch(named: Named) -> Any:
    """The object of a file of `torch.save`, its tensors as numpy arrays, objects of unknown classes as `Opaque`.

    Raises:
        ConfigError: it cannot be read, is not such a file, or declares more than it holds.
    """
    size = files.size_of(named)
    try:
        with zipfile.ZipFile(named.path) as archive:
            members = {info.filename.partition("/")[2]: info for info in archive.infolist()}
            if "data.pkl" not in members:
                raise named.refused("is a zip file, and not one of torch.save")
            if members["data.pkl"].file_size > _MOST_PICKLE_BYTES:
                raise named.refused(f"has a pickle of {members['data.pkl'].file_size:,} bytes")
            data = archive.read(members["data.pkl"])
            _refuse_heavy_tuples(data, named)
            rebuild = functools.partial(_rebuilt, archive=archive, members=members, size=size, named=named)
            known = {"torch._utils._rebuild_tensor_v2": rebuild, "torch._utils._rebuild_tensor": rebuild, **_INERT}
            return read_pickle(data, known, str(named.path))
    except ConfigError:
        raise
    except CheckpointError as error:
        raise named.refused(f"is not a file of torch.save: {printable(error.reason)}") from None
    except Exception as error:  # a damaged archive fails in any way: BadZipFile, zlib.error, NotImplementedError, ...
        rule = f"is not a file of torch.save: {type(error).__name__}: {printable(str(error))}"
        raise named.refused(rule) from None


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


def _rebuilt(pid: Any, offset: Any, shape: Any, stride: Any, *_: Any, **context: Any) -> Array:
    """The array of a tensor: `torch._utils._rebuild_tensor_v2` of what the pickle says.

    Raises:
        ConfigError: its numbers do not fit the storage that it names.
    """
    named: Named = context["named"]
    kind, key, numel = getattr(pid[1], "qualified_name", None), str(pid[2]), pid[4]
    info = context["members"].get(f"data/{key}")
    if kind not in _DTYPES or info is None:
        raise named.refused(f"has a tensor of {kind} in {key!r:.40}: only numbers are read")
    numbers = [offset, numel, *shape, *stride]
    if len(shape) != len(stride) or any(type(one) is not int or not 0 <= one < 2**40 for one in numbers):
        raise named.refused("is damaged: a tensor has sizes that are no whole numbers")
    dtype = np.dtype(_DTYPES[kind])
    check_cells(numel, context["size"], f"tensor {key}", named)
    if info.compress_type != zipfile.ZIP_STORED or info.file_size != numel * dtype.itemsize:
        raise named.refused(f"is damaged: tensor {key} declares {numel:,} numbers, and holds {info.file_size:,} bytes")
    last = offset + sum((length - 1) * step for length, step in zip(shape, stride, strict=True))
    if 0 in shape:
        return np.zeros(shape, dtype=dtype)
    if last >= numel:
        raise named.refused(f"is damaged: tensor {key} has {numel:,} numbers, and entry {last:,} is asked for")
    check_cells(int(np.prod([float(length) for length in shape])), context["size"], f"tensor {key}", named)
    data = np.frombuffer(context["archive"].read(info), dtype=dtype)
    steps = tuple(step * dtype.itemsize for step in stride)
    return np.lib.stride_tricks.as_strided(data[offset:], shape=tuple(shape), strides=steps, writeable=False).copy()
