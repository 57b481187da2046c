"""The process of `smartmoe convert`, which imports torch."""

from __future__ import annotations

import argparse
import sys

from megatron_smartmoe.convert.command import convert
from megatron_smartmoe.convert.options import ConvertOptions, add_arguments
from megatron_smartmoe.errors import EXIT_CONFIG_ERROR, SmartMoEError


def main(argv: list[str] | None = None) -> int:
    """Convert; returns the exit status."""
    parser = argparse.ArgumentParser(prog="smartmoe convert")
    add_arguments(parser)
    try:
        return convert(ConvertOptions.of(parser.parse_args(argv)))
    except SmartMoEError as error:
        print(f"smartmoe convert: {error}", file=sys.stderr)
        return EXIT_CONFIG_ERROR


if __name__ == "__main__":
    sys.exit(main())
