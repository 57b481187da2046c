"""Small corpora, and reading a dataset back the way Megatron does."""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from sentencepiece import SentencePieceProcessor

from megatron_smartmoe.adapter.corpus import CorpusSpec, PreparedCorpus

VOCAB_SIZE = 340


def texts(count: int, first: int = 0) -> list[str]:
    """Documents that differ, with code's whitespace and characters of one to four bytes."""
    return [
        f"def function_{index}(x):\n\treturn x + {index * 7919}  # groß {chr(0x4E00 + index % 4)} 😀\n\n  {index}\r\n"
        for index in range(first, first + count)
    ]


def write_jsonl(path: Path, documents: list[Any], key: str = "text") -> Path:
    """One JSON object per line; a document that is bytes goes in as the line itself."""
    lines = [item if isinstance(item, bytes) else json.dumps({key: item}).encode() for item in documents]
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return path


def spec_for(prefix: Path, *inputs: Path | str, **changes: Any) -> CorpusSpec:
    """A request with a small vocabulary, one worker and no progress bar."""
    options: dict[str, Any] = {"vocab_size": VOCAB_SIZE, "workers": 1, "quiet": True} | changes
    return CorpusSpec(output_prefix=prefix, inputs=tuple(str(path) for path in inputs), **options)


def read_back(prefix: Path) -> list[np.ndarray]:
    """Every document's tokens, through Megatron's own reader."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    dataset = IndexedDataset(str(prefix))
    assert len(dataset) == len(dataset.document_indices) - 1
    # Copies: what the dataset returns lies in its memory map, which goes when the dataset goes.
    return [dataset[index].copy() for index in range(len(dataset))]


def decode(corpus: PreparedCorpus) -> list[str]:
    """Every document's text, the closing eod taken off."""
    processor = SentencePieceProcessor(model_file=str(corpus.tokenizer_model))
    documents = [tokens.tolist() for tokens in read_back(corpus.prefix)]
    assert all((tokens[-1] == corpus.eod_id) == corpus.append_eod for tokens in documents)
    return [processor.decode(tokens[:-1] if corpus.append_eod else tokens) for tokens in documents]


def write_indexed_files(prefix: Path, documents: Sequence[Sequence[int]]) -> None:
    """The two files of an indexed dataset with uint16 tokens, as Megatron's builder writes them, and no metadata."""
    lengths = [len(document) for document in documents]
    starts = [2 * sum(lengths[:index]) for index in range(len(documents))]
    head = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 8, len(documents), len(documents) + 1)
    parts = [(lengths, np.int32), (starts, np.int64), (range(len(documents) + 1), np.int64)]
    tail = b"".join(np.array(values, dtype=dtype).tobytes() for values, dtype in parts)
    Path(f"{prefix}.idx").write_bytes(head + tail)
    Path(f"{prefix}.bin").write_bytes(np.array([i for document in documents for i in document], np.uint16).tobytes())


def files(folder: Path) -> set[str]:
    """Names of everything below a folder."""
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}
