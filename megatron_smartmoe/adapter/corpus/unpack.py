"""Inputs that cannot be cut where they lie become files of lines that can.

Compressed files, text in UTF-16, JSON arrays and parquet tables are unpacked once, into a folder beside the output that
goes when the preparation ends: everything after that, the two passes and the workers, knows lines and whole files only.
It costs the disk space of the text; streaming instead would decompress each file once per worker and pass.
"""

from __future__ import annotations

import codecs
import importlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megatron_smartmoe.adapter.corpus.formats import Format, unpacked
from megatron_smartmoe.adapter.corpus.records import NESTED_LEVELS, missing_key
from megatron_smartmoe.errors import ConfigError, one_line

# A record that is longer than this is taken for a damaged file: an open quote would be read to the file's end.
MAX_RECORD_CHARACTERS = 2**28
TABLE_ROWS = 512  # read at a time
_DECODER = json.JSONDecoder()

type Unit = Literal["line", "record", "row"]


@dataclass(frozen=True, kw_only=True)
class Readable:
    """A file of lines, or one document, in UTF-8.

    Args:
        path: where its bytes are.
        name: the input that it was made from, for messages.
        unit: what one line of it was there.
        is_json: whether each line is a JSON record; otherwise the file is one document.
    """

    path: Path
    name: str
    unit: Unit
    is_json: bool


def make_readable(path: Path, file_format: Format, target: Path, json_keys: Sequence[str]) -> Readable:
    """Unpack a file to `target`, or leave it where it is if it can be read there.

    Raises:
        ConfigError: it is damaged, or holds nothing that can be read.
    """
    unit: Unit = "line"
    is_json = file_format.content != "text"
    if file_format.is_read_in_place:
        return Readable(path=path, name=str(path), unit=unit, is_json=is_json)
    if file_format.content == "parquet":
        unit = "row"
        _write(target, _table_lines(path, json_keys))
    elif file_format.content == "values":
        unit = "record"
        _write(target, _value_lines(path, file_format))
    elif file_format.encoding != "utf-8":
        _write(target, (text.encode() for text in _text(path, file_format)))
    else:
        _write(target, unpacked(path, file_format.packing))
    return Readable(path=target, name=str(path), unit=unit, is_json=is_json)


def _write(target: Path, pieces: Iterable[bytes]) -> None:
    with target.open("wb") as file:
        for piece in pieces:
            file.write(piece)


def _text(path: Path, file_format: Format) -> Iterator[str]:
    """The text of a file, in pieces, without its byte order mark."""
    name = "utf-8-sig" if file_format.encoding == "utf-8" else file_format.encoding
    decoder = codecs.getincrementaldecoder(name)()
    try:
        for piece in unpacked(path, file_format.packing):
            yield decoder.decode(piece)
        yield decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        rule = f"is not {file_format.encoding.upper()} throughout ({error.reason})"
        raise ConfigError(
            "--input", str(path), rule, "Convert it to UTF-8 with iconv, which names the place."
        ) from error


def _value_lines(path: Path, file_format: Format) -> Iterator[bytes]:
    """The records of an array, or of one JSON value after another, each as a line.

    Raises:
        ConfigError: something is no JSON; what follows it cannot be told apart, so it is not skipped.
    """
    pieces = _text(path, file_format)
    text = next(pieces, "").lstrip()
    in_array = text.startswith("[")
    text = text.removeprefix("[")
    number, wanted, ended = 0, 1, False
    while True:
        # Step 1: the beginning of the next record
        text = text.lstrip()
        if in_array and number and text.startswith(","):
            text = text[1:].lstrip()
        if in_array and text.startswith("]"):
            return
        # Step 2: the record, with more text for as long as it is not whole
        try:
            value, end = _DECODER.raw_decode(text)
            whole = ended or end < len(text)  # a number could go on
        except (ValueError, RecursionError) as error:
            whole = False
            if ended and (text or in_array):
                raise _no_json(path, number + 1, error) from error
        if whole:
            number += 1
            yield json.dumps(value).encode() + b"\n"
            text, wanted = text[end:], 1
            continue
        # Step 3: twice as much each time, so that a long record is not decoded again for every piece
        if ended:
            return
        if len(text) > MAX_RECORD_CHARACTERS:
            raise _no_json(path, number + 1, f"no end within {MAX_RECORD_CHARACTERS:,} characters")
        more = [text]
        for _ in range(wanted):
            piece = next(pieces, None)
            ended = piece is None
            more.append(piece or "")
        text, wanted = "".join(more), 2 * wanted


def _no_json(path: Path, number: int, reason: object) -> ConfigError:
    return ConfigError("--input", f"{path}", f"record {number} is invalid JSON: {reason}", "Correct the file.")


def _table_lines(path: Path, json_keys: Sequence[str]) -> Iterator[bytes]:
    """The rows of a parquet table, each as a JSON line of the columns that are needed.

    Raises:
        ConfigError: pyarrow is missing, the table is damaged, or it lacks a column.
    """
    try:
        parquet: Any = importlib.import_module("pyarrow.parquet")
        arrow_error: Any = importlib.import_module("pyarrow").ArrowException
    except ImportError as error:
        way_out = "Install it: pip install pyarrow (the extra megatron-smartmoe[parquet])."
        raise ConfigError("--input", str(path), "needs pyarrow, which is not installed", way_out) from error
    try:
        with parquet.ParquetFile(path) as table:
            columns = _columns(path, table, json_keys)
            for batch in table.iter_batches(batch_size=TABLE_ROWS, columns=columns):
                for row in batch.to_pylist():
                    yield json.dumps(row, default=str).encode() + b"\n"
    except (arrow_error, UnicodeDecodeError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # a disk that fails or is full, not the table
        raise ConfigError(
            "--input", str(path), f"is a damaged parquet file ({one_line(error)})", "Get the file again."
        ) from error


def _columns(path: Path, table: Any, json_keys: Sequence[str]) -> list[str]:
    """The columns that hold the keys: `data.text` is a column of that name, or part of the column `data`."""
    names = [str(name) for name in table.schema_arrow.names]
    columns = []
    for key in json_keys:
        found = key if key in names else key.partition(".")[0]
        if found not in names:
            rows = f"{table.metadata.num_rows:,} rows"
            raise missing_key(str(path), rows, key, _kinds(table.schema_arrow))
        columns.append(found)
    return list(dict.fromkeys(columns))


def _kinds(fields: Iterable[Any], prefix: str = "", levels: int = NESTED_LEVELS) -> dict[str, str]:
    """The kind of each column, as `records` names them; of a structure, those of its parts."""
    kinds: dict[str, str] = {}
    for one in fields:
        name, kind = f"{prefix}{one.name}", str(one.type)
        if kind.startswith("struct<") and levels > 1:
            parts = (one.type.field(at) for at in range(one.type.num_fields))
            kinds |= _kinds(parts, f"{name}.", levels - 1)
        elif kind.startswith(("list<", "large_list<")):
            kinds[name] = "chat messages" if "role: " in kind and "content: " in kind else "list"
        else:
            kinds[name] = "string" if kind in ("string", "large_string", "string_view") else kind
    return kinds
