"""`smartmoe report`: a run as one HTML file that opens from disk.

Losses, step times, balance with and without replicas, loads over time where the counts were recorded, where the experts
are, and every decision with its predicted and realised gain. It works while the run trains, too. Of a routing trace, of
stock Megatron's too, it shows what balancing would have given, by the simulator.
"""

from __future__ import annotations

import argparse
import importlib.util
import time
from pathlib import Path
from typing import Any

from megatron_smartmoe.cli.outputs import check_folder
from megatron_smartmoe.errors import ConfigError

_LEAST_S, _MOST_S = 1, 3600


def add_parser(tools: Any) -> None:
    """Add the subcommand to the parser of the tools."""
    parser = tools.add_parser("report", help="show a run as one HTML file", description=__doc__)
    add = parser.add_argument
    text = "run directory, of a run that has ended or that trains; or, with --ep, a routing trace"
    add("run_dir", metavar="RUN", type=Path, help=text)
    add("--compare", type=Path, metavar="RUN2", help="draw another run beside it")
    text = "routing trace of RUN, for its loads over time (default: the one that --smartmoe-record-trace wrote)"
    add("--trace", type=Path, metavar="FILE", help=text)
    add("--output", type=Path, metavar="FILE", help="file to write (default: report.html in RUN)")
    text = (
        "write the page again every SECONDS, and let the browser load it again, until the run has ended (default: 10)"
    )
    add("--live", type=int, nargs="?", const=10, metavar="SECONDS", help=text)
    add("--ep", type=int, metavar="R", help="of a routing trace: ranks of an expert-parallel group")
    add("--spare-slots", type=int, metavar="K", help="of a routing trace: replica slots per rank (default: 1)")
    text = "of a routing trace: machine for predicted times, a file or the name of a shipped one (default: H100)"
    add("--cluster", type=Path, metavar="YAML", help=text)
    text = (
        "run directory of the same launch with --moe-router-force-load-balancing: what share of its step time was "
        "reached, and where the rest went"
    )
    add("--ideal", type=Path, metavar="RUN2", help=text)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Run the tool."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("report", None, "needs matplotlib for its charts", "Run pip install matplotlib.")
    is_trace = not (options.run_dir / "metrics.jsonl").is_file() and options.run_dir.exists() and options.ep is not None
    beside = options.run_dir.with_suffix(".html") if is_trace else options.run_dir / "report.html"
    output = options.output or beside
    check_folder("--output", options.output)
    if options.live is not None and not _LEAST_S <= options.live <= _MOST_S:
        rule = f"must be from {_LEAST_S} to {_MOST_S} seconds"
        raise ConfigError("--live", options.live, rule, "For example: --live 10.")
    for name in ("spare_slots", "cluster", "ep"):
        if not is_trace and getattr(options, name) is not None:
            flag = "--" + name.replace("_", "-")
            raise ConfigError(flag, getattr(options, name), "is for a routing trace", f"Remove {flag}.")
    if is_trace:
        _write_trace(options, output)
        return 0
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


def _write_trace(options: argparse.Namespace, output: Path) -> None:
    from megatron_smartmoe.cli.report_trace import simulated_run
    from megatron_smartmoe.report.page import page

    for name in ("compare", "trace", "live", "ideal"):
        flag, value = f"--{name}", getattr(options, name)
        if value is not None:
            raise ConfigError(flag, str(value), "is for a run directory", f"Remove {flag}.")
    spare_slots = 1 if options.spare_slots is None else options.spare_slots
    for flag, value, least in (("--ep", options.ep, 2), ("--spare-slots", spare_slots, 0)):
        if not least <= value <= 4096:
            raise ConfigError(flag, value, f"must be from {least} to 4,096", f"For example: {flag} {max(least, 1)}.")
    run = simulated_run(options.run_dir, ep=options.ep, spare_slots=spare_slots, cluster=options.cluster)
    output.write_text(page([run]), encoding="utf-8")
    print(f"report: {output}", flush=True)


def _write(options: argparse.Namespace, output: Path) -> bool:
    """Write the page, whole or not at all; returns whether the run has ended."""
    from megatron_smartmoe.report.account import read_account, summary_text
    from megatron_smartmoe.report.page import page  # matplotlib is slow to import
    from megatron_smartmoe.report.run_record import read_run

    runs = [read_run(options.run_dir, options.trace)]
    if options.compare is not None:
        runs.append(read_run(options.compare))
    accounts = [read_account(options.run_dir, options.ideal)]
    accounts += [read_account(options.compare)] if options.compare is not None else []
    refresh_s = None if runs[0].is_finished else options.live
    part = output.with_name(f"{output.name}.part")
    try:
        part.write_text(page(runs, accounts=accounts, refresh_s=refresh_s), encoding="utf-8")
        part.replace(output)
    except OSError as error:
        raise ConfigError(
            "--output", str(output), f"cannot be written: {error.strerror}", "Name another file."
        ) from None
    if options.ideal is not None and accounts[0] is not None and refresh_s is None:
        print(summary_text(accounts[0].account))
    return runs[0].is_finished
