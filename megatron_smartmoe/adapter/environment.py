"""What an environment has that was not made from the pinned packages: scripts/setup.sh runs this at its end.

Each line says what was imported and where it comes from; what training would stop at is an error here already.
`smartmoe doctor` looks at far more, the machine among it.
"""

from __future__ import annotations

import importlib.metadata
import sys
from pathlib import Path

from megatron_smartmoe.errors import SmartMoEError


def main() -> int:
    """Print the lines; returns the exit status."""
    try:
        for line in lines():
            print(f"setup: {line}")
    except SmartMoEError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def lines() -> list[str]:
    """What is there, a line each.

    Raises:
        CompatError: a package is broken, or the GPUs cannot be used with this torch.
    """
    import torch

    from megatron_smartmoe import ops
    from megatron_smartmoe.adapter.flags.parser import has_apex, has_transformer_engine
    from megatron_smartmoe.adapter.gpus import refuse_unusable_gpus

    gpus = "no GPU here"
    if torch.cuda.is_available():
        gpus = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    else:
        refuse_unusable_gpus("auto")
    built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
    used = {"TransformerEngine": has_transformer_engine(), "apex": has_apex()}
    return [
        f"checked: torch {torch.__version__}, {built} ({_place(torch.__file__)}): {gpus}",
        f"checked: megatron-core {importlib.metadata.version('megatron-core')} ({_place_of('megatron.core')})",
        *(f"checked: {name} {'can be imported' if there else 'is not used'}" for name, there in used.items()),
        f"checked: the ops are {ops.backend()}",
    ]


def _place_of(module: str) -> str:
    from importlib.util import find_spec

    spec = find_spec(module)
    return _place(spec.origin if spec else None)


def _place(file: str | None) -> str:
    """The folder that a package is installed in: .venv's own, or that of the environment below it."""
    folder = next((path for path in Path(file or "").parents if path.name.endswith("-packages")), None)
    return "unknown" if folder is None else str(folder)


if __name__ == "__main__":
    sys.exit(main())
