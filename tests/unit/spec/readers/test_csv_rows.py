"""CSV: each cell is what its column needs, or an error with file, line and column."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_smartmoe.errors import ConfigError
from megatron_smartmoe.spec.readers.csv_rows import Row, read_rows
from megatron_smartmoe.spec.readers.files import Named


def rows(tmp_path: Path, text: str) -> list[Row]:
    path = tmp_path / "f.csv"
    path.write_text(text, newline="")
    return read_rows(Named(path=path, field="measured runs", way_out="Give another."), ("a", "b"))


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_rows_of_any_system(tmp_path: Path, end: str) -> None:
    found = rows(tmp_path, end.join(("b, a ,c", "2.5,1,x", "", "inf,3.0,y", "")))
    assert [row.whole("a") for row in found] == [1, 3]
    assert found[0].number("b") == 2.5
    assert found[1].number("b", finite=False) == float("inf")
    assert found[1].where.endswith("f.csv:4")


@pytest.mark.parametrize("cell", ["1.5", "", "x", "1_0", "\u0664", "0x1", "1e3", "-1", "9" * 30, "[]"])
def test_no_whole_number(tmp_path: Path, cell: str) -> None:
    (row,) = rows(tmp_path, f"a,b\n{cell},1\n")
    with pytest.raises(ConfigError, match=r"f\.csv:2: a = .*: must be a whole number between 0 and 1,000,000,000"):
        row.whole("a")


@pytest.mark.parametrize("cell", ["nan", "inf", "0", "-1", "x", "", "1_0"])
def test_no_number(tmp_path: Path, cell: str) -> None:
    (row,) = rows(tmp_path, f"a,b\n1,{cell}\n")
    with pytest.raises(ConfigError, match=r"f\.csv:2: b = .*: must be a number above 0\."):
        row.number("b")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "lacks column a, b. It needs a, b."),
        ("a,c\n1,2\n", "lacks column b"),
        ("a,b,a\n1,2,3\n", "f.csv:1 = 'a': is the name of two columns"),
        ("a,b\n1\n", "f.csv:2 = '1': has 1 cells, and the header has 2"),
        ("a,b\n1,2,3\n", "f.csv:2 = '1,2,3': has 3 cells, and the header has 2"),
        ("a,b\n1," + "x" * 200_000 + "\n", "f.csv:2 = None: is not CSV: field larger than field limit"),
        ('a,b\n1,"x\n', "is not CSV: unexpected end of data"),
    ],
)
def test_what_is_no_table(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        rows(tmp_path, text)
    assert message in str(caught.value)
