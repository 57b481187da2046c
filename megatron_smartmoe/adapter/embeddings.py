"""Which pipeline stages hold the word embedding; Megatron asks the entry script for it."""

from __future__ import annotations

from megatron.core.transformer.multi_token_prediction import get_mtp_ranks
from megatron.training import get_args
from megatron.training.argument_utils import core_transformer_config_from_args


def embedding_ranks(pp_ranks: list[int]) -> list[int]:
    """Ranks of one pipeline group with the embedding: the first, the last when it is tied, and those of MTP layers."""
    ranks = {pp_ranks[0]}
    if len(pp_ranks) > 1:
        args = get_args()
        if not args.untie_embeddings_and_output_weights:
            ranks.add(pp_ranks[-1])
        ranks.update(get_mtp_ranks(pp_ranks, core_transformer_config_from_args(args)))
    return sorted(ranks)
