"""Megatron's TikTokenizer for the files that people have, and with the number of entries that the file has.

Megatron's class reads its own JSON list only, and cuts a file to 131,072 entries or fails in an assertion if it has
fewer. The ids are its own: special tokens first, then the entries by rank.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron.core.tokenizers.text.libraries.tiktoken_tokenizer import TikTokenTokenizer

from megatron_smartmoe.adapter.tokenizers.tiktoken import entries, read_ranks


class CompleteTikTokenizer(TikTokenTokenizer):
    """Megatron's class, with the size of the vocabulary taken from the file unless it is given."""

    def __init__(
        self, tokenizer_path: str, *, num_special_tokens: int = 1000, vocab_size: int | None = None, **options: Any
    ) -> None:
        size = entries(len(read_ranks(Path(tokenizer_path))), num_special_tokens, vocab_size)
        super().__init__(tokenizer_path, num_special_tokens=num_special_tokens, vocab_size=size, **options)


def around_reload(megatrons: Callable[..., dict[bytes, int]]) -> Callable[..., dict[bytes, int]]:
    """Wrap the function that reads a vocabulary: it reads either kind of file."""

    def reload(path: str, max_vocab: int | None = None, num_special_tokens: int | None = None) -> dict[bytes, int]:
        first = num_special_tokens or 0
        return {token: first + rank for rank, token in enumerate(read_ranks(Path(path))[:max_vocab])}

    return reload
