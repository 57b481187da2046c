"""`smartmoe calibrate`: measure this machine and write the cluster file that plans and training use its prices from.

One rank per GPU (on a CPU, one per core) measures, all at the same time: the experts' matrix products over tokens per
expert, copies in memory, and all-to-all, all-reduce and messages inside nodes and between them. A line is fitted
robustly to each; the file states for every number what was measured, how, and how far the line is off. On several
nodes, run it in a Slurm allocation, or start the ranks with
`torchrun --nnodes N ... -m megatron_smartmoe.adapter.launch.calibrate [the same options]`.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from typing import Any

from megatron_smartmoe.calibrate.options import CalibrateOptions, add_arguments, as_argv

# Started, not imported: it imports torch, which no other tool of this package needs.
_MODULE = "megatron_smartmoe.adapter.launch.calibrate"


def add_parser(tools: Any) -> None:
    """Add the subcommand to the parser of the tools."""
    parser = tools.add_parser("calibrate", help="measure this machine, write its cluster file", description=__doc__)
    add_arguments(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Check the options, then let the ranks measure."""
    argv = as_argv(CalibrateOptions.of(options))
    return subprocess.run([sys.executable, "-m", _MODULE, *argv], check=False).returncode
