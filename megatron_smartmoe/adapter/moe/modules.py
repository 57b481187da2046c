"""What the layers of a run are built from, where that is not Megatron's own.

Megatron builds every GPT layer, prediction layers (MTP) included, from two places: the MoE layer comes from
`get_moe_module_spec_for_backend`, norms and attention without TransformerEngine from `LocalSpecProvider`. `hooks` puts
the functions of this file around both, so that a model provider, a layer spec or a fork that asks Megatron for its
layers gets this project's, and no parameter is renamed: checkpoints stay Megatron's.

`--smartmoe` puts `SmartMoELayer` in the place of Megatron's MoE layer, with `SlottedExperts` unless TransformerEngine's
are asked for; where its all-to-alls are split into chunks it is an `OverlappedMoELayer`. `TorchNorm` and `SDPAttention`
stand for Megatron's local modules: everywhere in this project's own entry, and in other scripts only where Megatron's
stop (its norm under sequence parallelism, its attention under context parallelism), since losses must not change.
"""

from __future__ import annotations

import functools
from argparse import Namespace
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeGuard

from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.moe.experts import TEGroupedMLP
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import WrappedTorchNorm

from megatron_smartmoe.adapter.flags.pool_settings import may_overlap as pool_may_overlap
from megatron_smartmoe.adapter.gates.router import router_of
from megatron_smartmoe.adapter.gates.table import GATE
from megatron_smartmoe.adapter.local.attention import SDPAttention
from megatron_smartmoe.adapter.local.norm import TorchNorm
from megatron_smartmoe.adapter.moe.experts import SlottedExperts
from megatron_smartmoe.adapter.moe.layer import SmartMoELayer
from megatron_smartmoe.adapter.moe.overlap import OverlappedMoELayer
from megatron_smartmoe.adapter.moe.te_experts import TEExpertsWithSlots
from megatron_smartmoe.errors import CompatError

# The steps between a layer's input and its output that this project replaces, or depends on.
_REPLACED = (
    "forward",
    "route",
    "router_and_preprocess",
    "preprocess",
    "dispatch",
    "experts_compute",
    "routed_experts_compute",
    "combine",
)


@dataclass(frozen=True, kw_only=True)
class Modules:
    """What a run's layers are built from.

    Attributes:
        balances: whether MoE layers are this project's (`--smartmoe`).
        gate: the router of `--smartmoe-gate`; None for Megatron's.
        slotted: whether experts are this project's, False for TransformerEngine's.
        replicates: whether there may be replicas, for which TransformerEngine's experts get spare slots.
        may_cut: whether the overlap degree may change later; then the layer supports every degree.
        overlap_degree: returns the number of chunks of each all-to-all; called when the process groups exist.
        dispatch_nodes: returns the number of nodes between which a token is sent once, 1 for a flat dispatch; called
            then, too.
        norm: which of Megatron's local norms are replaced: all, torch's (which refuses sequence parallelism), or none.
        sdpa: whether Megatron's local attention is replaced.
    """

    balances: bool
    gate: type[TopKRouter] | None = None
    slotted: bool
    replicates: bool
    may_cut: bool
    overlap_degree: Callable[[], int]
    norm: str
    sdpa: bool
    dispatch_nodes: Callable[[], int] = lambda: 1

    @classmethod
    def of(
        cls,
        args: Namespace,
        overlap_degree: Callable[[], int],
        *,
        everywhere: bool,
        dispatch_nodes: Callable[[], int] = lambda: 1,
    ) -> Modules:
        """What the flags ask for.

        Args:
            args: Megatron's arguments.
            overlap_degree: shared with the pool, so that the degree is chosen once.
            dispatch_nodes: see the attribute.
            everywhere: replace the local norm and attention also where Megatron's work.
        """
        special = getattr(args, "experimental_attention_variant", None) or _is_heterogeneous(args)
        plain = args.transformer_impl == "local" and not special
        own_attention = args.attention_backend in (AttnBackend.unfused, AttnBackend.local)
        norm = "none"
        if plain and (everywhere or args.sequence_parallel):
            norm = "all" if everywhere else "torch"
        return cls(
            balances=args.smartmoe,
            gate=None if (gate := router_of(args.smartmoe_gate)) is None else gate.of_run(args),
            slotted=args.smartmoe_experts == "grouped_mm",
            replicates=args.smartmoe_spare_slots > 0,
            may_cut=pool_may_overlap(args),
            overlap_degree=overlap_degree,
            dispatch_nodes=dispatch_nodes,
            norm=norm,
            sdpa=plain and not own_attention and (everywhere or args.context_parallel_size > 1),
        )

    def moe_spec(self, spec: Any) -> Any:
        """The spec of a MoE layer with this project's layer and gate; itself without `--smartmoe` and gate.

        Args:
            spec: `partial(MoELayer, submodules=...)`, or `ModuleSpec(module=MoELayer, ...)` as up to Megatron 0.17;
                the class may be a subclass that overrides nothing between the layer's input and its output.

        Raises:
            CompatError: it is the spec of something else, or of a layer that this project cannot stand for.
        """
        if self.gate is not None:
            spec = _with_router(spec, self.gate)
        if not self.balances or _is_ours(spec):
            return spec
        if isinstance(spec, partial) and _is_moe(spec.func):
            layer, options = self._layer(spec.func)
            submodules = self._submodules(spec.keywords.get("submodules"))
            return partial(layer, *spec.args, **{**spec.keywords, **options, "submodules": submodules})
        if isinstance(spec, ModuleSpec) and _is_moe(spec.module):
            layer, options = self._layer(spec.module)
            params = {**(spec.params or {}), **options}
            return replace(spec, module=layer, params=params, submodules=self._submodules(spec.submodules))
        raise _no_moe_spec("--smartmoe", spec)

    def _layer(self, wanted: type[MoELayer]) -> tuple[type[SmartMoELayer], dict[str, Any]]:
        """The layer's class, and what it is built with besides."""
        degree, nodes = self.overlap_degree(), self.dispatch_nodes()
        cuts = self.may_cut or degree > 1
        layer = smart_class(wanted, OverlappedMoELayer if cuts else SmartMoELayer)  # type: ignore[arg-type]
        options = {"overlap_degree": degree} if cuts else {}
        return layer, options | ({"dispatch_nodes": nodes} if nodes > 1 else {})

    def _submodules(self, submodules: Any) -> Any:
        """A copy of a MoE layer's submodules with this project's experts."""
        router = getattr(submodules, "router", TopKRouter)
        if isinstance(router, type) and router.__name__ == "InferenceTopKRouter":
            raise CompatError("--smartmoe: the router InferenceTopKRouter is for inference only. Remove --smartmoe.")
        if not self.slotted:
            return _with_spare_slots(submodules) if self.replicates else submodules
        experts = _built(submodules.experts)
        if not (getattr(experts, "__module__", "") or "").startswith("megatron.core."):
            raise CompatError(
                f"--smartmoe: experts = {_name(experts)}: would be replaced by --smartmoe-experts grouped_mm, and are "
                "not Megatron's. Use Megatron's, pass --smartmoe-experts transformer_engine, or remove --smartmoe."
            )
        return replace(submodules, experts=SlottedExperts)

    def local_norm(self, norm: Any) -> Any:
        """What stands for one of Megatron's local norms."""
        is_replaced = self.norm == "all" or (self.norm == "torch" and norm is WrappedTorchNorm)
        return TorchNorm if is_replaced else norm

    def local_attention(self, attention: Any) -> Any:
        """What stands for Megatron's local attention."""
        return SDPAttention if self.sdpa else attention


def _no_moe_spec(flag: str, spec: Any) -> CompatError:
    return CompatError(
        f"{flag}: the spec of a MoE layer = {str(spec)[:200]}: must be Megatron's MoELayer or a subclass, "
        "as partial(MoELayer, submodules=...) or ModuleSpec(module=MoELayer, submodules=...). Build it so, or "
        f"remove {flag}."
    )


def _with_router(spec: Any, router: type[TopKRouter]) -> Any:
    """A copy of a MoE layer's spec with another router.

    Raises:
        CompatError: it is the spec of something else, or has a router that is not Megatron's.
    """
    keywords = spec.keywords if isinstance(spec, partial) else vars(spec) if isinstance(spec, ModuleSpec) else {}
    submodules: Any = keywords.get("submodules")
    if not _is_moe(_built(spec)) or not hasattr(submodules, "router"):
        raise _no_moe_spec(GATE, spec)
    if submodules.router not in (TopKRouter, router):
        raise CompatError(
            f"{GATE}: the router of a MoE layer = {_name(_built(submodules.router))}: would be replaced by the gate, "
            f"and is not Megatron's TopKRouter. Use Megatron's, or remove {GATE}."
        )
    submodules = replace(submodules, router=router)
    if isinstance(spec, partial):
        return partial(spec.func, *spec.args, **{**spec.keywords, "submodules": submodules})
    return replace(spec, submodules=submodules)


def _with_spare_slots(submodules: Any) -> Any:
    """A copy of a MoE layer's submodules in which TransformerEngine's grouped experts can have spare slots.

    Raises:
        CompatError: the experts are others.
    """
    experts = submodules.experts
    if _built(experts) is not TEGroupedMLP:
        raise CompatError(
            f"--smartmoe-spare-slots: experts = {_name(_built(experts))}: must be Megatron's TEGroupedMLP. Use it, "
            "pass --smartmoe-experts grouped_mm, or remove --smartmoe-spare-slots."
        )
    if isinstance(experts, partial):
        return replace(submodules, experts=partial(TEExpertsWithSlots, *experts.args, **experts.keywords))
    return replace(submodules, experts=replace(experts, module=TEExpertsWithSlots))


def check_layers(layers: Iterable[tuple[int, MoELayer]], layer_numbers: Iterable[int]) -> None:
    """With `--smartmoe`: that the model's MoE layers are this project's.

    Args:
        layers: (number, layer) of each MoE layer on this rank.
        layer_numbers: the numbers of all MoE layers of the model.

    Raises:
        CompatError: one is not, or there is none.
    """
    if not list(layer_numbers):
        raise CompatError(
            "--smartmoe: the model = no MoE layer: there is nothing to balance. Build it with Megatron's MoELayer, or "
            "remove --smartmoe."
        )
    for number, layer in layers:
        if not isinstance(layer, SmartMoELayer):
            raise CompatError(
                f"--smartmoe: MoE layer {number} = {_name(type(layer))}: was not built through Megatron's "
                "get_moe_module_spec_for_backend, where this project puts its layer. Pass the layer's spec through "
                "megatron_smartmoe.moe_spec(spec), or remove --smartmoe."
            )


@functools.cache
def smart_class(wanted: type[MoELayer], ours: type[SmartMoELayer]) -> type[SmartMoELayer]:
    """This project's layer, as a subclass of the user's where they have one.

    Raises:
        CompatError: the user's overrides a step that this project replaces.
    """
    if wanted is MoELayer:
        return ours
    own = [cls for cls in wanted.__mro__ if issubclass(cls, MoELayer) and cls not in MoELayer.__mro__]
    overridden = [f"{_name(cls)}.{name}" for cls in own for name in _REPLACED if name in vars(cls)]
    if overridden:
        raise CompatError(
            f"--smartmoe: a subclass of MoELayer = {', '.join(overridden)}: overrides what this project replaces. Move "
            "it out of these methods (__init__, postprocess and others may be overridden), or remove --smartmoe."
        )
    return type(f"{ours.__name__}Of{wanted.__name__}", (ours, wanted), {"__module__": __name__})


def _is_ours(spec: Any) -> bool:
    built = _built(spec)
    return isinstance(built, type) and issubclass(built, SmartMoELayer)


def _is_moe(module: object) -> TypeGuard[type[MoELayer]]:
    return isinstance(module, type) and issubclass(module, MoELayer)


def _is_heterogeneous(args: Namespace) -> bool:
    names = ("heterogeneous_layers_config_path", "heterogeneous_layers_config_encoded_json")
    return any(getattr(args, name, None) for name in names)


def _built(builder: Any) -> Any:
    """The class or function behind a submodule's spec."""
    if isinstance(builder, partial):
        return _built(builder.func)
    return _built(builder.module) if isinstance(builder, ModuleSpec) else builder


def _name(cls: Any) -> str:
    return f"{getattr(cls, '__module__', '?')}.{getattr(cls, '__qualname__', cls)}"
