"""The first pass: judge every line and fix which documents belong to the corpus, before anything is written."""

from __future__ import annotations

import logging
from contextlib import closing
from dataclasses import dataclass, field, replace

from megatron_smartmoe.adapter.corpus.documents import BadLine, Scanner, SpanScan
from megatron_smartmoe.adapter.corpus.sources import Chunk, Span, chunked
from megatron_smartmoe.adapter.corpus.spec import CorpusSpec
from megatron_smartmoe.adapter.corpus.workers import default_workers, ordered_map
from megatron_smartmoe.errors import ConfigError

logger = logging.getLogger(__name__)

MAX_LISTED_BAD_LINES = 20


@dataclass(kw_only=True)
class Scan:
    """What the first pass found; complete when `scan_documents` returns it.

    Args:
        max_bytes: as in CorpusSpec.
        chunks: each with the number of its documents, from its first, that belong to the corpus.
        num_documents, text_bytes: of the corpus.
        full: whether a document was left out because of `max_bytes`; all behind it are too.
        num_empty, num_bad_lines: left out, up to the chunk in which the corpus ends.
        bad_lines: the first MAX_LISTED_BAD_LINES of them.
    """

    max_bytes: int | None = None
    chunks: list[tuple[Chunk, int]] = field(default_factory=list)
    num_documents: int = 0
    text_bytes: int = 0
    full: bool = False
    num_empty: int = 0
    num_bad_lines: int = 0
    bad_lines: list[BadLine] = field(default_factory=list)

    def add_chunk(self, chunk: Chunk, results: list[SpanScan], lines_before: dict[str, int]) -> None:
        """Count one chunk. `lines_before` holds the lines of each file that earlier chunks had."""
        num_before = self.num_documents
        for span, result in zip(chunk, results, strict=True):
            self._add_left_out(span, result, lines_before)
            for size in result.document_bytes:
                self._add_document(size)
        if self.num_documents > num_before:
            self.chunks.append((chunk, self.num_documents - num_before))

    def _add_left_out(self, span: Span, result: SpanScan, lines_before: dict[str, int]) -> None:
        first_line = 0 if span.start == 0 else lines_before.get(span.path, 0)  # A file may be given twice.
        for bad in result.bad_lines[: MAX_LISTED_BAD_LINES - len(self.bad_lines)]:
            self.bad_lines.append(replace(bad, line=bad.line + first_line))
        self.num_bad_lines += len(result.bad_lines)
        self.num_empty += result.num_empty
        lines_before[span.path] = first_line + result.num_lines

    def _add_document(self, size: int) -> None:
        self.full = self.full or (self.max_bytes is not None and self.text_bytes + size > self.max_bytes)
        if not self.full:
            self.num_documents += 1
            self.text_bytes += size


def scan_documents(spec: CorpusSpec, spans: list[Span]) -> Scan:
    """Judge every line, and keep the first documents that fit into `max_bytes`.

    Raises:
        ConfigError: bad lines (with `on_bad_line="refuse"`), or no document at all.
    """
    scan = Scan(max_bytes=spec.max_bytes)
    chunks = list(chunked(spans))
    scanner = Scanner(json_keys=spec.json_keys)
    lines_before: dict[str, int] = {}
    # Scanning is quick: a process is worth starting for 32 chunks, about 16 MB.
    workers = spec.workers or default_workers()
    with closing(ordered_map(scanner, chunks, workers=workers, items_per_worker=32)) as results:
        for chunk, result in zip(chunks, results, strict=False):
            scan.add_chunk(chunk, result, lines_before)
            if scan.full or (spec.on_bad_line == "refuse" and len(scan.bad_lines) == MAX_LISTED_BAD_LINES):
                break
    _report_bad_lines(spec, scan)
    _refuse_nothing(spec, scan)
    return scan


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
            "Mend them, or give --on-bad-line skip to leave them out.",
        )
    logger.warning("left out %d bad lines%s:\n%s", scan.num_bad_lines, more, listed)


def _refuse_nothing(spec: CorpusSpec, scan: Scan) -> None:
    """Raises ConfigError when there is no document."""
    if scan.num_documents:
        return
    if scan.full:
        raise ConfigError(
            "--max-bytes", spec.max_bytes, "the first document is larger than this", "Give a larger number."
        )
    raise ConfigError(
        "--input",
        " ".join(spec.inputs),
        f"holds no text ({scan.num_empty} empty documents, {scan.num_bad_lines} bad lines)",
        "Give inputs with at least one document.",
    )
