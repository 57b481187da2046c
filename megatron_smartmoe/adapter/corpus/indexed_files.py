"""Whether the two files of an indexed dataset are whole, from their sizes and the head of the `.idx`.

Megatron maps both files into memory: one that was cut off by a full disk or a broken copy is an error in the middle of
training, or garbage. The `.idx` says how many sequences there are and where the last one ends; where data preparation
has noted the sizes (`PREFIX.json`), they must be those.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_smartmoe.adapter.corpus.spec import PreparedCorpus

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<QBQQ")  # version, code of the type, sequences, documents
_TYPES = {
    1: np.uint8,
    2: np.int8,
    3: np.int16,
    4: np.int32,
    5: np.int64,
    6: np.float64,
    7: np.float32,
    8: np.uint16,
}  # Megatron's codes
SAMPLE_BYTES = 64 * 2**20  # of the tokens that are looked at for the largest id
_SAMPLE_PARTS = 64


@dataclass(frozen=True, kw_only=True)
class Index:
    """What the head of an `.idx` says.

    Args:
        dtype: of the tokens.
        num_sequences: in the `.bin`.
        bin_bytes: where the last sequence ends.
    """

    dtype: np.dtype[np.generic]
    num_sequences: int
    bin_bytes: int


class DamagedDatasetError(ValueError):
    """A file of a dataset is not whole: its path and what is wrong with it."""

    def __init__(self, path: Path, rule: str) -> None:
        super().__init__(f"{path} {rule}")
        self.path, self.rule = path, rule


def check_files(prefix: str) -> Index:
    """Compare the sizes of `PREFIX.bin` and `PREFIX.idx` with the metadata beside them and with the `.idx`.

    Raises:
        DamagedDatasetError: a file is cut off, damaged or too long.
    """
    bin_path, idx_path = Path(f"{prefix}.bin"), Path(f"{prefix}.idx")
    noted = PreparedCorpus.load(prefix) if PreparedCorpus.is_noted(prefix) else None
    # Step 1: the sizes that data preparation noted
    if noted is not None:
        for path, size in ((idx_path, noted.idx_bytes), (bin_path, noted.bin_bytes)):
            if size is not None and path.stat().st_size != size:
                rule = f"has {path.stat().st_size:,} bytes, and {prefix}.json says {size:,}"
                raise DamagedDatasetError(path, rule)
    # Step 2: what the index says of itself and of the tokens
    index = read_index(idx_path)
    if bin_path.stat().st_size != index.bin_bytes:
        rule = f"has {bin_path.stat().st_size:,} bytes, and {idx_path} says {index.bin_bytes:,}"
        raise DamagedDatasetError(bin_path, rule)
    return index


def read_index(path: Path) -> Index:
    """The head of an `.idx`, and where its last sequence ends.

    Raises:
        DamagedDatasetError: it is no index, or is cut off.
    """
    size = path.stat().st_size
    head_bytes = len(_MAGIC) + _HEADER.size
    with path.open("rb") as file:
        head = file.read(head_bytes)
        if len(head) < head_bytes or not head.startswith(_MAGIC):
            raise DamagedDatasetError(path, "is not the index of a Megatron dataset, or is cut off")
        version, code, num_sequences, num_documents = _HEADER.unpack(head[len(_MAGIC) :])
        if version != 1 or code not in _TYPES:
            raise DamagedDatasetError(path, f"has version {version} and type {code}, which Megatron does not have")
        # A length and a place per sequence, the first sequence of each document, and perhaps a mode per sequence.
        whole = head_bytes + 12 * num_sequences + 8 * num_documents
        if size not in (whole, whole + num_sequences):
            raise DamagedDatasetError(path, f"has {size:,} bytes, and needs {whole:,} for {num_sequences:,} sequences")
        dtype = np.dtype(_TYPES[code])
        end = 0
        if num_sequences:
            file.seek(head_bytes + 4 * (num_sequences - 1))
            (length,) = struct.unpack("<i", file.read(4))
            file.seek(head_bytes + 4 * num_sequences + 8 * (num_sequences - 1))
            (start,) = struct.unpack("<q", file.read(8))
            end = start + length * dtype.itemsize
            if length < 0 or start < 0:
                raise DamagedDatasetError(path, f"places its last sequence at byte {start}, with {length} tokens")
    return Index(dtype=dtype, num_sequences=num_sequences, bin_bytes=end)


def largest_token(prefix: str, index: Index) -> int | None:
    """The largest id in a dataset: as noted, else of a sample spread over the `.bin`; None where it is empty."""
    if PreparedCorpus.is_noted(prefix):
        noted = PreparedCorpus.load(prefix).max_token_id
        if noted is not None:
            return noted
    if not index.bin_bytes:
        return None
    tokens = np.memmap(f"{prefix}.bin", dtype=index.dtype, mode="r", shape=(index.bin_bytes // index.dtype.itemsize,))
    part = SAMPLE_BYTES // _SAMPLE_PARTS // index.dtype.itemsize
    if len(tokens) <= part * _SAMPLE_PARTS:
        return int(tokens.max())
    starts = np.linspace(0, len(tokens) - part, _SAMPLE_PARTS).astype(np.int64)
    return max(int(tokens[start : start + part].max()) for start in starts.tolist())
