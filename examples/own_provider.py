"""A model provider of one's own, and a group of flags, as forks of Megatron-LM have them.

The provider asks Megatron for its layers, so the first two lines are all that is needed.
"""

from __future__ import annotations

import megatron_smartmoe

megatron_smartmoe.enable()

import argparse
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.training import get_args
from megatron.training.arguments import core_transformer_config_from_args
from mock_gpt import train


def add_own_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """The fork's own flags."""
    group = parser.add_argument_group("our lab")
    group.add_argument("--embedding-gain", type=float, default=1.0, help="Multiply the initial embeddings by this.")
    return parser


def model_provider(pre_process: bool = True, post_process: bool = True, **placement: Any) -> Any:
    """The model of one pipeline stage."""
    args = get_args()
    config = core_transformer_config_from_args(args)
    model: Any = GPTModel(
        config=config,
        transformer_layer_spec=get_gpt_decoder_block_spec(
            config,
            use_transformer_engine=args.transformer_impl == "transformer_engine",
            normalization=args.normalization,
        ),
        vocab_size=args.padded_vocab_size,
        max_sequence_length=args.max_position_embeddings,
        pre_process=pre_process,
        post_process=post_process,
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        position_embedding_type=args.position_embedding_type,
    )
    with torch.no_grad():
        model.embedding.word_embeddings.weight.mul_(args.embedding_gain)
    return model


if __name__ == "__main__":
    train(model_provider, add_own_arguments)
