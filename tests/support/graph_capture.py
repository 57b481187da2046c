"""A CUDA graph's rules, without one: what a capture refuses, and what a replay could not follow.

A graph holds kernels with the sizes, numbers and addresses of its capture. `Captured` runs a transformer layer's part
that Megatron captures, refuses what a capture refuses, and writes every operator down: its sizes, its numbers, and the
memory that it reads and that does not come from the part itself. A replay is the same part once more, on other tokens,
which must write down the same. What it cannot find: anything about streams, and about kernels' own launches.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# operators whose result has a size that the device has to tell the host, or that are a number on the host
_WAITS = frozenset("_local_scalar_dense nonzero masked_select _unique2 unique_dim unique_consecutive bincount".split())
_HOST_METHODS = ("cpu", "numpy", "tolist", "__array__")


class Refused(AssertionError):
    """What a capture refuses."""


def _cuda_ops() -> frozenset[str]:
    """This project's operators that have a CUDA kernel."""
    source = (Path(__file__).parents[2] / "csrc" / "ops.cpp").read_text()
    return frozenset(re.findall(r'm\.impl\("(\w+)", TORCH_BOX\(&smartmoe::cuda::', source))


class _Operators(TorchDispatchMode):
    """Writes the operators of a captured part down."""

    def __init__(self, *inputs: torch.Tensor) -> None:
        super().__init__()
        self.calls: list[tuple[Any, ...]] = []
        self._kept: list[torch.Tensor] = list(inputs)  # so that no memory of the part is used twice
        self._own = {tensor.untyped_storage().data_ptr() for tensor in inputs}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace, name = func._schema.name.split("::")
        leaves = tree_leaves((args, kwargs or {}))
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        masks = name in ("index", "index_put", "index_put_") and any(
            tensor.dtype == torch.bool for tensor in tensors[1:]
        )
        if name in _WAITS or masks:
            raise Refused(f"{name}: the host waits for the device")
        if name == "repeat_interleave" and (kwargs or {}).get("output_size") is None:
            raise Refused(f"{name}: the host waits for the size of the result")
        if namespace == "smartmoe" and name not in _cuda_ops():
            raise Refused(f"{name}: has no CUDA kernel")
        read = tuple(p for tensor in tensors if (p := tensor.untyped_storage().data_ptr()) not in self._own)
        result = func(*args, **(kwargs or {}))
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        if namespace != "c10d":
            given = {id(tensor) for tensor in tensors}
            self._kept += made
            self._own |= {
                tensor.untyped_storage().data_ptr()
                for tensor in made
                if id(tensor) not in given and tensor.untyped_storage().data_ptr() not in read
            }
        numbers = tuple(leaf for leaf in leaves if isinstance(leaf, (int, float)))
        self.calls.append((name, numbers, tuple((tuple(each.shape), each.dtype) for each in made), read))
        return result


@contextmanager
def _capturing() -> Iterator[None]:
    """Megatron's state of capturing, and nothing that brings values to the host or from it."""
    from megatron.core.transformer import cuda_graphs

    def refuses(name: str) -> Callable[..., Any]:
        def refuse(*args: Any, **kwargs: Any) -> Any:
            raise Refused(f"{name}: values leave the device, or come from the host")

        return refuse

    with ExitStack() as stack:
        for name in _HOST_METHODS:
            stack.enter_context(mock.patch.object(torch.Tensor, name, refuses(name)))
        stack.enter_context(mock.patch.object(torch, "from_numpy", refuses("from_numpy")))
        cuda_graphs._set_capture_start()
        try:
            yield
        finally:
            cuda_graphs._set_capture_end()


class Captured:
    """Stands for the graph of a transformer layer in Megatron's list of them.

    Args:
        layer: with --cuda-graph-impl transformer_engine.
        sample: hidden states to capture with.
    """

    def __init__(self, layer: Any, sample: torch.Tensor) -> None:
        self._layer = layer
        self.calls, _ = self._run(sample)
        layer.cuda_graphs = [self]
        layer._get_te_cuda_graph_replay_args = lambda *args, **kwargs: (args, kwargs)  # Megatron's imports the package

    def __call__(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Replay."""
        calls, outputs = self._run(hidden_states)
        for at, (then, now) in enumerate(zip(self.calls, calls, strict=True)):
            assert then == now, f"operator {at} was {then} when it was captured, and is {now}"
        return outputs

    def _run(self, hidden_states: torch.Tensor) -> tuple[list[tuple[Any, ...]], tuple[torch.Tensor, ...]]:
        with _capturing(), _Operators(hidden_states) as operators:
            outputs: tuple[torch.Tensor, ...] = self._layer._te_cuda_graph_capture(hidden_states)
        return operators.calls, outputs
