"""Which bytes of which files: the inputs become spans, and spans become groups of about equal size.

A group names bytes and does not hold them, so that the worker that tokenizes it reads it too, and the parent process
never becomes the bottleneck. JSON-lines files are cut at line ends; a text file is one document and is never cut.
"""

from __future__ import annotations

import glob
import hashlib
import importlib
import os
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_smartmoe.errors import ConfigError

# Large against the cost of sending a group to a worker, small against a worker's memory. Has no influence on the
# result, except that the tokenizer's sample is drawn in groups.
GROUP_BYTES = 512 * 1024
JSON_LINES_SUFFIXES = (".jsonl", ".json")

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
        path: the file; for a topic the module.
        start, stop: byte range, `stop` not included; for a topic its index among the sorted names.
        num_bytes: size, used to balance groups.
    """

    kind: Literal["text", "jsonl", "topic"]
    path: str
    start: int
    stop: int
    num_bytes: int


type SpanGroup = tuple[Span, ...]


def find_spans(inputs: Sequence[str], *, python_stdlib: bool, seed: int) -> list[Span]:
    """All spans in their order: the inputs as given (directories and globs sorted by path), then the standard library.

    Raises:
        ConfigError: an input is missing, or holds no files, or cannot be read.
    """
    spans: list[Span] = []
    for item in inputs:
        for path in _files(item):
            spans.extend(_json_lines_spans(path) if path.suffix in JSON_LINES_SUFFIXES else [_text_span(path)])
    return spans + (stdlib_spans(seed) if python_stdlib else [])


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
    named = [(path.relative_to(root).as_posix(), _text_span(path)) for path in _stdlib_files(root)]
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
        Span(kind="topic", path=path, start=index, stop=index + 1, num_bytes=size) for index, size in enumerate(sizes)
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


def _files(item: str) -> list[Path]:
    """The files that one `--input` stands for, sorted."""
    path = Path(item)
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file())
        found = [file for file in files if not any(part.startswith(".") for part in file.relative_to(path).parts)]
        rule = "the directory holds no files"
    elif path.is_file():
        found, rule = [path], ""
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


def _text_span(path: Path) -> Span:
    size = path.stat().st_size
    return Span(kind="text", path=str(path), start=0, stop=size, num_bytes=size)


def _json_lines_spans(path: Path) -> Iterator[Span]:
    """Spans of a JSON-lines file, cut at line ends about every GROUP_BYTES."""
    size = path.stat().st_size
    start = 0
    with path.open("rb") as file:
        while start < size:
            file.seek(min(start + GROUP_BYTES, size))
            file.readline()  # To the end of the line that the cut falls into.
            stop = min(file.tell(), size)
            yield Span(kind="jsonl", path=str(path), start=start, stop=stop, num_bytes=stop - start)
            start = stop
