"""From bytes to documents, and the first pass over them.

A line that is no document becomes a `BadLine` with its place and reason, never an exception. The first pass looks at
every line before anything is written, and fixes which documents belong to the corpus.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial

from megatron_smartmoe.adapter.corpus.sources import Span, SpanGroup, group_spans, topic_text
from megatron_smartmoe.adapter.corpus.spec import CorpusSpec
from megatron_smartmoe.adapter.corpus.workers import ordered_map
from megatron_smartmoe.errors import ConfigError

logger = logging.getLogger(__name__)

MAX_LISTED_BAD_LINES = 20
# Reading is quick: starting a process pays off for this many groups of spans, about 16 MB.
SCANNED_GROUPS_PER_WORKER = 32


@dataclass(frozen=True, kw_only=True)
class BadLine:
    """A line that is no document. `line` counts from 1: in the span as it is read, in the file as it is reported."""

    path: str
    line: int
    reason: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.reason}"


@dataclass(frozen=True, kw_only=True)
class SpanScan:
    """What one span holds: the size in UTF-8 bytes of each document, in order, and what was left out."""

    num_lines: int
    document_bytes: tuple[int, ...]
    num_empty: int
    bad_lines: tuple[BadLine, ...]


@dataclass(kw_only=True)
class Scan:
    """What the first pass found; complete when `scan_documents` returns it.

    Args:
        groups: groups of spans, each with the number of its documents, from its first, that belong to the corpus.
        num_documents, text_bytes: size of the corpus.
        full: whether a document was left out because of `max_bytes`; all behind it are too.
        num_empty, num_bad_lines: left out, up to the group in which the corpus ends.
        bad_lines: the first MAX_LISTED_BAD_LINES of them.
    """

    groups: list[tuple[SpanGroup, int]] = field(default_factory=list)
    num_documents: int = 0
    text_bytes: int = 0
    full: bool = False
    num_empty: int = 0
    num_bad_lines: int = 0
    bad_lines: list[BadLine] = field(default_factory=list)

    def add_group(
        self, group: SpanGroup, results: list[SpanScan], lines_before: dict[str, int], max_bytes: int | None
    ) -> None:
        """Count one group of spans.

        Args:
            group: the spans.
            results: what each span holds.
            lines_before: lines of each file in earlier groups; updated.
            max_bytes: see CorpusSpec.
        """
        documents_before = self.num_documents
        for span, result in zip(group, results, strict=True):
            # Step 1: what is left out; a file that is given twice is counted from its first line again
            first_line = 0 if span.start == 0 else lines_before.get(span.path, 0)
            lines_before[span.path] = first_line + result.num_lines
            self.num_bad_lines += len(result.bad_lines)
            self.num_empty += result.num_empty
            for bad in result.bad_lines[: MAX_LISTED_BAD_LINES - len(self.bad_lines)]:
                self.bad_lines.append(replace(bad, line=bad.line + first_line))
            # Step 2: the documents, until one does not fit
            for size in result.document_bytes:
                self.full = self.full or (max_bytes is not None and self.text_bytes + size > max_bytes)
                if not self.full:
                    self.num_documents += 1
                    self.text_bytes += size
        if self.num_documents > documents_before:
            self.groups.append((group, self.num_documents - documents_before))


def scan_documents(spec: CorpusSpec, spans: list[Span]) -> Scan:
    """The first pass: read every line, and keep the first documents that fit into `max_bytes`.

    Raises:
        ConfigError: bad lines (with `on_bad_line="refuse"`), or no document at all.
    """
    scan = Scan()
    groups = list(group_spans(spans))
    lines_before: dict[str, int] = {}
    scan_one = partial(scan_group, json_keys=spec.json_keys)
    scanned = ordered_map(scan_one, groups, workers=spec.workers, items_per_worker=SCANNED_GROUPS_PER_WORKER)
    with closing(scanned):
        for group, results in zip(groups, scanned, strict=False):
            scan.add_group(group, results, lines_before, spec.max_bytes)
            if scan.full or (spec.on_bad_line == "refuse" and len(scan.bad_lines) == MAX_LISTED_BAD_LINES):
                break
    _report_bad_lines(spec, scan)
    _refuse_empty_corpus(spec, scan)
    return scan


def scan_group(group: SpanGroup, json_keys: tuple[str, ...]) -> list[SpanScan]:
    """Look at the documents of each span without keeping them; run in the workers."""
    scans = []
    for span in group:
        items = list(_read_span(span, json_keys))
        texts = [item for item in items if isinstance(item, str)]
        sizes = tuple(len(text.encode()) for text in texts if text.strip())
        scans.append(
            SpanScan(
                num_lines=len(items),
                document_bytes=sizes,
                num_empty=len(texts) - len(sizes),
                bad_lines=tuple(item for item in items if isinstance(item, BadLine)),
            )
        )
    return scans


def read_documents(group: SpanGroup, json_keys: tuple[str, ...]) -> Iterator[str]:
    """The documents of a group of spans, in order; empty documents and bad lines are left out."""
    for span in group:
        for item in _read_span(span, json_keys):
            if isinstance(item, str) and item.strip():
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
    for number, line in enumerate(data.removesuffix(b"\n").split(b"\n"), start=1):
        try:
            document = _json_document(line, json_keys)
        except ValueError as error:
            yield BadLine(path=span.path, line=number, reason=str(error))
        else:
            yield document


def _decode_text(data: bytes, path: str) -> str | BadLine:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        return BadLine(path=path, line=data.count(b"\n", 0, error.start) + 1, reason=_invalid_utf8(error))


def _json_document(line: bytes, json_keys: tuple[str, ...]) -> str:
    """The document of one line. Raises ValueError with the reason when there is none."""
    if not line.strip():
        return ""
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(_invalid_utf8(error)) from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"invalid JSON: {error}") from error
    if not isinstance(record, dict):
        raise ValueError(f"a JSON object is needed, this is a {type(record).__name__}")
    for key in json_keys:
        if key not in record:
            raise ValueError(f"key {key!r} is missing")
        if not isinstance(record[key], str):
            raise ValueError(f"key {key!r} holds a {type(record[key]).__name__}, a string is needed")
    text = "\n".join(record[key] for key in json_keys)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError("holds half of a surrogate pair, which is not a character") from error
    return text


def _invalid_utf8(error: UnicodeDecodeError) -> str:
    return f"invalid UTF-8: {error.reason} (byte 0x{error.object[error.start]:02x})"


def _report_bad_lines(spec: CorpusSpec, scan: Scan) -> None:
    """Warn of bad lines, or raise ConfigError, as `on_bad_line` says."""
    if not scan.num_bad_lines:
        return
    listed = "\n".join(f"  {bad}" for bad in scan.bad_lines)
    more = "" if scan.num_bad_lines < MAX_LISTED_BAD_LINES else " (the first ones)"
    if spec.on_bad_line == "refuse":
        raise ConfigError(
            "--input",
            scan.bad_lines[0].path,
            f"these lines cannot be used{more}:\n{listed}\n",
            "Correct them, or give --on-bad-line skip to leave them out.",
        )
    logger.warning("left out %d bad lines%s:\n%s", scan.num_bad_lines, more, listed)


def _refuse_empty_corpus(spec: CorpusSpec, scan: Scan) -> None:
    """Raise ConfigError when there is no document."""
    if scan.num_documents:
        return
    if scan.full:
        raise ConfigError(
            "--max-bytes", spec.max_bytes, "the first document is larger than this", "Give a larger number."
        )
    raise ConfigError(
        "--input",
        " ".join(spec.inputs)[:200],
        f"holds no text ({scan.num_empty} empty documents, {scan.num_bad_lines} bad lines)",
        "Give inputs with at least one document.",
    )
