"""`smartmoe`: runs a tool, and prints errors that a user can act on as one line."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from megatron_smartmoe.cli import calibrate, checkpoint, plan, simulate
from megatron_smartmoe.errors import EXIT_CONFIG_ERROR, SmartMoEError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0 for success, 1 for a difference or damage, 2 for wrong input."""
    parser = argparse.ArgumentParser(prog="smartmoe", description="Tools for MoE training with balanced experts.")
    tools = parser.add_subparsers(dest="tool", required=True, metavar="TOOL")
    plan.add_parser(tools)
    simulate.add_parser(tools)
    calibrate.add_parser(tools)
    checkpoint.add_parser(tools)
    options = parser.parse_args(arguments)
    try:
        return int(options.run(options))
    except SmartMoEError as error:
        print(f"smartmoe {options.tool}: {error}", file=sys.stderr)
        return EXIT_CONFIG_ERROR


if __name__ == "__main__":
    sys.exit(main())
