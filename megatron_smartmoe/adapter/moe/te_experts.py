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

Fused operations (--use-transformer-engine-op-fuser). Megatron makes them once for the parameters of S slots. A
micro-batch with replicas has operations of its own, for S + K slots: they read their weights in the backward pass too,
when other replicas may be in the slots. Where one parameter holds all home slots (--moe-single-grouped-weight), they
get a view of each slot: one grouped tensor of S + K slots would have to be copied together.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
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
    _fused_ops: tuple[torch.nn.Module] | None

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
        """What a home slot holds: `[S, F1, H]`, `[S, H, F2]`, and with biases `[S, F1]`, `[S, H]`."""
        kinds = ("weight", "bias") if self.config.add_bias_linear else ("weight",)
        return tuple(linear.home_slots(kind) for kind in kinds for linear in (self.linear_fc1, self.linear_fc2))

    def forward(
        self, permuted_local_hidden_states: torch.Tensor, tokens_per_expert: torch.Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        """Megatron's forward pass; tokens of S slots, or with replicas in use of S + K, home slots first."""
        if len(tokens_per_expert) == self.num_local_experts:
            return super().forward(permuted_local_hidden_states, tokens_per_expert, *args, **kwargs)
        assert self._spare_slots is not None, "rows for replicas, and no spare slots"
        spares = self._spare_slots.weights()
        fc1, fc2 = self.linear_fc1.spare(*spares[::2]), self.linear_fc2.spare(*spares[1::2])
        with fc1, fc2, self._padding_of(len(tokens_per_expert)), self._operations_of_one_pass():
            return super().forward(permuted_local_hidden_states, tokens_per_expert, *args, **kwargs)

    @contextlib.contextmanager
    def _operations_of_one_pass(self) -> Iterator[None]:
        """Megatron's fused operations, if it uses them, for the S + K slots that the grouped linears have now."""
        if not self._with_fused_impl:
            yield
            return
        of_homes = self._fused_ops
        self._fused_ops = (self._make_fused_ops(),)
        try:
            yield
        finally:
            self._fused_ops = of_homes

    def _make_fused_ops(self) -> Any:
        """Megatron's, with the tensors of this pass in the place of their stand-ins."""
        operations = super()._make_fused_ops()
        for operation, linear in ((operations[0], self.linear_fc1), (operations[2], self.linear_fc2)):
            for name, tensor in linear.of_one_pass.items():
                if operation._parameters.get(name) is not None:  # what autograd is told of, and what it reads
                    operation._parameters[name] = tensor if torch.is_grad_enabled() else tensor.requires_grad_()
        return operations

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
        of_one_pass: weights and biases that are no parameters, by name; empty but in a pass with replicas.
    """

    most_gemms = 0
    of_one_pass: Mapping[str, torch.Tensor] = MappingProxyType({})
    num_gemms: int
    fuse_wgrad_accumulation: bool
    ub_name: str
    wgrad_store: Any
    bias0: torch.Tensor
    _fp8_workspaces: dict[str, Any]

    def init_fp8_metadata(self, num_gemms: int = 1) -> None:
        """TransformerEngine's, for the spare slots as well."""
        super().init_fp8_metadata(num_gemms=max(num_gemms, self.most_gemms))  # type: ignore[misc]

    def get_parameter(self, target: str) -> torch.nn.Parameter:
        """A parameter; an empty stand-in for a tensor of this pass, to be registered where only parameters can be."""
        if (tensor := self.of_one_pass.get(target)) is not None:
            return torch.nn.Parameter(torch.empty_like(tensor, device="meta"))
        parameter: torch.nn.Parameter = super().get_parameter(target)  # type: ignore[misc]
        return parameter

    def home_slots(self, kind: str) -> PerSlot:
        """The weights or biases of the home slots, `[S, ...]`: parameters, or views of the one that holds them all.

        Args:
            kind: `weight` or `bias`.
        """
        packed = getattr(self, kind, None)
        if packed is not None:
            return PerSlot(_views(packed), packed=packed)
        return PerSlot(tuple(getattr(self, f"{kind}{slot}") for slot in range(self.num_gemms)))

    @contextlib.contextmanager
    def spare(self, weights: torch.Tensor, biases: torch.Tensor | None = None) -> Iterator[None]:
        """Compute with these replicas' weights and biases, `[K, ...]`, behind those of the home slots."""
        homes, added = self.num_gemms, dict[str, torch.Tensor]()
        for kind in ("weight", "bias"):
            packed = getattr(self, kind, None)
            if packed is not None:
                added |= {f"{kind}{slot}": tensor for slot, tensor in enumerate(self._unpacked(packed))}
        room = _gradient_room(self.ub_name, weights.shape, weights.device) if self.fuse_wgrad_accumulation else None
        for slot, weight in enumerate(_ToSlots.apply(weights, room, False)):  # type: ignore[no-untyped-call]
            if room is not None:
                weight.main_grad, weight.grad_added_to_main_grad = room[slot], False
            added |= {f"weight{homes + slot}": weight, f"bias{homes + slot}": self.bias0}
        delays, of_biases = self.wgrad_store.delay_wgrad_compute(), None
        if biases is not None:  # autograd adds their gradients, unless a delayed GEMM computes them
            of_biases = _gradient_room(self.ub_name, biases.shape, biases.device) if delays else None
            slots = _ToSlots.apply(biases, of_biases, True)  # type: ignore[no-untyped-call]
            added |= {f"bias{homes + slot}": bias for slot, bias in enumerate(slots)}
        values: dict[str, Any] = added | {"of_one_pass": added, "num_gemms": homes + len(weights)}
        if delays:
            values["wgrad_store"] = _SparesAtOnce(self.wgrad_store, homes, of_biases)
        if getattr(self, "weight", None) is not None:
            values["single_grouped_weight"] = False
        if getattr(self, "bias", None) is not None:
            values["single_grouped_bias"] = False
        # Attributes of the instance, beside its parameters and before them: `weight0` may be registered as None.
        attributes = vars(self)
        before = {name: attributes[name] for name in values if name in attributes}
        attributes.update(values)
        try:
            yield
        finally:
            for name in values:
                del attributes[name]
                self._fp8_workspaces.pop(name, None)  # of this micro-batch's replicas
            attributes.update(before)

    def _unpacked(self, packed: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """A tensor of each home slot, in the autograd graph, out of the parameter that holds them all."""
        accumulates = self.fuse_wgrad_accumulation and packed.dim() > 2  # biases are left to autograd
        slots: tuple[torch.Tensor, ...] = _ToHomes.apply(packed, accumulates)  # type: ignore[no-untyped-call]
        if accumulates:
            for slot, main_grad in zip(slots, packed.main_grad.view(packed.shape), strict=True):  # type: ignore[attr-defined]
                slot.main_grad, slot.grad_added_to_main_grad = main_grad, False  # type: ignore[attr-defined]
        return slots


class _SparesAtOnce:
    """TransformerEngine's store of delayed weight gradients, for one pass: those of spare slots are computed at once.

    Args:
        store: keeps what the home slots' gradients are computed from.
        homes: S.
        of_biases: where the gradients of the spare slots' biases are added, `[K, rows]`; None without biases.
    """

    def __init__(self, store: Any, homes: int, of_biases: torch.Tensor | None) -> None:
        self._store, self._homes, self._of_biases = store, homes, of_biases

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
        for slots, take in ((slice(self._homes), self._store.put), (slice(self._homes, None), self._compute)):
            by_slot = {
                name: value[slots]
                for name, value in compute.keywords.items()
                if isinstance(value, list | tuple) and len(value) == len(operands[0])
            }
            take([part[slots] for part in operands], functools.partial(compute, **by_slot))

    def _compute(self, operands: Sequence[Any], compute: Callable[..., Any]) -> None:
        _, bias_gradients, _ = compute(*operands)
        for slot, gradient in enumerate(bias_gradients):
            if self._of_biases is not None and gradient is not None and gradient.numel():  # else autograd has them
                self._of_biases[slot].add_(gradient)


class _ToSlots(torch.autograd.Function):
    """A weight or biases per slot, out of one tensor for all; its backward pass collects their gradients.

    They are in `room` where TransformerEngine accumulates them there, and those of autograd are dummies, or where a
    delayed GEMM would have computed them (`adds`), and those of autograd are added. Otherwise autograd has them.
    """

    @staticmethod
    def forward(ctx: Any, slots: torch.Tensor, room: torch.Tensor | None, adds: bool) -> tuple[torch.Tensor, ...]:
        ctx.room, ctx.adds, ctx.dtype = room, adds, slots.dtype
        return slots.detach().unbind(0)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        if ctx.room is None:
            return torch.stack(gradients), None, None
        total = ctx.room + torch.stack(gradients) if ctx.adds else ctx.room
        total = total.to(ctx.dtype, copy=True)
        ctx.room.zero_()
        return total, None, None


class _ToHomes(torch.autograd.Function):
    """A tensor per home slot, out of the one parameter for all; its backward pass puts their gradients together."""

    @staticmethod
    def forward(ctx: Any, packed: torch.nn.Parameter, accumulates: bool) -> tuple[torch.Tensor, ...]:
        ctx.packed = packed if accumulates else None
        return _views(packed)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        if ctx.packed is None:
            return torch.stack(gradients), None
        ctx.packed.grad_added_to_main_grad = True  # the GEMM has added them
        # Where zeros are needed, Megatron's hook adds what it gets all the same.
        needs_zeros = getattr(ctx.packed, "zero_out_wgrad", False)
        make = torch.zeros if needs_zeros else torch.empty
        return make(ctx.packed.shape, dtype=ctx.packed.dtype, device=ctx.packed.device), None


def _views(packed: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The slots of a parameter `[S, ...]`; TransformerEngine's grouped tensor has no views but a flat one."""
    return packed.detach().view(-1).view(packed.shape).unbind(0)


def add_up_passes(experts: TEGroupedMLP) -> None:
    """Have the weight gradients of several passes of one micro-batch added up.

    TransformerEngine writes the gradients of a module's first pass of an iteration over what `main_grad` holds, and
    adds those of later ones. The backward passes of one micro-batch come in the opposite order: the last one would wipe
    out what the others have added. Here all are added, to the zeros with which Megatron begins an iteration. What says
    that a pass is the first also says that the weights have changed, so fp8 copies of the old ones are dropped instead.

    Args:
        experts: with TransformerEngine's grouped linears; before the passes of a micro-batch.
    """
    for linear in (experts.linear_fc1, experts.linear_fc2):
        if linear.is_first_microbatch:
            linear._fp8_workspaces.clear()
            linear.is_first_microbatch = False


@functools.cache
def with_spare_gemms(linear: type) -> type:
    """One of Megatron's grouped linears, with spare GEMMs."""
    return type(f"{linear.__name__}WithSlots", (_SpareGemms, linear), {"__module__": __name__})


@functools.cache
def _gradient_room(matrix: str, shape: torch.Size, device: torch.device) -> torch.Tensor:
    """Zeros in fp32 for the spare slots' gradients of one matrix (fc1 or fc2), shared by all layers."""
    del matrix  # two matrices of one shape have their gradients at the same time
    return torch.zeros(shape, dtype=torch.float32, device=device)
