"""What the validation scripts share: their flags, CSV files with checked columns, and one line per wrong input."""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from megatron_smartmoe.errors import EXIT_CONFIG_ERROR, ConfigError, SmartMoEError


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


def read_csv(path: Path, columns: Sequence[str], rows: str) -> list[dict[str, str]]:
    """The rows of a CSV file that has at least `columns`.

    Raises:
        ConfigError: the file is missing, or lacks a column.
    """
    if not path.is_file():
        raise ConfigError(rows, str(path), "does not exist", "Give the path of a CSV file.")
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        missing = [name for name in columns if name not in (reader.fieldnames or ())]
        if missing:
            way_out = f"It needs {', '.join(columns)}."
            raise ConfigError(rows, str(path), f"lacks column {', '.join(missing)}", way_out)
        return list(reader)
