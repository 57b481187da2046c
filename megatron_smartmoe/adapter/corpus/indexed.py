"""Tokenize in workers, write with Megatron's own IndexedDatasetBuilder in the parent."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron_smartmoe.adapter import log_filters
from megatron_smartmoe.adapter.corpus.documents import read_documents
from megatron_smartmoe.adapter.corpus.records import Document, RecordReader
from megatron_smartmoe.adapter.corpus.sources import SpanGroup
from megatron_smartmoe.adapter.tokenizers.base import TextTokenizer

# sentencepiece's memory is about 65 bytes per character of one call, and its time grows faster than the text.
LONG_DOCUMENT_CHARACTERS = 2**20
PART_CHARACTERS = 2**16


@dataclass(frozen=True, kw_only=True)
class EncodedGroup:
    """Tokens of one group's documents.

    Args:
        tokens: int32 [T], the documents one after another, eod included.
        lengths: int32 [D], tokens of each document.
        text_bytes: UTF-8 bytes of the documents.
        digests: sha256 of each document's text, 32 bytes each, one after another.
        num_inner_eod: how often the end-of-document id is inside a document, because its text spells that token.
    """

    tokens: NDArray[np.int32]
    lengths: NDArray[np.int32]
    text_bytes: int
    digests: bytes
    num_inner_eod: int


@dataclass(frozen=True, kw_only=True)
class Encoder:
    """Tokenize the first documents of a group: `(SpanGroup, number of documents) -> EncodedGroup`, run in the workers.

    Args:
        tokenizer: text to ids; pickles as its model.
        eod_id: the end-of-document id.
        append_eod: whether every document ends with it; one that the tokenizer has already ended is left as it is.
        reader: reads documents out of JSON records.
        newline_splits: whether a text may be cut at a newline without changing its tokens, because newline is a piece
            that merges with nothing. True for the tokenizers trained here; others may not have this property.
    """

    tokenizer: TextTokenizer
    eod_id: int
    append_eod: bool
    reader: RecordReader
    newline_splits: bool

    def __call__(self, item: tuple[SpanGroup, int]) -> EncodedGroup:
        """Read and tokenize. Bad lines were reported by the first pass and are left out here."""
        group, num_documents = item
        tokens: list[int] = []
        lengths: list[int] = []
        digests: list[bytes] = []
        text_bytes = num_inner_eod = 0
        for document in islice(read_documents(group, self.reader), num_documents):
            ids = self.encode(document)
            tokens.extend(ids)
            lengths.append(len(ids))
            num_inner_eod += ids[:-1].count(self.eod_id)
            data = document.text.encode()
            text_bytes += len(data)
            digests.append(hashlib.sha256(data).digest())
        return EncodedGroup(
            tokens=np.array(tokens, dtype=np.int32),
            lengths=np.array(lengths, dtype=np.int32),
            text_bytes=text_bytes,
            digests=b"".join(digests),
            num_inner_eod=num_inner_eod,
        )

    def encode(self, document: Document) -> list[int]:
        """Token ids of one document, eod included."""
        text = document.text
        parts = _line_parts(text) if self.newline_splits and len(text) > LONG_DOCUMENT_CHARACTERS else [text]
        ids = [token for part in parts for token in self.tokenizer.encode(part, is_chat=document.is_chat)]
        if self.append_eod and (not ids or ids[-1] != self.eod_id):
            ids.append(self.eod_id)
        return ids


@dataclass(frozen=True, kw_only=True)
class Totals:
    """What was written. `token_counts` is int64 [V]; `sha256` is over the documents' hashes in order, in hex."""

    num_documents: int
    text_bytes: int
    token_counts: NDArray[np.int64]
    num_inner_eod: int
    sha256: str


def write_indexed(encoded: Iterable[EncodedGroup], bin_path: Path, idx_path: Path, vocab_size: int) -> Totals:
    """Write all groups, in order, as one Megatron indexed dataset: a sequence and a document per text.

    Raises:
        OSError: the disk is full or fails; the caller removes what was written.
    """
    groups = iter(encoded)
    # The first group starts the workers, which keep tokenizing during the seconds that Megatron's import takes.
    first = list(islice(groups, 1))
    log_filters.install()  # warnings that TransformerEngine, apex or a GPU are missing mean nothing here
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(str(bin_path), dtype=DType.optimal_dtype(vocab_size))
    token_counts = np.zeros(vocab_size, dtype=np.int64)
    documents_hash = hashlib.sha256()
    num_documents = text_bytes = num_inner_eod = 0
    try:
        for group in chain(first, groups):
            ends = np.cumsum(group.lengths)
            for stop, length in zip(ends.tolist(), group.lengths.tolist(), strict=True):
                builder.add_document(group.tokens[stop - length : stop], [length])
            token_counts += np.bincount(group.tokens, minlength=vocab_size)
            documents_hash.update(group.digests)
            num_documents += len(group.lengths)
            text_bytes += group.text_bytes
            num_inner_eod += group.num_inner_eod
        builder.finalize(str(idx_path))
    finally:
        builder.data_file.close()
    return Totals(
        num_documents=num_documents,
        text_bytes=text_bytes,
        token_counts=token_counts,
        num_inner_eod=num_inner_eod,
        sha256=documents_hash.hexdigest(),
    )


def entropy_nats(counts: NDArray[np.int64]) -> float:
    """Entropy of the distribution that `counts` [V] describe, nats."""
    shares = counts[counts > 0] / counts.sum()
    return -math.fsum((shares * np.log(shares)).tolist())


def _line_parts(text: str) -> Iterable[str]:
    """Cut a text at line ends into parts of about PART_CHARACTERS; together they are the text."""
    start = 0
    while start < len(text):
        newline = text.find("\n", start + PART_CHARACTERS)
        stop = len(text) if newline < 0 else newline + 1
        yield text[start:stop]
        start = stop
