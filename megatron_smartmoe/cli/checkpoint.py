"""`smartmoe checkpoint`: verify, show and compare checkpoints, without torch and without running what is in them.

verify reads everything and exits with 1 if something is damaged; show prints what a checkpoint holds; compare says
which experts and parameters of two checkpoints differ, and how far, whatever their layouts. A checkpoint is given as
the directory that --load would name, or as the folder of one iteration.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megatron_smartmoe.checkpoint.compare import compare
from megatron_smartmoe.checkpoint.contents import Contents
from megatron_smartmoe.checkpoint.directory import (
    RELEASE,
    folder_of,
    iteration_of,
    iterations,
    listed,
    read_tracker,
)
from megatron_smartmoe.checkpoint.manifest import Manifest, read_manifest
from megatron_smartmoe.checkpoint.reader import read_contents
from megatron_smartmoe.checkpoint.verify import verify
from megatron_smartmoe.cli import checkpoint_text as text
from megatron_smartmoe.errors import CheckpointError, ConfigError

EXIT_DIFFERENT = 1  # verify found damage, or compare found a difference


def add_parser(tools: Any) -> None:
    """Add the subcommand to the parser of the tools."""
    parser = tools.add_parser("checkpoint", help="verify, show or compare checkpoints", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    verifier = commands.add_parser(
        "verify",
        help="read a whole checkpoint and say what is damaged",
        description="Check files, digests and optimizer state of a checkpoint. Exit status: 0 if it is whole, 1 if it "
        "is damaged, 2 for a wrong command line.",
    )
    _add_directory(verifier, "DIR")
    help_text = "check the files alone: sizes and checksums (default: the numbers too)"
    verifier.add_argument("--files-only", action="store_true", help=help_text)
    _add_json(verifier)
    verifier.set_defaults(run=_verify)

    shower = commands.add_parser("show", help="print iteration, sizes, arguments and placement of a checkpoint")
    _add_directory(shower, "DIR")
    shower.add_argument("--all", action="store_true", help="print all arguments of the run that saved it")
    _add_json(shower)
    shower.set_defaults(run=_show)

    comparer = commands.add_parser(
        "compare",
        help="say which parameters of two checkpoints differ, and how far",
        description="Compare two checkpoints parameter by parameter and expert by expert, whatever their parallelism, "
        "placement and format. Exit status: 0 if they are equal to the bit, 1 if not, 2 for a wrong command line.",
    )
    for name in ("A", "B"):
        _add_directory(comparer, name)
    help_text = "print at most N differing parameters, the largest relative difference first (default: 20)"
    comparer.add_argument("--most", type=int, default=20, metavar="N", help=help_text)
    help_text = "read the numbers of both, whatever the digests in their manifests say"
    comparer.add_argument("--read-all", action="store_true", help=help_text)
    _add_json(comparer)
    comparer.set_defaults(run=_compare)


def _add_directory(parser: argparse.ArgumentParser, name: str) -> None:
    help_text = "directory of checkpoints (its tracker names the iteration) or the folder of one iteration"
    parser.add_argument(name.lower(), type=Path, metavar=name, help=help_text)
    option = "--iteration" if name == "DIR" else f"--iteration-{name.lower()}"
    help_text = f"iteration in {name} (default: the one that its tracker names)"
    parser.add_argument(option, type=int, metavar="N", help=help_text, dest=f"iteration_{name.lower()}")


def _add_json(parser: argparse.ArgumentParser) -> None:
    help_text = "write the result as JSON; - prints it instead of the text"
    parser.add_argument("--json", type=Path, metavar="FILE", help=help_text)


def _verify(options: argparse.Namespace) -> int:
    folder = checkpoint_folder("DIR", options.dir, options.iteration_dir)
    result = verify(folder, _progress("verify"), files_only=options.files_only)
    _print(options, text.verification(result), text.verification_json(result))
    return 0 if result.is_whole else EXIT_DIFFERENT


def _show(options: argparse.Namespace) -> int:
    folder = checkpoint_folder("DIR", options.dir, options.iteration_dir)
    contents, manifest = _read("DIR", folder)
    lines = text.contents(contents, manifest, all_arguments=options.all)
    _print(options, lines, text.contents_json(contents, manifest))
    return 0


def _compare(options: argparse.Namespace) -> int:
    if options.most < 0:
        raise ConfigError("--most", options.most, "must be at least 0", "For example: --most 100.")
    folders = [checkpoint_folder(name, path, step) for name, path, step in (
        ("A", options.a, options.iteration_a), ("B", options.b, options.iteration_b)
    )]  # fmt: skip
    (first, manifest_a), (second, manifest_b) = (
        _read(name, folder) for name, folder in zip("AB", folders, strict=True)
    )
    manifests = (None, None) if options.read_all else (manifest_a, manifest_b)
    result = compare(first, second, manifests, _progress("compare"))
    lines = text.comparison(result, first.folder, second.folder, options.most)
    _print(options, lines, text.comparison_json(result, first.folder, second.folder))
    return 0 if result.is_equal else EXIT_DIFFERENT


def checkpoint_folder(name: str, path: Path, iteration: int | None) -> Path:
    """The folder of one iteration that a command line names.

    Raises:
        ConfigError: there is none.
    """
    if iteration is None and (iteration_of(path) is not None or path.name == RELEASE) and path.is_dir():
        return path
    way_out = "Pass the directory that --load names, or a folder iter_NNNNNNN in it."
    if not path.is_dir():
        raise ConfigError(name, str(path), "is no directory", way_out)
    there = iterations(path)
    if there:
        way_out = f"Pass --iteration{'' if name == 'DIR' else f'-{name.lower()}'} N (found: {listed(there)})."
    if iteration is None:
        try:
            tracked = read_tracker(path)
        except CheckpointError as error:
            raise ConfigError(name, str(path), str(error), way_out) from None
        if tracked is None:
            raise ConfigError(name, str(path), "has no tracker, so no checkpoint in it is in force", way_out)
        folder = path / RELEASE if isinstance(tracked, str) else folder_of(path, tracked)
    else:
        folder = folder_of(path, iteration)
    if not folder.is_dir():
        raise ConfigError(name, str(path), f"there is no checkpoint {folder.name}", way_out)
    return folder


def _read(name: str, folder: Path) -> tuple[Contents, Manifest | None]:
    """Contents and manifest of a checkpoint that has to be readable."""
    try:
        return read_contents(folder), read_manifest(folder)
    except CheckpointError as error:
        way_out = f"Run smartmoe checkpoint verify {folder} for all that is wrong."
        raise ConfigError(name, str(folder), str(error), way_out) from None


def _progress(what: str) -> Callable[[list[Any]], Any]:
    """A progress bar on standard error, if that is a terminal."""
    return lambda items: tqdm(items, desc=what, unit="parameter", leave=False, disable=None)


def _print(options: argparse.Namespace, lines: list[str], content: dict[str, Any]) -> None:
    """Print the text, and write the JSON where --json says."""
    if options.json is None or str(options.json) != "-":
        print("\n".join(lines))
    if options.json is None:
        return
    encoded = json.dumps(content, indent=2) + "\n"
    if str(options.json) == "-":
        sys.stdout.write(encoded)
        return
    try:
        options.json.write_text(encoded, encoding="utf-8")
    except OSError as error:
        rule = f"cannot be written: {error.strerror}"
        raise ConfigError("--json", str(options.json), rule, "Pass another file.") from None
