"""`smartmoe report`: a run as one HTML file that opens from disk.

Losses, step times, balance with and without replicas, loads over time where the counts were recorded, where the experts
are, and every decision with its predicted and measured gain. It works while the run trains, too.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import time
from pathlib import Path
from typing import Any

from megatron_smartmoe.errors import ConfigError

_LEAST_S, _MOST_S = 1, 3600


def add_parser(tools: Any) -> None:
    """Add the subcommand to the parser of the tools."""
    parser = tools.add_parser("report", help="show a run as one HTML file", description=__doc__)
    add = parser.add_argument
    add("run_dir", metavar="RUN", type=Path, help="run directory, of a run that has ended or that trains")
    add("--compare", type=Path, metavar="RUN2", help="draw another run beside it")
    text = "routing trace of RUN, for its loads over time (default: the one that --smartmoe-record-trace wrote)"
    add("--trace", type=Path, metavar="FILE", help=text)
    add("--output", type=Path, metavar="FILE", help="file to write (default: report.html in RUN)")
    text = (
        "write the page again every SECONDS, and let the browser load it again, until the run has ended (default: 10)"
    )
    add("--live", type=int, nargs="?", const=10, metavar="SECONDS", help=text)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Run the tool."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("report", None, "needs matplotlib for its charts", "Run pip install matplotlib.")
    output = options.output or options.run_dir / "report.html"
    if options.output is not None and not os.path.isdir(output.parent):
        raise ConfigError(
            "--output", str(output), f"there is no directory {output.parent}", f"Run mkdir -p {output.parent}."
        )
    if options.live is not None and not _LEAST_S <= options.live <= _MOST_S:
        rule = f"must be from {_LEAST_S} to {_MOST_S} seconds"
        raise ConfigError("--live", options.live, rule, "For example: --live 10.")
    is_finished = _write(options, output)
    print(f"report: {output}", flush=True)
    if options.live is not None and not is_finished:
        print(f"report: written again every {options.live} s until the run has ended; Ctrl-C stops that", flush=True)
        try:
            while not is_finished:
                time.sleep(options.live)
                is_finished = _write(options, output)
        except KeyboardInterrupt:
            _write(argparse.Namespace(**{**vars(options), "live": None}), output)  # a page that waits for no more
    return 0


def _write(options: argparse.Namespace, output: Path) -> bool:
    """Write the page, whole or not at all; returns whether the run has ended."""
    from megatron_smartmoe.report.page import page  # matplotlib is slow to import
    from megatron_smartmoe.report.run_record import read_run

    runs = [read_run(options.run_dir, options.trace)]
    if options.compare is not None:
        runs.append(read_run(options.compare))
    refresh_s = None if runs[0].is_finished else options.live
    part = output.with_name(f"{output.name}.part")
    try:
        part.write_text(page(runs, refresh_s=refresh_s), encoding="utf-8")
        part.replace(output)
    except OSError as error:
        raise ConfigError(
            "--output", str(output), f"cannot be written: {error.strerror}", "Name another file."
        ) from None
    return runs[0].is_finished
