"""What the validation scripts share: their flags, CSV files with checked columns, and one line per wrong input."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from megatron_smartmoe.errors import EXIT_CONFIG_ERROR, SmartMoEError
from megatron_smartmoe.spec.readers.csv_rows import Row, read_rows
from megatron_smartmoe.spec.readers.files import Named


def parser_of(documentation: str | None, rows: str) -> argparse.ArgumentParser:
    """A parser with `--fit`, `--predict` and `--json`; `rows` says what a row of the CSV files is."""
    parser = argparse.ArgumentParser(description=(documentation or "").partition("\n")[0])
    parser.add_argument("--fit", type=Path, required=True, metavar="CSV", help=f"{rows} to fit the constants to")
    parser.add_argument("--predict", type=Path, required=True, metavar="CSV", help=f"{rows} to predict")
    parser.add_argument("--json", type=Path, required=True, metavar="FILE", help="where the result is written")
    return parser


def run(args: argparse.Namespace, validate: Callable[[argparse.Namespace], Mapping[str, object]]) -> int:
    """Validate, then write the result to `--json`; wrong input gives one line and exit status 2."""
    try:
        content = validate(args)
    except SmartMoEError as error:
        print(f"{Path(sys.argv[0]).stem}: {error}", file=sys.stderr)
        return EXIT_CONFIG_ERROR
    args.json.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return 0


def read_csv(path: Path, columns: Sequence[str], rows: str) -> list[Row]:
    """The rows of a CSV file that has at least `columns`.

    Raises:
        ConfigError: the file cannot be read, is not CSV, or lacks a column.
    """
    return read_rows(Named(path=path, field=rows, way_out="Give the path of a CSV file."), columns)
