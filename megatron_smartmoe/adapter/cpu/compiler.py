"""Facade group 4: nothing is compiled while importing.

Megatron decorates small functions with `torch.compile` when it is imported. On a CPU that means one C++ compilation
each (seconds per function and rank) for functions that are small here. Megatron's own switch,
`megatron.core.jit.disable_jit_fuser()`, cannot be reached in time: importing it imports, and decorates, everything.
The optimizers that Megatron takes from `emerging_optimizers` are decorated likewise, and the first decorator of a
process imports the compiler: a second of every rank's start.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch

from megatron_smartmoe.adapter.cpu.devices import replace

_NOT_COMPILED = ("megatron.", "emerging_optimizers.")


def install() -> None:
    """Make `torch.compile` the identity for callers inside Megatron and its optimizers; others compile as before."""
    compile_: Callable[..., Any] = torch.compile

    @functools.wraps(compile_)
    def wrapper(model: Callable[..., Any] | None = None, **kwargs: Any) -> Any:
        if not sys._getframe(1).f_globals.get("__name__", "").startswith(_NOT_COMPILED):
            return compile_(model, **kwargs)
        return model if model is not None else (lambda function: function)

    replace(torch, compile=wrapper)
