"""Types of what was read: nothing is converted, nothing is cut."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import pytest

from megatron_smartmoe.errors import ConfigError
from megatron_smartmoe.spec.readers import values


@dataclass(frozen=True, kw_only=True)
class Inner:
    size: int
    kind: Literal["a", "b"] = "a"


@dataclass(frozen=True, kw_only=True)
class Outer:
    name: str
    inner: Inner
    shares: Mapping[str, float]
    layers: tuple[int, ...] | None = None
    on: bool = True


GOOD: dict[str, Any] = {"name": "n", "inner": {"size": 3}, "shares": {"x": 1}, "layers": [1, 2]}


def test_a_dataclass_is_built_from_its_types() -> None:
    assert values.build(Outer, GOOD, "", "See there.") == Outer(
        name="n", inner=Inner(size=3), shares={"x": 1.0}, layers=(1, 2)
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": ""}, "f.name = '': must be a text on one line, and not empty"),
        ({"name": "a\nb"}, "f.name = 'a\\nb': must be a text"),
        ({"inner": 3}, "f.inner = 3: must be a mapping. See there."),
        ({"inner": {"size": 1.5}}, "f.inner.size = 1.5: must be a whole number of at least 0"),
        ({"inner": {"size": True}}, "f.inner.size = True: must be a whole number"),
        ({"inner": {"size": 10**400}}, "0000: must be a whole number"),
        ({"inner": {"size": 1, "kind": []}}, "f.inner.kind = []: must be one of a, b. For example: a."),
        ({"inner": {"size": 1, "x": 2}}, "f.inner.x = 2: is not a known key. Known here: size, kind."),
        ({"inner": {}}, "f.inner.size = None: is missing. See there."),
        ({"shares": {"x": float("nan")}}, "f.shares.x = nan: must be a number of at least 0"),
        ({"shares": {"x": 10**400}}, "0000: must be a number"),
        ({"shares": {"x": "1"}}, "f.shares.x = '1': must be a number"),
        ({"layers": "12"}, "f.layers = '12': must be a list"),
        ({"layers": [1, None]}, "f.layers[1] = None: must be a whole number"),
        ({"on": 1}, "f.on = 1: must be true or false"),
    ],
)
def test_a_wrong_type_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        values.build(Outer, {**GOOD, **changes}, "f", "See there.")
    assert message in str(caught.value)


def test_other_keys_are_left_out_where_that_is_asked_for() -> None:
    assert values.build(Inner, {"size": 1, "x": 2}, "", "", known_only=False) == Inner(size=1)


def test_a_table_of_whole_numbers() -> None:
    assert values.whole_table([[1, 2], [3, 4]], "t", 2).tolist() == [[1, 2], [3, 4]]
    for wrong, message in (
        ([[1, 2], [3]], "t[1] = [3]: must have 2 entries, as the lists beside it"),
        ([[1, 2], [3, 1.5]], "t[1][1] = 1.5: must be a whole number"),
        ([[1, 2], 3], "t[1] = 3: must be a list"),
        ([[1, True]], "t[0][1] = True: must be a whole number"),
        (None, "t = None: must be a list"),
    ):
        with pytest.raises(ConfigError) as caught:
            values.whole_table(wrong, "t", 2)
        assert message in str(caught.value)
