"""From bytes to documents, and the first pass over them.

A line that is no document becomes a `BadLine` with its place and reason, never an exception. The first pass looks at
every line before anything is written, and fixes which documents belong to the corpus.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial

from megatron_smartmoe.adapter.corpus.bad_lines import BadLine, BadLines
from megatron_smartmoe.adapter.corpus.records import BadRecordError, Document, RecordReader, invalid_utf8
from megatron_smartmoe.adapter.corpus.sources import Span, SpanGroup, group_spans, topic_text
from megatron_smartmoe.adapter.corpus.spec import CorpusSpec
from megatron_smartmoe.errors import ConfigError
from megatron_smartmoe.workers import ordered_map

logger = logging.getLogger(__name__)

# Reading is quick: starting a process pays off for this many groups of spans, about 16 MB.
SCANNED_GROUPS_PER_WORKER = 32


@dataclass(frozen=True, kw_only=True)
class SpanScan:
    """What one span holds: the size in UTF-8 bytes of each document, in order, and what was left out."""

    num_lines: int
    document_bytes: tuple[int, ...]
    num_chats: int
    num_empty: int
    bad_lines: tuple[BadLine, ...]


@dataclass(kw_only=True)
class Scan:
    """What the first pass found; complete when `scan_documents` returns it.

    Args:
        groups: groups of spans, each with the number of its documents, from its first, that belong to the corpus.
        num_documents, text_bytes: size of the corpus.
        num_chats: how many documents were chat messages.
        full: whether a document was left out because of `max_bytes`; all behind it are too.
        num_empty, bad_lines: left out, up to the group in which the corpus ends.
    """

    groups: list[tuple[SpanGroup, int]] = field(default_factory=list)
    num_documents: int = 0
    text_bytes: int = 0
    full: bool = False
    num_chats: int = 0
    num_empty: int = 0
    bad_lines: BadLines = field(default_factory=BadLines)

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
            self.num_empty += result.num_empty
            self.num_chats += result.num_chats
            for bad in result.bad_lines:
                self.bad_lines.add(replace(bad, line=bad.line + first_line))
            # Step 2: the documents, until one does not fit
            for size in result.document_bytes:
                self.full = self.full or (max_bytes is not None and self.text_bytes + size > max_bytes)
                if not self.full:
                    self.num_documents += 1
                    self.text_bytes += size
        if self.num_documents > documents_before:
            self.groups.append((group, self.num_documents - documents_before))


def scan_documents(spec: CorpusSpec, spans: list[Span], reader: RecordReader) -> Scan:
    """The first pass: read every line, and keep the first documents that fit into `max_bytes`.

    Args:
        spec: the request.
        spans: all of the inputs, in order.
        reader: reads documents out of JSON records.

    Raises:
        ConfigError: bad lines (with `on_bad_line="refuse"`), or no document at all.
    """
    scan = Scan()
    groups = list(group_spans(spans))
    lines_before: dict[str, int] = {}
    scan_one = partial(scan_group, reader=reader)
    scanned = ordered_map(scan_one, groups, workers=spec.workers, items_per_worker=SCANNED_GROUPS_PER_WORKER)
    with closing(scanned):
        for group, results in zip(groups, scanned, strict=False):
            scan.add_group(group, results, lines_before, spec.max_bytes)
            if scan.full or (spec.on_bad_line == "refuse" and scan.bad_lines.many):
                break
    _report_bad_lines(spec, scan)
    _refuse_empty_corpus(spec, scan)
    if spec.chat_template is not None and not scan.num_chats:
        rule = f"has no effect: no record holds chat messages under {' '.join(spec.json_keys)}"
        raise ConfigError("--chat-template", spec.chat_template, rule, "Give their key with --json-keys, or remove it.")
    return scan


def scan_group(group: SpanGroup, reader: RecordReader) -> list[SpanScan]:
    """Look at the documents of each span without keeping them; run in the workers."""
    scans = []
    for span in group:
        items = list(_read_span(span, reader))
        texts = [item.text for item in items if isinstance(item, Document)]
        sizes = tuple(len(text.encode()) for text in texts if text.strip())
        scans.append(
            SpanScan(
                num_lines=len(items),
                document_bytes=sizes,
                num_chats=sum(isinstance(item, Document) and item.is_chat for item in items),
                num_empty=len(texts) - len(sizes),
                bad_lines=tuple(item for item in items if isinstance(item, BadLine)),
            )
        )
    return scans


def read_documents(group: SpanGroup, reader: RecordReader) -> Iterator[Document]:
    """The documents of a group of spans, in order; empty documents and bad lines are left out."""
    for span in group:
        for item in _read_span(span, reader):
            if isinstance(item, Document) and item.text.strip():
                yield item


def _read_span(span: Span, reader: RecordReader) -> Iterator[Document | BadLine]:
    """One item per line of a JSON-lines span; one item for any other span. An empty line is an empty document."""
    if span.kind == "topic":
        yield Document(text=topic_text(span.start))
        return
    with open(span.path, "rb") as file:
        file.seek(span.start)
        data = file.read(span.stop - span.start)
    if span.start == 0:
        data = data.removeprefix(b"\xef\xbb\xbf")  # A byte order mark says how to read the text; it is not text.
    if span.kind == "text":
        yield _decode_text(data, span.name)
        return
    for number, line in enumerate(data.splitlines(), start=1):  # at newlines and carriage returns: JSON escapes both
        try:
            document = reader.document(line)
        except BadRecordError as error:
            yield BadLine(path=span.name, line=number, reason=str(error), unit=span.unit, keys=error.keys)
        else:
            yield document


def _decode_text(data: bytes, path: str) -> Document | BadLine:
    try:
        return Document(text=data.decode("utf-8"))
    except UnicodeDecodeError as error:
        return BadLine(path=path, line=data.count(b"\n", 0, error.start) + 1, reason=invalid_utf8(error))


def _report_bad_lines(spec: CorpusSpec, scan: Scan) -> None:
    """Warn of bad lines, or raise ConfigError, as `on_bad_line` says."""
    if not scan.bad_lines.count:
        return
    if spec.on_bad_line == "refuse":
        raise scan.bad_lines.refusal()
    logger.warning("left out %d bad lines: %s", scan.bad_lines.count, scan.bad_lines.text())


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
        f"holds no text ({scan.num_empty} empty documents, {scan.bad_lines.count} bad lines)",
        "Give inputs with at least one document.",
    )
