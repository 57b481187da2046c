"""Reading a pickle without running it.

A pickle is a program: it may name any importable callable and have it called. `torch.load(weights_only=True)` restricts
that to a list, and needs torch; the index of a torch_dist checkpoint is read by torch with plain `pickle.load`. Here
every name that a pickle asks for is answered by a class of this module: the few that carry data we use (`_KNOWN`), and
an `Opaque` for all others, which keeps what it is given and does nothing. So loading can be wrong, but it cannot act.
"""

from __future__ import annotations

import argparse
import collections
import io
import pickle
from collections.abc import Mapping
from pathlib import PurePosixPath
from types import SimpleNamespace
from typing import Any

from megatron_smartmoe.errors import CheckpointError


class Opaque:
    """An object of a class that is not known here.

    Attributes:
        args: what its class would have been called with.
    """

    qualified_name = "unknown"

    def __new__(cls, *args: Any, **kwargs: Any) -> Opaque:
        """Take any arguments."""
        self = super().__new__(cls)
        self.args = args
        return self

    def __init__(self, *args: Any, **kwargs: Any) -> None:
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
_KNOWN: dict[str, Any] = {
    "argparse.Namespace": argparse.Namespace,
    "collections.OrderedDict": collections.OrderedDict,
    "types.SimpleNamespace": SimpleNamespace,
    "pathlib.PosixPath": PurePosixPath,
    "pathlib.PurePosixPath": PurePosixPath,
    "pathlib._local.PosixPath": PurePosixPath,
    "builtins.set": set,
    "builtins.frozenset": frozenset,
    "builtins.list": list,
    "builtins.dict": dict,
    "builtins.tuple": tuple,
    "builtins.complex": complex,
    "torch.Size": tuple,
}


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BufferedIOBase, known: Mapping[str, Any]) -> None:
        super().__init__(file)
        self._classes = {**_KNOWN, **known}

    def find_class(self, module: str, name: str) -> Any:
        """The class that stands for `module.name` here."""
        qualified = f"{module}.{name}"
        if qualified not in self._classes:
            self._classes[qualified] = type("Opaque", (Opaque,), {"qualified_name": qualified})
        return self._classes[qualified]

    def persistent_load(self, pid: Any) -> Any:
        """Storages of tensors are kept beside the pickle; only their description is returned."""
        return pid


def read_pickle(data: bytes, known: Mapping[str, Any], where: str) -> Any:
    """The object in `data`, with inert stand-ins for every class that is not in `known`.

    Args:
        data: a whole pickle.
        known: further classes by qualified name. They are called with what the pickle says, so they must only keep it.
        where: names the source in an error.

    Raises:
        CheckpointError: it is not a pickle, or a damaged one.
    """
    try:
        return _Unpickler(io.BytesIO(data), known).load()
    except Exception as error:  # a damaged pickle fails in any way: missing opcode, wrong stack, bad utf-8, MemoryError
        reason = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        raise CheckpointError(where, "cannot be read", reason) from None
