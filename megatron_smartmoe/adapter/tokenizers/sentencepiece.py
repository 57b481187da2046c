"""sentencepiece models: those that are trained here, and others'."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sentencepiece import SentencePieceProcessor

from megatron_smartmoe.adapter.tokenizers.base import SENTENCEPIECE, SpecialToken, TokenizerFacts
from megatron_smartmoe.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class SentencePieceTextTokenizer:
    """A sentencepiece model: `TextTokenizer`. It pickles as its model file."""

    processor: SentencePieceProcessor
    path: Path

    @property
    def facts(self) -> TokenizerFacts:
        """Its ids, which Megatron's SentencePieceTokenizer takes from the model too."""
        model = self.processor
        return TokenizerFacts(
            kind=SENTENCEPIECE,
            path=self.path,
            vocab_size=model.get_piece_size(),
            bos=_special(model, model.bos_id()),
            eod=_special(model, model.eos_id()),
            pad=_special(model, model.pad_id()),
        )

    def encode(self, text: str, *, is_chat: bool = False) -> list[int]:
        """Ids of one document."""
        ids: list[int] = self.processor.encode(text)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids."""
        return str(self.processor.decode(list(ids)))


def load_sentencepiece(model: bytes, path: Path, option: str = "--tokenizer-model") -> SentencePieceTextTokenizer:
    """Load a model and check that Megatron can end documents with it.

    Args:
        model: the content of the file.
        path: the file.
        option: the flag that named it.

    Raises:
        ConfigError: not a sentencepiece model, or one without `eos`.
    """
    processor = SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(model)
    except RuntimeError as error:
        way_out = "Give a tokenizer: a sentencepiece .model, a folder with tokenizer.json, or a tiktoken file."
        raise ConfigError(option, str(path), "is not a sentencepiece model", way_out) from error
    if processor.eos_id() < 0:
        rule = "has no end-of-sentence id (eos_id), which Megatron uses as end of document"
        way_out = "Train the model with an eos_id; scripts/prepare_data.py --vocab-size N trains one."
        raise ConfigError(option, str(path), rule, way_out)
    return SentencePieceTextTokenizer(processor=processor, path=path)


def _special(model: SentencePieceProcessor, token: int) -> SpecialToken | None:
    return SpecialToken(text=model.id_to_piece(token), id=token) if token >= 0 else None
