"""Tensors without memory that pass through Megatron's modules, with routing that is real.

A model is built on the meta device, where it costs nothing, and then its parameters become torch's fake tensors: they
have shapes, types and a device, and no data. Routing has to be real, because the sizes of what follows depend on it:
each router's logits are drawn at random, and from there on its top-k, losses, capacity and permutations are computed as
in training. Operations on real tensors alone are computed; where a fake one takes part, only shapes are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from megatron.core.transformer.moe.router import Router
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_smartmoe.adapter.gates.draws import Draws, Part
from megatron_smartmoe.adapter.gates.residuals import Link
from megatron_smartmoe.adapter.gates.router import GateRouter
from megatron_smartmoe.adapter.gates.zero_computation import ZeroComputationRouter
from megatron_smartmoe.adapter.moe.layer import SmartMoELayer

META = torch.device("meta")
_CPU = torch.device("cpu")


class Shapes:
    """The fake tensors of one model."""

    def __init__(self) -> None:
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """A fake tensor with the shape and the type of one on the meta device."""
        return FakeTensor(self._mode, tensor.detach().to(META), _CPU)

    def empty(self, shape: Iterable[int], dtype: torch.dtype) -> torch.Tensor:
        """A fake tensor of this shape and type."""
        return self.of(torch.empty(*shape, dtype=dtype, device=META))

    def convert(self, model: torch.nn.Module) -> None:
        """Make a model on the meta device one of fake tensors, with real routing."""
        for module in model.modules():
            is_router = isinstance(module, Router)
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    fake = torch.nn.Parameter(self.of(parameter), requires_grad=parameter.requires_grad)
                    fake.__dict__.update(parameter.__dict__)
                    module._parameters[name] = fake
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    is_real = is_router and buffer.is_meta
                    module._buffers[name] = torch.zeros_like(buffer, device=_CPU) if is_real else self.of(buffer)
            for name, value in list(vars(module).items()):
                if isinstance(value, torch.Tensor) and value.is_meta:
                    setattr(module, name, self.of(value))
            if is_router:
                router: Any = module
                router.gating = partial(self._real_logits, router.gating)
            if isinstance(module, GateRouter):
                module.draws = Draws(seed=0, layer=0, part=Part())
                module.draws.begin(iteration=0, num_micro_batches=1)
            if isinstance(module, ZeroComputationRouter):
                module.link = Link(before=None, after=None)
                module.link.begin(num_micro_batches=1)
            if isinstance(module, SmartMoELayer):
                for name in ("slot_of_expert_E", "expert_of_slot_E"):
                    module._buffers[name] = torch.arange(module.config.num_moe_experts)

    def _real_logits(self, gating: Callable[..., torch.Tensor], *args: Any, **kwargs: Any) -> torch.Tensor:
        """Random logits in the place of a router's own, connected to them for the backward pass."""
        logits: torch.Tensor = _Random.apply(gating(*args, **kwargs), self)  # type: ignore[no-untyped-call]
        return logits


class _Random(torch.autograd.Function):
    """Real random values forward, a gradient without data backward."""

    @staticmethod
    def forward(ctx: Any, like: torch.Tensor, shapes: Shapes) -> torch.Tensor:
        ctx.shape, ctx.dtype, ctx.shapes = like.shape, like.dtype, shapes
        return torch.randn(like.shape).to(like.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.shapes.empty(ctx.shape, ctx.dtype), None


class GroupedGemmShapes(TorchDispatchMode):  # type: ignore[no-untyped-call]  # of torch's own hook for subclasses
    """Shapes of torch's grouped GEMM for every type: torch's own rule for fake tensors knows bf16 only."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func is not torch.ops.aten._grouped_mm.default:
            return func(*args, **(kwargs or {}))
        left, right = args[0], args[1]
        if left.shape[-1] != right.shape[-2]:
            raise RuntimeError(f"grouped GEMM: {list(left.shape)} times {list(right.shape)}: the inner sizes differ")
        if left.dim() == 2 and right.dim() == 2:  # one product for each group of columns of `left`
            offsets = args[2] if len(args) > 2 else (kwargs or {})["offs"]
            return left.new_empty((offsets.shape[0], left.shape[0], right.shape[1]))
        return left.new_empty((*left.shape[:-1], right.shape[-1]))
