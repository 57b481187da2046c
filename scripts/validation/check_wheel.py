#!/usr/bin/env python3
"""Install a wheel where there is no compiler, and call its compiled ops, under one torch after the other.

    python scripts/validation/check_wheel.py megatron_smartmoe-*.whl --torch 2.10.0 --torch 2.11.0

Each torch gets an environment of its own in a temporary folder: about 8 GB and some minutes, of which pip needs most.
PATH leads to nothing but that environment, so neither pip nor the package can find a compiler, nvcc or git. Megatron is
not installed: the ops need none. `--examine` checks the installation of the Python that runs it, and installs nothing.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import venv
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def main(argv: Sequence[str] | None = None) -> int:
    """Check the wheel under each torch; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("wheel", type=Path, nargs="?", help="the wheel")
    parser.add_argument("--torch", action="append", metavar="VERSION", help="a release of torch; may be repeated")
    parser.add_argument("--examine", action="store_true", help="check the installation of this Python")
    options = parser.parse_args(argv)
    if options.examine:
        print(examine())
        return 0
    if options.wheel is None or not options.wheel.is_file() or not options.torch:
        parser.error("a wheel and at least one --torch VERSION are required")
    return max(check(options.wheel.resolve(), version) for version in options.torch)


def check(wheel: Path, version: str) -> int:
    """Install torch and the wheel in an empty environment and call the ops there."""
    with tempfile.TemporaryDirectory(prefix="check-wheel-") as folder:
        venv.create(folder, with_pip=True)
        python = Path(folder) / "bin" / "python"
        environment = {**os.environ, "PATH": str(python.parent), "PYTHONPATH": ""}
        pip = [str(python), "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-cache-dir"]
        for command in (
            [*pip, f"torch=={version}", "numpy"],
            [*pip, "--no-deps", str(wheel)],
            [str(python), str(Path(__file__).resolve()), "--examine"],
        ):
            done = subprocess.run(command, env=environment, cwd=folder, check=False)
            if done.returncode:
                print(f"torch {version}: failed: {' '.join(command)}", file=sys.stderr)
                return 1
    return 0


def examine() -> str:
    """Call every op of the installed package and compare it with its twin; returns a line about what was found.

    Raises:
        SystemExit: a compiler is at hand, the ops are not the compiled ones, or one computes something else.
    """
    if found := [name for name in ("cc", "gcc", "g++", "clang", "nvcc") if shutil.which(name)]:
        raise SystemExit(f"error: {', '.join(found)} can be found on PATH: this is no machine without compilers")
    warnings.simplefilter("error")
    import torch

    from megatron_smartmoe import ops
    from megatron_smartmoe.ops import reference

    if not ops.backend().startswith("compiled"):
        raise SystemExit(f"error: the ops are served by: {ops.backend()}")
    torch.manual_seed(0)
    ids_TK, slot_of_E = torch.randint(0, 8, (50, 2), dtype=torch.int32), torch.randperm(8).int()
    rows_TK, _ = reference.dispatch_map(ids_TK, slot_of_E, 8)
    x_TH, y_NH, weights_TK = torch.randn(50, 16), torch.randn(100, 16), torch.rand(50, 2)
    calls: dict[str, tuple[object, ...]] = {
        "dispatch_map": (ids_TK, slot_of_E, 8),
        "permute": (x_TH, rows_TK, 100),
        "unpermute": (y_NH, rows_TK, weights_TK),
        "unpermute_backward": (x_TH, y_NH, rows_TK, weights_TK),
    }
    for name, arguments in calls.items():
        found, expected = getattr(torch.ops.smartmoe, name)(*arguments), getattr(reference, name)(*arguments)
        # rows are copied; sums over a row may be taken in another order
        pairs = zip(_tuple(found), _tuple(expected), strict=True)
        if not all(torch.allclose(one, other, rtol=1e-5) for one, other in pairs):
            raise SystemExit(f"error: {name} is another function than its twin in torch")
    counts_RE = torch.tensor([[6, 2], [4, 0]])
    tokens_RER = ops.min_max_split(counts_RE, torch.tensor([[True, True], [False, True]]))
    if tokens_RER.sum().item() != counts_RE.sum().item():
        raise SystemExit("error: min_max_split loses tokens")
    where = Path(ops.__file__).parent
    return f"torch {torch.__version__}: {ops.backend()}, {len(calls) + 1} ops called, in {where}"


def _tuple(result: Any) -> tuple[Any, ...]:
    return result if isinstance(result, tuple) else (result,)


if __name__ == "__main__":
    sys.exit(main())
