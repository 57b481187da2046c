"""From bytes to documents. What cannot be read becomes a bad line with its place and reason, never an exception."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace

from megatron_smartmoe.adapter.corpus.sources import Chunk, Span, topic_text


@dataclass(frozen=True, kw_only=True)
class BadLine:
    """A line that is no document. `line` counts from 1; from the span's first line until the scan shifts it."""

    path: str
    line: int
    reason: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.reason}"


@dataclass(frozen=True, kw_only=True)
class SpanScan:
    """What one span holds: the size in UTF-8 bytes of each document, in order, and what was left out."""

    path: str
    num_lines: int
    document_bytes: tuple[int, ...]
    num_empty: int
    bad_lines: tuple[BadLine, ...]


@dataclass(frozen=True, kw_only=True)
class Scanner:
    """Look at the documents of a chunk without keeping them: `Chunk -> list[SpanScan]`, run in the workers."""

    json_keys: tuple[str, ...]

    def __call__(self, chunk: Chunk) -> list[SpanScan]:
        """One `SpanScan` per span, in order."""
        return [self._scan(span) for span in chunk]

    def _scan(self, span: Span) -> SpanScan:
        sizes: list[int] = []
        bad_lines: list[BadLine] = []
        num_lines = num_empty = 0
        for item in _read_span(span, self.json_keys):
            num_lines += 1
            if isinstance(item, BadLine):
                bad_lines.append(replace(item, line=item.line if span.kind == "text" else num_lines))
            elif not item.strip():
                num_empty += 1
            else:
                sizes.append(len(item.encode()))
        return SpanScan(
            path=span.path,
            num_lines=num_lines,
            document_bytes=tuple(sizes),
            num_empty=num_empty,
            bad_lines=tuple(bad_lines),
        )


def read_documents(chunk: Chunk, json_keys: tuple[str, ...]) -> Iterator[str]:
    """The documents of a chunk, in order; empty documents and bad lines left out."""
    for span in chunk:
        for item in _read_span(span, json_keys):
            if not isinstance(item, BadLine) and item.strip():
                yield item


def _read_span(span: Span, json_keys: tuple[str, ...]) -> Iterator[str | BadLine]:
    """One item per line of a JSON-lines span; one item for any other span. An empty line is an empty document."""
    if span.kind == "topic":
        yield topic_text(span.start)
        return
    with open(span.path, "rb") as file:
        file.seek(span.start)
        data = file.read(span.stop - span.start)
    if span.start == 0:
        data = data.removeprefix(b"\xef\xbb\xbf")  # A byte order mark says how to read the text; it is not text.
    if span.kind == "text":
        yield _decode_text(data, span.path)
        return
    for line in data.removesuffix(b"\n").split(b"\n"):
        yield _parse_json_line(line, span.path, json_keys)


def _decode_text(data: bytes, path: str) -> str | BadLine:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        return BadLine(path=path, line=line, reason=f"invalid UTF-8: {error.reason} (byte 0x{data[error.start]:02x})")


def _parse_json_line(line: bytes, path: str, json_keys: tuple[str, ...]) -> str | BadLine:
    """The document of one line, or why there is none (its line number is filled in by the caller)."""
    if not line.strip():
        return ""
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return BadLine(path=path, line=0, reason=f"invalid UTF-8: {error.reason} (byte 0x{line[error.start]:02x})")
    except (ValueError, RecursionError) as error:
        return BadLine(path=path, line=0, reason=f"invalid JSON: {error}")
    if not isinstance(record, dict):
        return BadLine(path=path, line=0, reason=f"a JSON object is needed, this is a {type(record).__name__}")
    values: list[str] = []
    for key in json_keys:
        if key not in record:
            return BadLine(path=path, line=0, reason=f"key {key!r} is missing")
        if not isinstance(record[key], str):
            kind = type(record[key]).__name__
            return BadLine(path=path, line=0, reason=f"key {key!r} holds a {kind}, a string is needed")
        values.append(record[key])
    text = "\n".join(values)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return BadLine(path=path, line=0, reason="holds half of a surrogate pair, which is not a character")
    return text
