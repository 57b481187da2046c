"""What an input file holds, found by its first bytes and its name; nothing is read twice for it.

Content beats the name, because names lie: a `.jsonl` may be gzipped, a `.json` may hold lines or an array. The name
decides only what bytes cannot: whether braces are JSON records or the text itself.
"""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import re
import zlib
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

import zstandard

from megatron_smartmoe.errors import ConfigError, one_line

HEAD_BYTES = 64 * 1024
PIECE_BYTES = 2**20
JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
PARQUET_SUFFIXES = (".parquet", ".pq")
PACKED_SUFFIXES = {".gz": "gzip", ".zst": "zstd", ".zstd": "zstd", ".xz": "xz", ".bz2": "bzip2"}
_OTHER_ARCHIVES = {b"PK\x03\x04": "a zip archive", b"7z\xbc\xaf\x27\x1c": "a 7z archive"}
# The longer mark first: UTF-32's begins with UTF-16's.
_MARKS = {b"\xff\xfe\x00\x00": "utf-32", b"\x00\x00\xfe\xff": "utf-32", b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}

type Packing = Literal["gzip", "zstd", "xz", "bzip2"]
type Content = Literal["text", "lines", "values", "parquet"]


@dataclass(frozen=True, kw_only=True)
class Format:
    """What a file holds.

    Args:
        packing: how it is compressed, or None.
        encoding: of its text.
        content: one document; a JSON record per line; an array of records, or records over several lines; or a table.
    """

    packing: Packing | None
    encoding: Literal["utf-8", "utf-16", "utf-32"]
    content: Content

    @property
    def is_read_in_place(self) -> bool:
        """Whether the file can be cut and read as it is: UTF-8, and lines or one document."""
        return self.packing is None and self.encoding == "utf-8" and self.content in ("text", "lines")


def format_of(path: Path) -> Format:
    """Look at the beginning of a file.

    Raises:
        ConfigError: it is damaged, of a kind that cannot be read, or not what its name says.
    """
    head = _read_head(path)
    packing = _packing(head)
    suffixes = [suffix.lower() for suffix in path.suffixes]
    named = PACKED_SUFFIXES.get(suffixes[-1]) if suffixes else None
    if named is not None:
        suffixes.pop()
        if packing is None and head:
            raise _wrong(path, f"is named as {named} and is not compressed so", "Rename it, or compress it again.")
    if packing is not None:
        head = _unpacked_head(path, packing)
    for magic, name in _OTHER_ARCHIVES.items():
        if head.startswith(magic):
            raise _wrong(path, f"is {name}, which is not read", "Unpack it, and give the files that were in it.")
    suffix = suffixes[-1] if suffixes else ""
    if head.startswith(b"PAR1"):
        if packing is not None:
            raise _wrong(path, f"is a parquet file inside {packing}", "Unpack it.")
        return Format(packing=None, encoding="utf-8", content="parquet")
    if suffix in PARQUET_SUFFIXES:
        raise _wrong(path, "is named as parquet and is none", "Rename it, or write it again.")
    encoding = _encoding(path, head)
    return Format(packing=packing, encoding=encoding, content=_content(suffix, head, encoding))


def unpacked(path: Path, packing: Packing | None) -> Generator[bytes, None, None]:
    """The bytes of a file, decompressed, in pieces.

    Raises:
        ConfigError: the compressed data is damaged or ends too early.
    """
    try:
        with path.open("rb") as file:
            yield from _pieces(file, packing)
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile, zstandard.ZstdError) as error:
        raise _damaged(path, packing, error) from error
    except OSError as error:
        if packing != "bzip2" or error.errno is not None:  # bz2 has no error of its own for damaged data
            raise
        raise _damaged(path, packing, error) from error


def is_json_lines_in_disguise(path: Path, file_format: Format) -> bool:
    """Whether a file that counts as one document begins with two lines that are JSON objects."""
    if file_format.content != "text" or file_format.encoding != "utf-8":
        return False
    head = _read_head(path) if file_format.packing is None else _unpacked_head(path, file_format.packing)
    lines = head.splitlines()[:2]
    return len(lines) == 2 and all(_is_json_object(line) for line in lines)


def _is_json_object(line: bytes) -> bool:
    try:
        return line.startswith(b"{") and isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _read_head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(HEAD_BYTES)


def _packing(head: bytes) -> Packing | None:
    if head.startswith(b"\x1f\x8b\x08"):
        return "gzip"
    if head.startswith(b"\x28\xb5\x2f\xfd") or re.match(rb"[\x50-\x5f]\x2a\x4d\x18", head):  # or a skippable frame
        return "zstd"
    if head.startswith(b"\xfd7zXZ\x00"):
        return "xz"
    if re.match(rb"BZh[1-9](1AY&SY|\x17\x72\x45\x38\x50\x90)", head):
        return "bzip2"
    return None


def _unpacked_head(path: Path, packing: Packing) -> bytes:
    head = b""
    with closing(unpacked(path, packing)) as pieces:
        for piece in pieces:
            head += piece[: HEAD_BYTES - len(head)]
            if len(head) >= HEAD_BYTES:
                break
    return head


def _pieces(file: IO[bytes], packing: Packing | None) -> Iterator[bytes]:
    if packing == "zstd":
        yield from _zstd_pieces(file)
        return
    openers: dict[str | None, Callable[[Any], Any]] = {
        "gzip": gzip.open,
        "xz": lzma.open,
        "bzip2": bz2.open,
    }
    opened: IO[bytes] = openers[packing](file) if packing in openers else file
    while piece := opened.read(PIECE_BYTES):
        yield piece


def _zstd_pieces(file: IO[bytes]) -> Iterator[bytes]:
    """Frame after frame; the library's own reader takes the end of the file for the end of a frame.

    A frame's header asks for memory, its window; the library refuses more than 128 MiB.
    """
    decompressor, frame = zstandard.ZstdDecompressor(), None
    while data := file.read(PIECE_BYTES):
        while data:
            frame = frame if frame is not None else decompressor.decompressobj()
            piece = frame.decompress(data)
            if piece:
                yield piece
            data = b""
            if frame.eof:
                data, frame = frame.unused_data, None
    if frame is not None:
        raise EOFError("the last frame ends before its end")


def _encoding(path: Path, head: bytes) -> Literal["utf-8", "utf-16", "utf-32"]:
    for mark, encoding in _MARKS.items():
        if head.startswith(mark):
            return "utf-16" if encoding == "utf-16" else "utf-32"
    # Text in UTF-16 is mostly Latin letters, whose other byte is zero; text in UTF-8 has none.
    even, odd = head[0::2], head[1::2]
    for order, zeros, others in (("LE", odd, even), ("BE", even, odd)):
        if len(head) >= 4 and zeros.count(0) > 0.4 * len(zeros) and others.count(0) < 0.1 * len(others):
            rule = f"looks like UTF-16{order} without a byte order mark"
            raise _wrong(path, rule, f"Convert it: iconv -f UTF-16{order} -t UTF-8 < {path.name} > utf8-{path.name}.")
    return "utf-8"


def _content(suffix: str, head: bytes, encoding: str) -> Content:
    if suffix not in JSON_SUFFIXES:
        return "text"
    text = head.decode(encoding, errors="replace").removeprefix("\ufeff").lstrip()
    if text.startswith("["):
        # An array, except where the first line is one that is whole and followed by other values.
        first, _, rest = text.partition("\n")
        return "lines" if _is_json(first) and rest.strip() else "values"
    if not text.startswith("{"):
        return "lines"
    first_line = text.splitlines()[0].strip()
    if _is_json(first_line):
        return "lines"
    try:
        _, end = json.JSONDecoder().raw_decode(text)
    except (ValueError, RecursionError):
        # A record over several lines that is longer than the head, or a damaged line.
        return "values" if first_line == "{" and len(head) == HEAD_BYTES else "lines"
    return "values" if "\n" in text[:end] or "\r" in text[:end] else "lines"


def _is_json(line: str) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _damaged(path: Path, packing: str | None, error: Exception) -> ConfigError:
    return _wrong(path, f"is {packing} data that is damaged or cut off ({one_line(error)})", "Get the file again.")


def _wrong(path: Path, rule: str, way_out: str) -> ConfigError:
    return ConfigError("--input", str(path), rule, way_out)
