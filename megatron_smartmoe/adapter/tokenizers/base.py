"""What every tokenizer is to this project: text to ids and back, and the facts that data and training must share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

SENTENCEPIECE, HUGGING_FACE, TIKTOKEN, GPT2, NULL = (
    "SentencePieceTokenizer",
    "HuggingFaceTokenizer",
    "TikTokenizer",
    "GPT2BPETokenizer",
    "NullTokenizer",
)  # values of Megatron's --tokenizer-type


@dataclass(frozen=True, kw_only=True)
class SpecialToken:
    """A token that is no text: its name in the vocabulary and its id."""

    text: str
    id: int

    def __str__(self) -> str:
        return f"{self.text} {self.id}"


@dataclass(frozen=True, kw_only=True)
class TokenizerFacts:
    """What a tokenizer is, without its vocabulary.

    Args:
        kind: Megatron's --tokenizer-type.
        path: Megatron's --tokenizer-model; None for the null tokenizer.
        vocab_size: entries, added tokens included, before Megatron pads it.
        bos: begin of text; None where the tokenizer has none.
        eod: ends documents (the tokenizer's end-of-text token); None where it has none.
        pad: padding, which Megatron leaves out of the loss; None where it has none.
        note: how something was found that the files do not say; empty where they say all.
    """

    kind: str
    path: Path | None
    vocab_size: int
    bos: SpecialToken | None = None
    eod: SpecialToken | None = None
    pad: SpecialToken | None = None
    note: str = ""

    def line(self) -> str:
        """One line about it, for people."""
        pad = str(self.pad or "none")
        if self.pad is not None and self.pad == self.eod:
            pad += " (the same, so padding is not left out of the loss)"
        place = "" if self.path is None else f" {self.path}"
        note = f"; {self.note}" if self.note else ""
        return (
            f"{self.kind}{place}: {self.vocab_size:,} entries, bos {self.bos or 'none'}, "
            f"eod {self.eod or 'none'}, pad {pad}{note}"
        )


class TextTokenizer(Protocol):
    """A tokenizer that text is prepared with. It is sent to worker processes."""

    @property
    def facts(self) -> TokenizerFacts:
        """What it is."""

    def encode(self, text: str, *, is_chat: bool = False) -> list[int]:
        """Ids of one document, without the closing eod.

        Args:
            text: the document.
            is_chat: a chat template wrote it, so that no special tokens are added to those in the text.
        """

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids."""
