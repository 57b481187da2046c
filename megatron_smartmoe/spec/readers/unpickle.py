"""Reading a pickle without running it.

A pickle is a program: it may name any importable callable and have it called. `torch.load(weights_only=True)` restricts
that to a list, and needs torch; the index of a torch_dist checkpoint is read by torch with plain `pickle.load`. Here
every name that a pickle asks for is answered by a class of this module: the few that carry data we use (`_KNOWN`), and
an `Opaque` for all others, which keeps what it is given and does nothing. So loading can be wrong, but it cannot act.

A small pickle may also ask for much memory. Two ways are closed: lengths and memo numbers larger than the pickle itself
(CPython allocates an array up to the largest memo number), found by a scan of its opcodes, and copies of one large
container over and over, of which there is a limit.
"""

from __future__ import annotations

import argparse
import collections
import functools
import io
import pickle
import pickletools
import re
from collections.abc import Callable, Mapping, Sized
from pathlib import PurePosixPath
from types import SimpleNamespace
from typing import Any

from megatron_smartmoe.errors import CheckpointError


class Opaque:
    """An object of a class that is not known here, made with any arguments."""

    qualified_name = "unknown"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Keep what it is called with; that this is here lets `object.__new__` take anything too."""
        self.args = args

    def __setstate__(self, state: Any) -> None:
        """Keep the state, whatever it is."""
        self.state = state

    # A pickle also fills lists, sets and mappings by these names.
    def append(self, item: Any) -> None:
        """Drop an item."""

    def extend(self, items: Any) -> None:
        """Drop items."""

    def add(self, item: Any) -> None:
        """Drop an item."""

    def __setitem__(self, key: Any, value: Any) -> None:
        """Drop a value."""

    def __repr__(self) -> str:
        return f"<{self.qualified_name}>"


# What is used of the standard library; none of these does anything when it is called.
_CLASSES: dict[str, Any] = {
    "pathlib.PosixPath": PurePosixPath,
    "pathlib.PurePosixPath": PurePosixPath,
    "pathlib._local.PosixPath": PurePosixPath,
    "builtins.complex": complex,
}
_WITH_STATE: dict[str, type] = {
    "argparse.Namespace": argparse.Namespace,
    "types.SimpleNamespace": SimpleNamespace,
    "collections.OrderedDict": collections.OrderedDict,
}
_CONTAINERS: dict[str, Callable[..., Any]] = {
    "builtins.set": set,
    "builtins.frozenset": frozenset,
    "builtins.list": list,
    "builtins.dict": dict,
    "builtins.tuple": tuple,
}
_SIZE = "torch.Size"  # a tuple
_COPIED_ITEMS_PER_BYTE = 16  # that containers may hold in all; a real pickle copies an item about once


class _Unpickler(pickle.Unpickler):
    def __init__(self, data: bytes, known: Mapping[str, Any], storages: Callable[[Any], Any]) -> None:
        super().__init__(io.BytesIO(data))
        self._classes = {**_CLASSES, **known}
        self._storages = storages
        self._copies_left = _COPIED_ITEMS_PER_BYTE * len(data)

    def find_class(self, module: str, name: str) -> Any:
        """The class that stands for `module.name` here."""
        qualified = f"{module}.{name}"
        if qualified not in self._classes:
            self._classes[qualified] = self._stand_in(qualified)
        return self._classes[qualified]

    def _stand_in(self, qualified: str) -> Any:
        if qualified == _SIZE:
            return self._size
        if qualified in _CONTAINERS:
            return functools.partial(self._copy, _CONTAINERS[qualified])
        if qualified in _WITH_STATE:
            return self._counted(_WITH_STATE[qualified])
        return type("Opaque", (Opaque,), {"qualified_name": qualified})

    def persistent_load(self, pid: Any) -> Any:
        """Storages of tensors are kept beside the pickle; this is what stands for one."""
        return self._storages(pid)

    def _size(self, items: Any = (), *rest: Any) -> Any:
        return items if type(items) is tuple and not rest else self._copy(tuple, items, *rest)

    def _copy(self, container: Callable[..., Any], *args: Any) -> Any:
        self._count(*args)
        return container(*args)

    def _counted(self, base: type) -> type:
        """A class whose objects copy what they are made of and what their state is, and count it."""
        count = self._count

        def make(this: Any, *args: Any, **kwargs: Any) -> None:
            count(*args, kwargs)
            base.__init__(this, *args, **kwargs)  # type: ignore[misc]

        def set_state(this: Any, state: Any) -> None:
            count(state)
            vars(this).update(state)

        return type(base.__name__, (base,), {"__init__": make, "__setstate__": set_state})

    def _count(self, *args: Any) -> None:
        self._copies_left -= sum(len(argument) for argument in args if isinstance(argument, Sized))
        if self._copies_left < 0:
            raise pickle.UnpicklingError("it copies the same items too often")


def read_pickle(
    data: bytes, known: Mapping[str, Any], where: str, storages: Callable[[Any], Any] = lambda pid: pid
) -> Any:
    """The object in `data`, with inert stand-ins for every class that is not in `known`.

    Args:
        data: a whole pickle.
        known: further classes by qualified name. They are called with what the pickle says, so they must only keep it.
        where: names the source in an error.
        storages: what stands for a tensor's storage, given its description; the description itself by default.

    Raises:
        CheckpointError: it is not a pickle, or a damaged one.
    """
    try:
        _check_sizes(data)
        return _Unpickler(data, known, storages).load()
    except CheckpointError:
        raise
    except Exception as error:  # a damaged pickle fails in any way: missing opcode, wrong stack, bad utf-8, MemoryError
        reason = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        raise CheckpointError(where, "cannot be read", reason) from None


# Opcodes by the length of what follows them, as pickletools lists them.
_SIZE_BYTES = {
    pickletools.TAKEN_FROM_ARGUMENT1: 1,
    pickletools.TAKEN_FROM_ARGUMENT4: 4,
    pickletools.TAKEN_FROM_ARGUMENT4U: 4,
    pickletools.TAKEN_FROM_ARGUMENT8U: 8,
}
_FRAME, _LONG_BINPUT = b"\x95", b"r"
_LINES = {"INST": 2, "GLOBAL": 2}  # opcodes followed by two lines


def _plain_opcodes() -> re.Pattern[bytes]:
    """Any number of opcodes with nothing or a fixed number of bytes behind them, and nothing else to look at."""
    codes: dict[int, bytes] = {}
    for opcode in pickletools.opcodes:
        length = 0 if opcode.arg is None else opcode.arg.n
        code = opcode.code.encode("latin-1")
        if length >= 0 and code not in (_FRAME, _LONG_BINPUT, b"."):
            codes[length] = codes.get(length, b"") + re.escape(code)
    choices = [b"[%s].{%d}" % (codes[length], length) for length in sorted(codes)]
    return re.compile(b"(?:" + b"|".join(choices) + b")*+", re.DOTALL)


_PLAIN = _plain_opcodes()
# Opcodes behind which one byte says how many bytes follow: the ones that a large pickle has most of.
_SHORT = frozenset(
    ord(opcode.code)
    for opcode in pickletools.opcodes
    if opcode.arg is not None and opcode.arg.n == pickletools.TAKEN_FROM_ARGUMENT1
)
_OTHERS = {opcode.code.encode("latin-1"): opcode for opcode in pickletools.opcodes}


def _check_sizes(data: bytes) -> None:
    """Raise for a length or a memo number that is larger than the pickle."""
    at, end, match = 0, len(data), _PLAIN.match
    while True:
        found = match(data, at)
        assert found is not None, "the pattern matches nothing too"
        at = found.end()
        if at + 1 < end and data[at] in _SHORT and at + data[at + 1] < end - 2:
            at += 2 + data[at + 1]
            continue
        opcode = _OTHERS.get(data[at : at + 1])
        if opcode is None or opcode.name == "STOP" or opcode.arg is None:
            return  # its end; damage is the unpickler's to report
        at += 1
        value, length = 0, opcode.arg.n
        if length == pickletools.UP_TO_NEWLINE:
            line_end = at
            for _ in range(_LINES.get(opcode.name, 1)):
                line_end = data.find(b"\n", line_end) + 1 or end
            if opcode.name == "PUT":
                digits = data[at : line_end - 1].strip()
                value = int(digits) if len(digits) < 20 and digits.isdigit() else end + 1
            at = line_end
        else:
            num_bytes = _SIZE_BYTES.get(length, length)
            value = int.from_bytes(data[at : at + num_bytes], "little")
            at += num_bytes + (value if length < 0 else 0)
        if value > end or at > end:
            raise pickle.UnpicklingError(f"{opcode.name} of {value} in {end} bytes")
