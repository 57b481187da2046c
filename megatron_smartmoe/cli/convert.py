"""`smartmoe convert`: models in and out, from and to Hugging Face folders and Megatron's checkpoints.

One slice of a tensor is in memory at a time for each worker, whatever the size of the model. OUT appears whole or not
at all; a conversion that was killed resumes when it is started again.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from typing import Any

from megatron_smartmoe.convert.options import ConvertOptions, add_arguments, as_argv

# Started, not imported: it imports torch, which no other tool of this package needs.
_MODULE = "megatron_smartmoe.convert"


def add_parser(tools: Any) -> None:
    """Add the subcommand to the parser of the tools."""
    help_text = "convert models from and to Hugging Face and Megatron"
    parser = tools.add_parser("convert", help=help_text, description=__doc__)
    add_arguments(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Check the options, then let a process with torch convert."""
    argv = as_argv(ConvertOptions.of(options))
    return subprocess.run([sys.executable, "-m", _MODULE, *argv], check=False).returncode
