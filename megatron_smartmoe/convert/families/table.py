"""A model as a table: Megatron's flags, its parameters, and the tensors of the other format that hold them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from megatron_smartmoe.convert.hf_config import HFConfig
from megatron_smartmoe.convert.packing import Parameter, Segment, whole

type FlagValue = str | int | float | bool | list[int]


@dataclass(kw_only=True)
class ModelTable:
    """What a config.json says, for Megatron.

    Attributes:
        family: name of the family.
        config: the config.json.
        num_layers: layers of the model, without those that predict further tokens (MTP).
        num_experts: experts of a layer; None for a dense model.
        expert_layers: whether each layer has experts.
        vocab_size: rows of the embedding.
        flags: Megatron's flags without dashes, True for one that stands alone.
        parameters: all parameters.
        shapes: the tensors of the Hugging Face format that hold them.
        copies: tensors that may be there and hold what another one holds: name to name.
        ignored: pattern of tensors that may be there and hold no parameter.
        mtp_layers: layers that predict further tokens.
    """

    family: str
    config: HFConfig
    num_layers: int
    num_experts: int | None
    expert_layers: tuple[bool, ...]
    vocab_size: int
    flags: dict[str, FlagValue] = field(default_factory=dict)
    parameters: list[Parameter] = field(default_factory=list)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    copies: dict[str, str] = field(default_factory=dict)
    ignored: re.Pattern[str] = re.compile(r".*\.rotary_emb\.inv_freq")
    mtp_layers: int = 0

    def add(
        self,
        name: str,
        shape: Sequence[int],
        tensors: Mapping[str, Sequence[int]] | str,
        segments: Sequence[Segment] | None = None,
        *,
        expert: int | None = None,
        is_float32: bool = False,
    ) -> None:
        """Add a parameter.

        Args:
            name: with the layer's number.
            shape: of the parameter.
            tensors: name and shape of each tensor that holds it, or the name of the one of its own shape.
            segments: its rows; the only tensor as it is without them.
            expert: logical expert; None for a parameter of no expert.
            is_float32: whether Megatron keeps it in float32.
        """
        if isinstance(tensors, str):
            tensors = {tensors: shape}
        if segments is None:
            (only,) = tensors
            segments = whole(only, shape[0])
        for tensor, of_tensor in tensors.items():
            self.shapes[tensor] = tuple(of_tensor)
        self.parameters.append(
            Parameter(name=name, expert=expert, shape=tuple(shape), segments=tuple(segments), is_float32=is_float32)
        )
