"""JSON as the standard has it: no NaN, no repeated key, nothing that is nested without end.

Python's own reader accepts `NaN`, turns 1e999 into infinity and lets the last of two equal keys win. A value of a few
bytes can take a hundred in memory, so the size of what a text stands for is estimated before it is parsed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any

from megatron_smartmoe.errors import ConfigError, printable
from megatron_smartmoe.spec.readers import files
from megatron_smartmoe.spec.readers.files import Named

_MOST_BYTES = 640 * files.MIB  # of memory that a document may take
_BYTES_PER_CHARACTER = 9  # of a number or a text, at most: `1.5,` is 32 bytes
_BYTES_PER_CONTAINER = 230  # of an empty or short list or object, at most


class _Refused(ValueError):
    """A text that Python's reader would accept."""


def read_json(named: Named) -> Any:
    """The content of a JSON file.

    Raises:
        ConfigError: it cannot be read, or is not JSON; names the line.
    """
    return parse(files.read_text(named), named)


def read_object(named: Named) -> dict[str, Any]:
    """The content of a JSON file that holds an object.

    Raises:
        ConfigError: see `read_json`; or it holds something else.
    """
    content = read_json(named)
    if not isinstance(content, dict):
        raise named.refused(f"must hold a JSON object, and holds {kind_of(content)}")
    return content


def read_json_lines(named: Named) -> Iterator[tuple[int, Any, bytes]]:
    """The values of a file with one JSON value a line: number of the line, value, the line itself.

    Blank lines are left out, and so is a last line without a line end that is not JSON: a run that was killed leaves
    one behind. It is yielded with the value `CUT`.

    Raises:
        ConfigError: the file cannot be read, or a line is not UTF-8 or not JSON; names the line.
    """
    for number, line in files.read_lines(named):
        if not line.strip():
            continue
        try:
            value = parse(files.decode(line, named, number), named, number)
        except ConfigError:
            if number == 1 or line.endswith((b"\n", b"\r")):
                raise
            value = CUT
        yield number, value, line


CUT = object()  # in place of the value of a last line that was cut short


def parse(text: str, named: Named, line: int | None = None) -> Any:
    """The value of a JSON text, which is the file or its line `line`.

    Raises:
        ConfigError: it is not JSON; names the line.
    """
    containers = text.count("[") + text.count("{")
    if len(text) * _BYTES_PER_CHARACTER + containers * _BYTES_PER_CONTAINER > _MOST_BYTES:
        rule = f"holds more than can be read: {len(text):,} characters in {containers:,} lists and objects"
        raise named.refused(rule)
    try:
        return json.loads(text, parse_constant=_constant, parse_float=_finite, object_pairs_hook=_unique)
    except json.JSONDecodeError as error:
        at, rule = line or error.lineno, f"is not JSON: {error.msg} (column {error.colno})"
        shown = text.split("\n")[error.lineno - 1]
        raise ConfigError(named.at(at), shown[:1000].strip(), rule, _way_out(at, line)) from None
    except RecursionError:
        rule = "is not JSON that can be read: it is nested too deeply"
        raise ConfigError(named.at(line or 1), text[:60], rule, _way_out(line or 1, line)) from None
    except ValueError as error:  # ours, or a whole number of thousands of digits
        rule = f"is not JSON that can be read: {printable(str(error))}"
        if line is None:
            raise named.refused(rule) from None
        raise ConfigError(named.at(line), text[:1000].strip(), rule, _way_out(line, line)) from None


def kind_of(value: object) -> str:
    """What a JSON value is, in words."""
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def _way_out(at: int, line: int | None) -> str:
    return f"Correct line {at}." if line is None else f"Correct line {at}, or delete it if a killed run cut it short."


def _constant(name: str) -> float:
    raise _Refused(f"{name} is not a JSON number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise _Refused(f"{text[:20]} is too large for a number")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise _Refused(f"the key {key[:60]!r} is given twice")
            seen.add(key)
    return content
