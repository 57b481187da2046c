"""`smartmoe`: runs a tool, and prints errors that a user can act on as one line."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from megatron_smartmoe.cli import (
    bench_imbalance,
    calibrate,
    checkpoint,
    convert,
    doctor,
    explain,
    plan,
    report,
    simulate,
    whatif,
)
from megatron_smartmoe.errors import EXIT_CONFIG_ERROR, SmartMoEError

EXIT_BROKEN_PIPE = 141  # as of a program that SIGPIPE ends, in a shell


def build_parser() -> argparse.ArgumentParser:
    """The parser of all tools."""
    parser = argparse.ArgumentParser(prog="smartmoe", description="Tools for MoE training with balanced experts.")
    tools = parser.add_subparsers(dest="tool", required=True, metavar="TOOL")
    plan.add_parser(tools)
    simulate.add_parser(tools)
    bench_imbalance.add_parser(tools)
    report.add_parser(tools)
    explain.add_parser(tools)
    whatif.add_parser(tools)
    calibrate.add_parser(tools)
    doctor.add_parser(tools)
    checkpoint.add_parser(tools)
    convert.add_parser(tools)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0 for success, 1 for a difference or damage, 2 for wrong input."""
    options = build_parser().parse_args(arguments)
    try:
        status = int(options.run(options))
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # the reader has seen enough, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_BROKEN_PIPE
    except SmartMoEError as error:
        print(f"smartmoe {options.tool}: {error}", file=sys.stderr)
        return EXIT_CONFIG_ERROR


if __name__ == "__main__":
    sys.exit(main())
