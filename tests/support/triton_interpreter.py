"""Triton's interpreter, mended where it and today's NumPy have no common ground: kernels run on CPU tensors.

Triton 3.6 asks an array of one element for an integer, which NumPy 2.4 refuses, and multiplies the bits of bfloat16 as
if they were integers. Import this in a process of its own that has TRITON_INTERPRET=1: how a kernel is run is decided
where it is defined.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

_patch_tensor = interpreter._patch_lang_tensor
_create_dot = interpreter.InterpreterBuilder.create_dot


def _patch(tensor: Any, scope: Any) -> None:
    _patch_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


def _widened(handle: Any) -> Any:
    """A tensor of bfloat16 as float32."""
    if handle.dtype != tl.bfloat16:
        return handle
    bits = handle.data.astype(np.uint32) << 16
    return interpreter.TensorHandle(bits.view(np.float32), tl.float32)


def _dot(self: Any, a: Any, b: Any, *args: Any) -> Any:
    return _create_dot(self, _widened(a), _widened(b), *args)


interpreter._patch_lang_tensor = _patch
interpreter.InterpreterBuilder.create_dot = _dot
