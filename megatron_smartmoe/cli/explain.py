"""`smartmoe explain`: why a decision of a run was made, what it was made from, and what came of it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from megatron_smartmoe.errors import ConfigError


def add_parser(tools: Any) -> None:
    """Add the subcommand to the parser of the tools."""
    parser = tools.add_parser("explain", help="explain a decision of a run", description=__doc__)
    add = parser.add_argument
    add("run_dir", metavar="RUN", type=Path, help="run directory, of a run that has ended or that trains")
    add("--iteration", type=int, required=True, metavar="N", help="iteration before which the decision takes effect")
    add("--layer", type=int, metavar="L", help="show this layer alone, counted from 1 (default: all)")
    text = "routing trace of RUN, for its loads (default: the one that --smartmoe-record-trace wrote)"
    add("--trace", type=Path, metavar="FILE", help=text)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Run the tool."""
    from megatron_smartmoe.report.explain import explain
    from megatron_smartmoe.report.run_record import read_run

    if options.layer is not None and options.layer < 1:
        raise ConfigError("--layer", options.layer, "must be at least 1", "Layers are counted from 1: --layer 1.")
    record = read_run(options.run_dir, options.trace)
    print(explain(record, options.run_dir, options.iteration, options.layer))
    return 0
