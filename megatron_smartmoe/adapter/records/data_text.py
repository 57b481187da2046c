"""The beginning of the training data as text: whether tokenizer and data belong together is seen at a glance."""

from __future__ import annotations

from argparse import Namespace

from megatron_smartmoe.adapter.flags.data_checks import data_prefixes
from megatron_smartmoe.adapter.tokenizers.base import NULL
from megatron_smartmoe.adapter.tokenizers.load import facts_of

NUM_TOKENS = 64


def tokenizer_line(args: Namespace) -> str | None:
    """The tokenizer with its special tokens in one line; None where only Megatron knows them."""
    facts = facts_of(args)
    return None if facts is None else facts.line()


def first_text(args: Namespace) -> str | None:
    """The first tokens of the first dataset, decoded by the tokenizer of this run.

    Args:
        args: Megatron's arguments; its tokenizer is built.

    Returns:
        The text, or None where the data are no text or not on this machine.
    """
    from megatron.core.datasets.indexed_dataset import IndexedDataset
    from megatron.training import get_tokenizer

    prefixes = [prefix for _, prefix in data_prefixes(args) if "://" not in prefix]
    if not prefixes or args.mock_data or args.tokenizer_type == NULL:
        return None
    dataset = IndexedDataset(prefixes[0])
    if not len(dataset):
        return None
    tokens = dataset.get(0, 0, min(NUM_TOKENS, int(dataset.sequence_lengths[0])))
    return str(get_tokenizer().detokenize(tokens.tolist()))
