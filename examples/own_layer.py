"""A layer spec made by hand, with a subclass of Megatron's MoE layer.

Nobody asks Megatron for the MoE layer here, so its spec goes through `moe_spec`. The subclass may add parameters and
change what comes out of the layer; a subclass that overrides `forward`, `route` or the dispatch is refused by name.
"""

from __future__ import annotations

import megatron_smartmoe

megatron_smartmoe.enable()

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.training import get_args
from megatron.training.arguments import core_transformer_config_from_args
from mock_gpt import train


class GainedMoELayer(MoELayer):
    """Megatron's MoE layer with a learned gain on its output."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        self.gain = torch.nn.Parameter(torch.ones(config.hidden_size))

    def postprocess(self, output: torch.Tensor, shared_expert_output: torch.Tensor | None) -> torch.Tensor:
        """Megatron's, and the gain."""
        result: torch.Tensor = super().postprocess(output, shared_expert_output)
        return result * self.gain


def layer_spec(normalization: str) -> ModuleSpec:
    """A dense layer's spec with the MoE layer in place of its MLP."""
    submodules = MoESubmodules(experts=LocalSpecProvider().grouped_mlp_modules(False))
    dense = get_gpt_layer_local_spec(normalization=normalization)
    moe = megatron_smartmoe.moe_spec(partial(GainedMoELayer, submodules=submodules))
    return replace(dense, submodules=replace(dense.submodules, mlp=moe))


def model_provider(pre_process: bool = True, post_process: bool = True, **placement: Any) -> torch.nn.Module:
    """The model of one pipeline stage."""
    args = get_args()
    model: torch.nn.Module = GPTModel(
        config=core_transformer_config_from_args(args),
        transformer_layer_spec=layer_spec(args.normalization),
        vocab_size=args.padded_vocab_size,
        max_sequence_length=args.max_position_embeddings,
        pre_process=pre_process,
        post_process=post_process,
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        position_embedding_type=args.position_embedding_type,
    )
    return model


if __name__ == "__main__":
    train(model_provider)
