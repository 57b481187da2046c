"""CSV with a header, a row at a time; each cell is read as what it should be, with file, line and column in errors."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_smartmoe.errors import ConfigError, printable
from megatron_smartmoe.spec.readers import files
from megatron_smartmoe.spec.readers.files import Named

_WHOLE = re.compile(r"[+-]?[0-9]+(\.0*)?")  # a table program writes 4.0 into a column with gaps
_LONGEST = 18  # digits that fit into 64 bits


@dataclass(frozen=True, kw_only=True)
class Row:
    """A row of a CSV file.

    Attributes:
        where: file and line.
        cells: text by column.
    """

    where: str
    cells: Mapping[str, str]

    def text(self, column: str) -> str:
        """The cell as it is, without the space around it."""
        return self.cells[column].strip()

    def is_whole(self, column: str) -> bool:
        """Whether the cell is a whole number."""
        text = self.text(column)
        return bool(_WHOLE.fullmatch(text)) and len(text) <= _LONGEST

    def whole(self, column: str, *, least: int = 0, most: int = 10**9) -> int:
        """The cell as a whole number.

        Raises:
            ConfigError: it is something else, or out of bounds.
        """
        text = self.text(column)
        value = int(text.partition(".")[0]) if self.is_whole(column) else None
        if value is None or not least <= value <= most:
            rule = f"must be a whole number between {least} and {most:,}"
            raise ConfigError(f"{self.where}: {column}", text, rule, "Correct the cell, or delete the row.")
        return value

    def number(self, column: str, *, above: float = 0.0, finite: bool = True) -> float:
        """The cell as a number above `above`; infinity only where it is asked for.

        Raises:
            ConfigError: it is something else, or out of bounds.
        """
        text = self.text(column)
        try:
            value = float(text) if "_" not in text else math.nan
        except ValueError:
            value = math.nan
        if not value > above or (finite and not math.isfinite(value)):
            rule = f"must be a number above {above:g}" + ("" if finite else ", or inf")
            raise ConfigError(f"{self.where}: {column}", text, rule, "Correct the cell, or delete the row.")
        return value


def read_rows(named: Named, columns: Sequence[str]) -> list[Row]:
    """The rows of a CSV file that has at least `columns`; blank lines are left out.

    Raises:
        ConfigError: the file cannot be read, lacks a column or has one twice, or a row has too few or too many cells.
    """
    text = files.read_text(named)
    reader = csv.reader(io.StringIO(text.replace("\r\n", "\n").replace("\r", "\n")), strict=True)
    try:
        header = [cell.strip() for cell in next(reader, [])]
        missing = [name for name in columns if name not in header]
        if missing:
            needed = f"It needs {', '.join(columns)}."
            raise ConfigError(named.field, str(named.path), f"lacks column {', '.join(missing)}", needed)
        twice = [name for name in columns if header.count(name) > 1]
        if twice:
            raise ConfigError(named.at(1), twice[0], "is the name of two columns", "Rename or delete one of them.")
        rows = []
        for cells in reader:
            if len(cells) != len(header) and cells:
                rule = f"has {len(cells)} cells, and the header has {len(header)}"
                raise ConfigError(named.at(reader.line_num), ",".join(cells), rule, "Correct the row, or delete it.")
            if cells:
                rows.append(Row(where=named.at(reader.line_num), cells=dict(zip(header, cells, strict=True))))
    except csv.Error as error:
        rule = f"is not CSV: {printable(str(error))}"
        raise ConfigError(named.at(max(reader.line_num, 1)), None, rule, "Correct the line.") from None
    return rows
