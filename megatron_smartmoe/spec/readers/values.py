"""Types of what was read: a value of the declared type, within its bounds, or an error that names the field.

Nothing is converted but whole numbers that are written as floats where a float is declared: 1.5 is no expert, true is
no 1, and a number that is not finite is refused.
"""

from __future__ import annotations

import math
import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from megatron_smartmoe.errors import ConfigError
from megatron_smartmoe.spec.arrays import IntArray

LARGEST = 2**62  # of a whole number: a sum of two still fits into 64 bits


def whole(value: object, field: str, *, least: int = 0, most: int = LARGEST, example: object = None) -> int:
    """A whole number between `least` and `most`.

    Raises:
        ConfigError: it is something else.
    """
    if type(value) is not int or not least <= value <= most:
        rule = f"must be a whole number of at least {least}" + (f" and at most {most:,}" if most < LARGEST else "")
        raise ConfigError(field, value, rule, f"For example: {max(least, 1) if example is None else example}.")
    return value


def number(
    value: object, field: str, *, above: float | None = None, least: float | None = 0.0, example: object = None
) -> float:
    """A finite number, above `above`, or at least `least` where there is no `above`.

    Raises:
        ConfigError: it is something else.
    """
    rule = "must be a number" if least is None else f"must be a number of at least {least:g}"
    rule = rule if above is None else f"must be a number above {above:g}"
    wrong = ConfigError(field, value, rule, f"For example: {1.0 if example is None else example}.")
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise wrong
    try:
        found = float(value)
    except OverflowError:
        raise wrong from None
    low = found <= above if above is not None else least is not None and found < least
    if not math.isfinite(found) or low:
        raise wrong
    return found


def text(value: object, field: str, *, example: str = "text") -> str:
    """A text that is not empty, without control characters.

    Raises:
        ConfigError: it is something else.
    """
    if not isinstance(value, str) or not value.strip() or not value.isprintable():
        raise ConfigError(field, value, "must be a text on one line, and not empty", f"For example: {example}.")
    return value


def mapping(value: object, field: str, way_out: str) -> dict[str, Any]:
    """A mapping.

    Raises:
        ConfigError: it is something else.
    """
    if not isinstance(value, dict):
        raise ConfigError(field, value, "must be a mapping", way_out)
    return value


def whole_table(value: object, field: str, num_axes: int) -> IntArray:
    """Nested lists of whole numbers, all lists of an axis of one length, as an array.

    Raises:
        ConfigError: an entry is something else; the message names it.
    """
    cells: list[int] = []
    shape: list[int] = []
    _collect(value, field, num_axes, shape, cells)
    return np.array(cells, dtype=np.int64).reshape(shape + [0] * (num_axes - len(shape)))


def _collect(value: object, field: str, axes_left: int, shape: list[int], cells: list[int], depth: int = 0) -> None:
    if not isinstance(value, list):
        raise ConfigError(field, value, "must be a list", "Write it as lists of whole numbers.")
    if len(shape) <= depth:
        shape.append(len(value))
    if len(value) != shape[depth]:
        rule = f"must have {shape[depth]} entries, as the lists beside it"
        raise ConfigError(field, value, rule, "Add or remove some.")
    for at, entry in enumerate(value):
        if axes_left > 1:
            _collect(entry, f"{field}[{at}]", axes_left - 1, shape, cells, depth + 1)
        elif type(entry) is not int or abs(entry) > LARGEST:
            raise ConfigError(f"{field}[{at}]", entry, "must be a whole number", "For example: 3.")
        else:
            cells.append(entry)


def build[Kind](kind: type[Kind], content: object, field: str, way_out: str, *, known_only: bool = True) -> Kind:
    """A dataclass from a mapping, each value of the type that its field declares; a list where a tuple is declared.

    Args:
        kind: the dataclass.
        content: keys are names of its fields.
        field: names the content in errors, empty for the file itself.
        way_out: of a key that is missing.
        known_only: refuse other keys; otherwise they are left out.

    Raises:
        ConfigError: a key is missing or unknown, or a value has another type; the message names it.
    """
    assert is_dataclass(kind)
    head = f"{field}." if field else ""
    given = mapping(content, field or "content", way_out)
    declared, hints = {one.name: one for one in fields(kind)}, typing.get_type_hints(kind)
    for key in given:
        if known_only and key not in declared:
            raise ConfigError(f"{head}{key}", given[key], "is not a known key", f"Known here: {', '.join(declared)}.")
    values = {}
    for name, one in declared.items():
        if name in given:
            values[name] = _typed(given[name], hints[name], f"{head}{name}", way_out)
        elif one.default is MISSING and one.default_factory is MISSING:
            raise ConfigError(f"{head}{name}", None, "is missing", way_out)
    return typing.cast(Kind, kind(**values))


def _typed(value: object, declared: Any, field: str, way_out: str) -> Any:
    """The value as its declared type: bool, int (not negative), float, str, Literal, a dataclass, or some of these."""
    origin, arguments = typing.get_origin(declared), typing.get_args(declared)
    if origin is types.UnionType:  # one type, or None
        (only,) = (one for one in arguments if one is not types.NoneType)
        return None if value is None else _typed(value, only, field, way_out)
    if origin is Literal:
        if not isinstance(value, str) or value not in arguments:
            raise ConfigError(field, value, f"must be one of {', '.join(arguments)}", f"For example: {arguments[0]}.")
        return value
    if origin is tuple:
        if not isinstance(value, list):
            raise ConfigError(field, value, "must be a list", way_out)
        return tuple(_typed(one, arguments[0], f"{field}[{at}]", way_out) for at, one in enumerate(value))
    if origin is Mapping or origin is dict:
        entries = mapping(value, field, way_out)
        return {key: _typed(one, arguments[1], f"{field}.{key}", way_out) for key, one in entries.items()}
    if declared is Any or (declared is Path and isinstance(value, Path)):
        return value
    if declared is bool:
        if not isinstance(value, bool):
            raise ConfigError(field, value, "must be true or false", "For example: true.")
        return value
    if declared is int:
        return whole(value, field)
    if declared is float:
        return number(value, field)
    if declared is str:
        return text(value, field)
    return build(declared, value, field, way_out)
