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
    options = parser.parse_args(argv)
    try:
        return convert(ConvertOptions.of(options))
    except SmartMoEError as error:
        print(f"smartmoe convert: {error}", file=sys.stderr)
    except OSError as error:  # a disk that is full after all, or went away
        what = f"{error.filename or options.out}: {error.strerror or error}"
        print(f"smartmoe convert: {what}. Start it again to resume, with room on the disk.", file=sys.stderr)
    except KeyboardInterrupt:
        print("smartmoe convert: interrupted. Start it again to resume.", file=sys.stderr)
    return EXIT_CONFIG_ERROR


if __name__ == "__main__":
    sys.exit(main())
