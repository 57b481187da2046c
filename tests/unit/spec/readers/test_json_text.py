"""JSON: what the standard does not have is refused, with its line, whatever Python's own reader thinks of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_smartmoe.errors import ConfigError
from megatron_smartmoe.spec.readers.files import Named
from megatron_smartmoe.spec.readers.json_text import CUT, read_json, read_json_lines, read_object


@pytest.fixture
def named(tmp_path: Path) -> Named:
    return Named(path=tmp_path / "f.json", field="--file", way_out="Give another.")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "f.json:1 = '': is not JSON: Expecting value (column 1). Correct line 1."),
        ('{\n "a": 1,\n}', "f.json:3 = '}': is not JSON: "),
        ("[NaN]", "is not JSON that can be read: NaN is not a JSON number"),
        ("[-Infinity]", "-Infinity is not a JSON number"),
        ("[1e999]", "1e999 is too large for a number"),
        ("9" * 5000, "is not JSON that can be read: Exceeds the limit"),
        ('{"a": 1, "a": 2}', "the key 'a' is given twice"),
        ("[" * 100_000, "f.json:1 = '[["),
        ("[" + "[]," * 3_000_000 + "1]", "holds more than can be read: 9,000,003 characters in 3,000,001 lists"),
    ],
)
def test_what_is_not_json(named: Named, text: str, message: str) -> None:
    named.path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_json(named)
    assert message in str(caught.value)
    assert len(str(caught.value)) < 600


def test_an_object_is_asked_for(named: Named) -> None:
    named.path.write_text('{"a": [1, 2.5, null]}')
    assert read_object(named) == {"a": [1, 2.5, None]}
    named.path.write_text("[1]")
    with pytest.raises(ConfigError, match="must hold a JSON object, and holds a list"):
        read_object(named)


def test_lines(named: Named) -> None:
    named.path.write_text('1\n\n  \n"a"\n{"b')
    assert [(number, value) for number, value, _ in read_json_lines(named)] == [(1, 1), (4, "a"), (5, CUT)]
    named.path.write_text('1\n{"b\n2\n')
    with pytest.raises(ConfigError, match=r"f\.json:2 = .*Correct line 2, or delete it if a killed run cut it short"):
        list(read_json_lines(named))
    named.path.write_text('{"b')
    with pytest.raises(ConfigError, match=r"f\.json:1"):
        list(read_json_lines(named))
