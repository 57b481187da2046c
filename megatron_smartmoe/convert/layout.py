"""Keys of a torch_dist checkpoint: how Megatron 0.19 stacks the parameters of a model.

Where all layers are of one kind, a parameter of all of them is one tensor, `decoder.layers.mlp.router.weight [L, E, H]`
(`TransformerBlock.sharded_state_dict`); otherwise each layer has keys of its own. All experts of a layer are one tensor
either way. Norms are named after the linear layer behind them where Megatron's layer spec fuses the two, which differs
between its local and its TransformerEngine spec.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

type Spec = Literal["local", "te"]
SPECS: tuple[Spec, ...] = ("local", "te")

_LAYER = re.compile(r"^(decoder|mtp)\.layers\.(\d+)\.(?:transformer_layer\.)?")
_INPUT_NORM = "self_attention.linear_qkv.layer_norm_weight"
_MLP_NORM = "mlp.linear_fc1.layer_norm_weight"
_LATENT_NORMS = {
    "self_attention.q_layernorm.weight": "self_attention.linear_q_up_proj.layer_norm_weight",
    "self_attention.kv_layernorm.weight": "self_attention.linear_kv_up_proj.layer_norm_weight",
}
# Modules with an `_extra_state`: Megatron's linear layers, and TransformerEngine's linear layers and norms.
_LINEAR = re.compile(r"\.(?:linear_\w+|eh_proj)\.weight$")
_LINEAR_OR_NORM = re.compile(r"\.(?:linear_\w+|eh_proj|\w*layernorm|enorm|hnorm)\.weight$")


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a parameter is in a torch_dist checkpoint.

    Attributes:
        key: of the tensor.
        index: in the tensor's first axes: layer and expert, as far as they are stacked.
        sizes: of those axes.
    """

    key: str
    index: tuple[int, ...]
    sizes: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How a model's parameters are stacked.

    Attributes:
        num_layers: of the model.
        expert_layers: whether each has experts.
        num_experts: of a layer with experts; 0 without any.
        has_latent_attention: whether attention is multi-latent (MLA).
        spec: local or te.
    """

    num_layers: int
    expert_layers: tuple[bool, ...]
    num_experts: int
    has_latent_attention: bool
    spec: Spec

    @property
    def is_stacked(self) -> bool:
        """Whether a parameter of all layers is one tensor."""
        return len(set(self.expert_layers)) <= 1

    def place(self, name: str, expert: int | None) -> Place:
        """Where a parameter is.

        Args:
            name: of `checkpoint.names`, with the layer's number.
            expert: logical expert; None for a parameter of no expert.
        """
        index, sizes = [], []
        found = _LAYER.match(name)
        key = name
        if found is not None:
            number, inner = int(found[2]), name[found.end() :]
            has_experts = self.expert_layers[number] if found[1] == "decoder" else True
            inner = self.inner_name(inner, has_experts=has_experts)
            key = f"{found[0]}{inner}"
            if self.is_stacked and found[1] == "decoder":
                key = f"decoder.layers.{inner}"
                index.append(number)
                sizes.append(self.num_layers)
        if expert is not None:
            key = key.replace(".mlp.experts.", ".mlp.experts.experts.")
            index.append(expert)
            sizes.append(self.num_experts)
        return Place(key=key, index=tuple(index), sizes=tuple(sizes))

    def inner_name(self, name: str, *, has_experts: bool) -> str:
        """A parameter's name inside its layer, as checkpoints of the layer spec have it."""
        is_te = self.spec == "te"
        if name == _INPUT_NORM and self.has_latent_attention:
            return "input_layernorm.weight"
        if name == _MLP_NORM and (has_experts if is_te else self.has_latent_attention):
            return "pre_mlp_layernorm.weight"
        return _LATENT_NORMS.get(name, name) if is_te and self.has_latent_attention else name

    def saved_name(self, name: str) -> str:
        """The name that a parameter of this checkpoint has in `checkpoint.names`."""
        return with_spec(name) if self.spec == "te" and self.has_latent_attention else name


def has_extra_state(name: str, spec: Spec) -> bool:
    """Whether the module of a weight has an `_extra_state` when Megatron loads, by the end of the weight's name."""
    return (_LINEAR if spec == "local" else _LINEAR_OR_NORM).search(name) is not None


def extra_states(places: Sequence[Place], spec: Spec) -> Iterator[str]:
    """Keys of the empty `_extra_state` objects that modules ask for when Megatron loads.

    Args:
        places: of the parameters.
        spec: local or te.
    """
    seen: set[str] = set()
    for place in places:
        if not has_extra_state(place.key, spec):
            continue
        index, sizes = place.index or (0,), place.sizes or (1,)
        shard = f"{'.'.join(map(str, index))}_{'.'.join(map(str, sizes))}"
        key = f"{place.key.removesuffix('weight')}_extra_state/shard_{shard}"
        if key not in seen:
            seen.add(key)
            yield key


def with_spec(name: str) -> str:
    """The reverse of `without_spec`, for multi-latent attention of TransformerEngine's spec."""
    for local, fused in _LATENT_NORMS.items():
        name = name.replace(local, fused)
    return name


def without_spec(name: str) -> str:
    """A parameter's name as the local spec has it, whichever spec saved it."""
    for local, fused in _LATENT_NORMS.items():
        name = name.replace(fused, local)
    return name


def layout_of(arguments: Mapping[str, object], spec: Spec) -> Layout:
    """The layout of the model that a run's arguments describe."""
    num_layers, num_experts = int(str(arguments["num_layers"])), int(str(arguments.get("num_experts") or 0))
    frequency = arguments.get("moe_layer_freq") or 1
    if num_experts == 0:
        pattern = [False] * num_layers
    elif isinstance(frequency, list):
        pattern = [bool(has) for has in frequency]
    else:
        pattern = [number % int(str(frequency)) == 0 for number in range(num_layers)]
    return Layout(
        num_layers=num_layers,
        expert_layers=tuple(pattern),
        num_experts=num_experts,
        has_latent_attention=bool(arguments.get("multi_latent_attention")),
        spec=spec,
    )
