"""Checks of the files that a tool writes, made before the minutes of work that they are of."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

from megatron_smartmoe.errors import ConfigError

PLOTS = (".svg", ".png", ".pdf")


def check_folder(flag: str, path: Path | None) -> None:
    """Check that a file can be written where a flag says; None for no file.

    Raises:
        ConfigError: there is no such folder.
    """
    if path is not None and not os.path.isdir(path.parent):
        raise ConfigError(flag, str(path), f"there is no directory {path.parent}", f"Run mkdir -p {path.parent}.")


def check_plot(path: Path | None, example: str) -> None:
    """Check what `--plot` names, and that it can be drawn; None for no plot.

    Args:
        path: value of the flag.
        example: a name that would do.

    Raises:
        ConfigError: the folder, the kind of file or matplotlib is missing.
    """
    if path is None:
        return
    check_folder("--plot", path)
    if path.suffix not in PLOTS:
        raise ConfigError("--plot", str(path), "must end in .svg, .png or .pdf", f"For example: --plot {example}.")
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("--plot", str(path), "needs matplotlib", "Run pip install matplotlib, or drop --plot.")
