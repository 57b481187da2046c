"""Spare slots for TransformerEngine's experts: a grouped linear of S + K GEMMs, of which the last K have no parameters.

TransformerEngine computes the experts of a rank with one grouped linear per matrix, whose GEMMs have a parameter each,
`weight0` to `weight{S-1}`. In a micro-batch with replicas its number of GEMMs is S + K, and `weight{S}` and on are
plain tensors: the replicas' weights, as they have come from their homes; so are their biases, where experts have some.
Between such passes the module is what Megatron has built, so that the optimizer, the data-parallel wrapper and
checkpoints never see a spare slot.

Weights travel in the type of the parameters (bf16). In fp8 each rank quantizes what it computes with: the recipes that
are accepted take their scales from the values, so that a replica's GEMM reads the same fp8 values and scales as its
home's. Sending those instead would save no bytes where a weight is quantized along both of its axes (MX).

Gradients. With --gradient-accumulation-fusion TransformerEngine adds the weight gradients of all GEMMs to `main_grad`
of their weights, in fp32. Those of the spare slots have a buffer for it, one for all layers, since a layer's replicas
take it over before the backward pass goes on to the next layer. With --delay-wgrad-compute those of the home slots wait
for `backward_dw`, and those of the spare slots, which are to be sent home, do not.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from megatron.core.transformer.moe.experts import TEGroupedMLP

from megatron_smartmoe.errors import CompatError
from megatron_smartmoe.runtime.replicas.per_slot import PerSlot
from megatron_smartmoe.runtime.replicas.slots import SpareSlots


class TEExpertsWithSlots(TEGroupedMLP):
    """Megatron's TEGroupedMLP, which can compute the replicas in its spare slots too.

    Attributes:
        accumulates: that it does not add the replicas' gradients to their float32 sums itself; see `SpareSlots`.
    """

    accumulates = False

    def __init__(self, num_local_experts: int, config: Any, submodules: Any, *args: Any, **kwargs: Any) -> None:
        linears = {name: with_spare_gemms(getattr(submodules, name)) for name in ("linear_fc1", "linear_fc2")}
        super().__init__(num_local_experts, config, replace(submodules, **linears), *args, **kwargs)
        self._spare_slots: SpareSlots | None = None

    @property
    def spare_slots(self) -> SpareSlots | None:
        """Slots for replicas of other ranks' experts, or None."""
        return self._spare_slots

    @spare_slots.setter
    def spare_slots(self, spare: SpareSlots) -> None:
        self._spare_slots = spare
        for linear in (self.linear_fc1, self.linear_fc2):
            linear.most_gemms = self.num_local_experts + spare.num_slots

    def slot_weights(self) -> tuple[PerSlot, ...]:
        """What a home slot holds: `[S, F1, H]`, `[S, H, F2]`, and with biases `[S, F1]`, `[S, H]`; a parameter each."""
        kinds = ("weight", "bias") if self.config.add_bias_linear else ("weight",)
        return tuple(
            PerSlot(tuple(getattr(linear, f"{kind}{slot}") for slot in range(self.num_local_experts)))
            for kind in kinds
            for linear in (self.linear_fc1, self.linear_fc2)
        )

    def forward(
        self, permuted_local_hidden_states: torch.Tensor, tokens_per_expert: torch.Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        """Megatron's forward pass; tokens of S slots, or with replicas in use of S + K, home slots first."""
        if len(tokens_per_expert) == self.num_local_experts:
            return super().forward(permuted_local_hidden_states, tokens_per_expert, *args, **kwargs)
        assert self._spare_slots is not None, "rows for replicas, and no spare slots"
        spares = self._spare_slots.weights()
        fc1, fc2 = self.linear_fc1.spare(*spares[::2]), self.linear_fc2.spare(*spares[1::2])
        with fc1, fc2, self._padding_of(len(tokens_per_expert)):
            return super().forward(permuted_local_hidden_states, tokens_per_expert, *args, **kwargs)

    @contextlib.contextmanager
    def _padding_of(self, num_slots: int) -> Iterator[None]:
        """In fp8 the rows of every slot are padded by modules that know the number of slots."""
        names = ("quantization_padding", "quantization_unpadding")
        modules = [getattr(self, name) for name in names if hasattr(self, name)]
        for module in modules:
            module.num_gemms = num_slots
        try:
            yield
        finally:
            for module in modules:
                module.num_gemms = self.num_local_experts


class _SpareGemms:
    """What a grouped linear does besides: K more GEMMs, with weights that are passed in.

    Attributes:
        most_gemms: S + K, for which a recipe's quantizers are made; 0 without spare slots.
    """

    most_gemms = 0
    num_gemms: int
    fuse_wgrad_accumulation: bool
    ub_name: str
    wgrad_store: Any
    bias0: torch.Tensor
    _fp8_workspaces: dict[str, Any]

    def init_fp8_metadata(self, num_gemms: int = 1) -> None:
        """TransformerEngine's, for the spare slots as well."""
        super().init_fp8_metadata(num_gemms=max(num_gemms, self.most_gemms))  # type: ignore[misc]

    @contextlib.contextmanager
    def spare(self, weights: torch.Tensor, biases: torch.Tensor | None = None) -> Iterator[None]:
        """Compute with these replicas' weights and biases, `[K, ...]`, behind those of the home slots."""
        homes, added = self.num_gemms, dict[str, torch.Tensor]()
        room = _gradient_room(self.ub_name, weights.shape, weights.device) if self.fuse_wgrad_accumulation else None
        for slot, weight in enumerate(_ToSlots.apply(weights, room)):  # type: ignore[no-untyped-call]
            if room is not None:
                weight.main_grad, weight.grad_added_to_main_grad = room[slot], False
            added |= {f"weight{homes + slot}": weight, f"bias{homes + slot}": self.bias0}
        if biases is not None:  # autograd adds their gradients
            added |= {f"bias{homes + slot}": bias for slot, bias in enumerate(biases.unbind(0))}
        for name, tensor in added.items():
            setattr(self, name, tensor)
        self.num_gemms, store = homes + len(weights), self.wgrad_store
        if store.delay_wgrad_compute():
            self.wgrad_store = _SparesAtOnce(store, homes)
        try:
            yield
        finally:
            self.num_gemms, self.wgrad_store = homes, store
            for name in added:
                delattr(self, name)
                self._fp8_workspaces.pop(name, None)  # of this micro-batch's replicas


class _SparesAtOnce:
    """TransformerEngine's store of delayed weight gradients, for one pass: those of spare slots are computed at once.

    Args:
        store: keeps what the home slots' gradients are computed from.
        homes: S.
    """

    def __init__(self, store: Any, homes: int) -> None:
        self._store, self._homes = store, homes

    def delay_wgrad_compute(self) -> bool:
        """As the store that it stands for."""
        return True

    def put(self, operands: Sequence[Any], compute: functools.partial[Any]) -> None:
        """Keep the home slots' operands, and compute the spare slots' gradients.

        Args:
            operands: inputs, gradients of outputs, and where weight gradients go, each by slot.
            compute: TransformerEngine's grouped GEMM, with what else it needs by slot, or for all slots.

        Raises:
            CompatError: they are not kept by slot.
        """
        if not all(isinstance(part, list | tuple) for part in operands):
            raise CompatError(
                "--delay-wgrad-compute: TransformerEngine keeps the experts of a rank in one grouped tensor, from "
                "which replicas cannot be told apart. Remove it, or set --smartmoe-spare-slots 0."
            )
        for slots, take in ((slice(self._homes), self._store.put), (slice(self._homes, None), _compute)):
            by_slot = {
                name: value[slots]
                for name, value in compute.keywords.items()
                if isinstance(value, list | tuple) and len(value) == len(operands[0])
            }
            take([part[slots] for part in operands], functools.partial(compute, **by_slot))


def _compute(operands: Sequence[Any], compute: Callable[..., object]) -> None:
    compute(*operands)


class _ToSlots(torch.autograd.Function):
    """A weight per slot, out of one tensor for all; its backward pass collects their gradients.

    TransformerEngine leaves them in `room`, or returns them where it does not accumulate into `main_grad`.
    """

    @staticmethod
    def forward(ctx: Any, weights: torch.Tensor, room: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
        ctx.room, ctx.dtype = room, weights.dtype
        return weights.detach().unbind(0)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        if ctx.room is None:
            return torch.stack(gradients), None
        total = ctx.room.to(ctx.dtype, copy=True)
        ctx.room.zero_()
        return total, None


@functools.cache
def with_spare_gemms(linear: type) -> type:
    """One of Megatron's grouped linears, with spare GEMMs."""
    return type(f"{linear.__name__}WithSlots", (_SpareGemms, linear), {"__module__": __name__})


@functools.cache
def _gradient_room(matrix: str, shape: torch.Size, device: torch.device) -> torch.Tensor:
    """Zeros in fp32 for the spare slots' gradients of one matrix (fc1 or fc2), shared by all layers."""
    del matrix  # two matrices of one shape have their gradients at the same time
    return torch.zeros(shape, dtype=torch.float32, device=device)
