"""Facade group 2: where a tensor lives.

`device="cuda"`, a device index, `.cuda()` and `pin_memory` all mean "the accelerator, or the way to it". Without one
they mean the CPU, where the tensor is already.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch

from megatron_smartmoe.adapter.cpu.devices import CPU, replace

_FACTORIES = (
    "tensor as_tensor empty zeros ones full arange linspace eye rand randn randint randperm empty_like zeros_like "
    "ones_like full_like rand_like randn_like randint_like empty_strided"
).split()


def install() -> None:
    """Install every redirection of this group."""
    replace(torch, **{name: _on_cpu(getattr(torch, name)) for name in _FACTORIES})
    _load()
    _methods()
    _type_names()
    _offloading()


def means_accelerator(device: object) -> bool:
    """Whether a `device=` argument names the accelerator: "cuda", "cuda:1", its torch.device, or a bare index."""
    if type(device) is str:
        return device.startswith("cuda")
    if type(device) is torch.device:
        return device.type == "cuda"
    return type(device) is int


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Wrap a tensor factory: the accelerator becomes the CPU, and there is no pinned memory to ask for."""

    @functools.wraps(factory)
    def wrapper(*args: Any, **kwargs: Any) -> torch.Tensor:
        device = kwargs.get("device")
        if device is not None and device is not CPU and means_accelerator(device):
            kwargs["device"] = CPU
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        return factory(*args, **kwargs)

    return wrapper


def _load() -> None:
    """`torch.load(map_location="cuda")`, when a checkpoint is read back."""
    load = torch.load

    @functools.wraps(load)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if isinstance(kwargs.get("map_location"), str | torch.device) and means_accelerator(kwargs["map_location"]):
            kwargs["map_location"] = CPU
        return load(*args, **kwargs)

    replace(torch, load=wrapper)


def _methods() -> None:
    """`.cuda()` and `.pin_memory()` return the tensor; `.to("cuda")` may still change its dtype."""
    to: Callable[..., torch.Tensor] = torch.Tensor.to

    @functools.wraps(to)
    def wrapper(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if args and means_accelerator(args[0]):
            args = (CPU, *args[1:])
        if means_accelerator(kwargs.get("device")):
            kwargs["device"] = CPU
        return to(self, *args, **kwargs)

    replace(
        torch.Tensor, cuda=lambda self, *args, **kwargs: self, pin_memory=lambda self, *args, **kwargs: self, to=wrapper
    )
    replace(torch.nn.Module, cuda=lambda self, device=None: self)


def _type_names() -> None:
    """Megatron's optimizers compare `param.type()` with "torch.cuda.FloatTensor" and its like.

    Only callers inside Megatron get the CUDA name; torch and everything else gets the real one. Tensors of the meta
    device stand for tensors of the accelerator (see the rehearsal).
    """
    type_: Callable[..., Any] = torch.Tensor.type

    @functools.wraps(type_)
    def wrapper(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        name = type_(self, *args, **kwargs)
        if isinstance(name, str) and name.startswith("torch.") and not name.startswith("torch.cuda."):
            caller = sys._getframe(1).f_globals.get("__name__", "")
            if caller.startswith("megatron."):
                return "torch.cuda." + name.removeprefix("torch.").removeprefix("meta.")
        return name

    replace(torch.Tensor, type=wrapper)


def _offloading() -> None:
    """Megatron's optimizer with offloading asks `is_cuda` which parameters are on the accelerator, and may be copied.

    There alone every tensor is, except the copy that has just been made.
    """
    real: Any = torch.Tensor.is_cuda

    def is_cuda(self: torch.Tensor) -> bool:
        caller = sys._getframe(1)
        if caller.f_globals.get("__name__") == "megatron.core.optimizer.cpu_offloading.hybrid_optimizer":
            return not caller.f_locals.get("cpu_copy", False)
        return bool(real.__get__(self))

    replace(torch.Tensor, is_cuda=property(is_cuda))
