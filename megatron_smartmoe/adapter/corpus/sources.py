"""Which bytes of which files: the inputs become spans, and spans become groups of about equal size.

A group names bytes and does not hold them, so that the worker that tokenizes it reads it too, and the parent process
never becomes the bottleneck. JSON-lines files are cut at line ends; a text file is one document and is never cut. What
is neither is unpacked first (`unpack.py`).
"""

from __future__ import annotations

import glob
import hashlib
import importlib
import logging
import os
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

from megatron_smartmoe.adapter.corpus.formats import Format, format_of, is_json_lines_in_disguise
from megatron_smartmoe.adapter.corpus.unpack import Readable, Unit, make_readable
from megatron_smartmoe.errors import ConfigError

logger = logging.getLogger(__name__)

# Large against the cost of sending a group to a worker, small against a worker's memory. Has no influence on the
# result, except that the tokenizer's sample is drawn in groups.
GROUP_BYTES = 512 * 1024
SHOWN_FILES = 3  # names in a warning

# Left out: tests (most of a standard library's bytes, and not installed everywhere), character tables, what pip
# installed, and build settings that differ from machine to machine.
STDLIB_LEFT_OUT = frozenset(
    {"site-packages", "dist-packages", "__pycache__", "lib-dynload", "test", "tests", "idle_test", "encodings"}
)


@dataclass(frozen=True, kw_only=True)
class Span:
    """A part of one input.

    Args:
        kind: a whole text file; lines of a JSON-lines file; one of Python's help topics.
        path: the file that is read; for a topic the module.
        name: the input that it was made from, for messages.
        unit: what one line of it was in the input.
        start, stop: byte range, `stop` not included; for a topic its index among the sorted names.
        num_bytes: size, used to balance groups.
    """

    kind: Literal["text", "jsonl", "topic"]
    path: str
    name: str
    unit: Unit = "line"
    start: int
    stop: int
    num_bytes: int


type SpanGroup = tuple[Span, ...]


@dataclass(frozen=True, kw_only=True)
class InputFile:
    """A file to read, and what it holds."""

    path: Path
    format: Format


def find_inputs(inputs: Sequence[str]) -> list[InputFile]:
    """The files that the inputs stand for, in their order (directories and globs sorted by path), each once.

    Raises:
        ConfigError: an input is missing, or holds no files, or cannot be read.
    """
    seen: set[str] = set()
    again: list[str] = []
    files = []
    for item in inputs:
        for path in _files(item):
            real = os.path.realpath(path)
            if real in seen:
                again.append(str(path))
                continue
            seen.add(real)
            files.append(InputFile(path=path, format=format_of(path)))
    if again:
        logger.warning("%d files are met again, by a link or another name, and read once: %s", len(again), _some(again))
    disguised = [str(file.path) for file in files if is_json_lines_in_disguise(file.path, file.format)]
    if disguised:
        logger.warning(
            "%d files are taken as one document each, and begin like JSON lines: %s. Name them .jsonl to have a "
            "document read from each line.",
            len(disguised),
            _some(disguised),
        )
    return files


def find_spans(files: Sequence[InputFile], folder: Path, json_keys: Sequence[str]) -> list[Span]:
    """The spans of all files, in order. Files that cannot be cut where they are get unpacked.

    Args:
        files: the inputs.
        folder: for what is unpacked; made if needed.
        json_keys: see CorpusSpec; of a table, only these columns are unpacked.

    Raises:
        ConfigError: a file is damaged.
    """
    spans: list[Span] = []
    for number, file in enumerate(files):
        if not file.format.is_read_in_place:
            folder.mkdir(exist_ok=True)
        readable = make_readable(file.path, file.format, folder / f"{number:06d}", json_keys)
        spans.extend(_json_lines_spans(readable) if readable.is_json else [_text_span(readable.path, readable.name)])
    return spans


def group_spans(spans: Iterable[Span]) -> Iterator[SpanGroup]:
    """Groups of neighbouring spans of at least GROUP_BYTES bytes (the last one may be smaller)."""
    group: list[Span] = []
    size = 0
    for span in spans:
        group.append(span)
        size += span.num_bytes
        if size >= GROUP_BYTES:
            yield tuple(group)
            group, size = [], 0
    if group:
        yield tuple(group)


def stdlib_spans(seed: int) -> list[Span]:
    """The text that every Python carries: the sources of the standard library, its licence and its help topics.

    The order is that of a hash of `seed` and name, the same on every machine with the same Python. Sorted by name,
    a size cap would drop the end of the alphabet, and Megatron's `--split`, which cuts the documents in order, would
    validate on a handful of modules.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    named = [(path.relative_to(root).as_posix(), _text_span(path, str(path))) for path in _stdlib_files(root)]
    named += [(f"help topic {span.start}", span) for span in _topic_spans()]
    if not named:
        raise ConfigError(
            "--python-stdlib", str(root), "this Python came without its sources", "Give --input with text of your own."
        )
    named.sort(key=lambda item: hashlib.sha256(f"{seed}:{item[0]}".encode()).digest())
    return [span for _, span in named]


def topic_text(index: int) -> str:
    """Text of one of Python's help topics, by its index among the sorted names."""
    topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    return topics[sorted(topics)[index]]


def _topic_spans() -> list[Span]:
    try:
        topics = importlib.import_module("pydoc_data.topics")
    except ImportError:  # Some distributions leave it out.
        return []
    sizes = [len(topics.topics[name].encode()) for name in sorted(topics.topics)]
    path = str(topics.__file__)
    return [
        Span(kind="topic", path=path, name=path, start=index, stop=index + 1, num_bytes=size)
        for index, size in enumerate(sizes)
    ]


def _stdlib_files(root: Path) -> Iterator[Path]:
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = sorted(name for name in subfolders if name not in STDLIB_LEFT_OUT)
        for name in sorted(names):
            path = Path(folder, name)
            is_source = name.endswith(".py") and not name.startswith("_sysconfigdata")
            # The topics module is one dict of escaped strings: its texts are taken as documents instead.
            is_topics = path.parent.name == "pydoc_data"
            if ((is_source and not is_topics) or name == "LICENSE.txt") and _is_utf8(path):
                yield path


def _is_utf8(path: Path) -> bool:
    try:
        path.read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError):
        return False
    return True


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN_FILES} more" if len(names) > SHOWN_FILES else ""
    return ", ".join(names[:SHOWN_FILES]) + more


def _files(item: str) -> list[Path]:
    """The files that one `--input` stands for, sorted."""
    path = Path(item)
    if path.is_dir():
        found = sorted(_walk(path))
        rule = "the directory holds no files"
    elif path.is_file():
        found, rule = [path], ""
    elif path.exists():
        rule = "is a pipe or a device, and the text is read twice"
        raise ConfigError("--input", item, rule, "Write it to a file first; compressed files are read as they are.")
    else:
        found = sorted(file for match in glob.glob(item, recursive=True) if (file := Path(match)).is_file())
        rule = "no such file or directory, and no glob that matches a file"
    if not found:
        raise ConfigError(
            "--input", item, rule, "Give a file, a directory or a glob that exists, such as 'data/*.jsonl'."
        )
    for file in found:
        if not os.access(file, os.R_OK):
            raise ConfigError("--input", str(file), "cannot be read", "Make it readable (chmod u+r), or leave it out.")
    return found


def _walk(folder: Path) -> Iterator[Path]:
    """The files below a folder, hidden names left out; links to folders are followed, each folder is walked once."""
    walked: set[str] = set()
    for where, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(where)
        if real in walked:
            folders.clear()
            continue
        walked.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (path for name in names if not name.startswith(".") and (path := Path(where, name)).is_file())


def _text_span(path: Path, name: str) -> Span:
    size = path.stat().st_size
    return Span(kind="text", path=str(path), name=name, start=0, stop=size, num_bytes=size)


def _json_lines_spans(readable: Readable) -> Iterator[Span]:
    """Spans of a JSON-lines file, cut at line ends about every GROUP_BYTES."""
    size = readable.path.stat().st_size
    start = 0
    with readable.path.open("rb") as file:
        line_end = _line_end(file.read(GROUP_BYTES))
        while start < size:
            stop = _after_line_end(file, min(start + GROUP_BYTES, size), line_end, size)
            yield Span(
                kind="jsonl",
                path=str(readable.path),
                name=readable.name,
                unit=readable.unit,
                start=start,
                stop=stop,
                num_bytes=stop - start,
            )
            start = stop


def _line_end(head: bytes) -> bytes:
    """What ends the lines of a file: a carriage return alone only where there is no newline at all."""
    return b"\r" if b"\n" not in head and b"\r" in head.rstrip() else b"\n"


def _after_line_end(file: IO[bytes], position: int, line_end: bytes, size: int) -> int:
    """Where the line that holds `position` ends."""
    file.seek(position)
    if line_end == b"\n":
        file.readline()
        return min(file.tell(), size)
    while piece := file.read(GROUP_BYTES):
        if (found := piece.find(line_end)) >= 0:
            return position + found + 1
        position += len(piece)
    return size
