"""Started by `smartmoe simulate --replay RUN`, which needs no torch for anything else."""

from __future__ import annotations

import sys

from megatron_smartmoe.errors import EXIT_CONFIG_ERROR, SmartMoEError
from megatron_smartmoe.runtime.decisions.command import main

if __name__ == "__main__":
    try:
        sys.exit(main())
    except SmartMoEError as error:
        print(f"smartmoe simulate: {error}", file=sys.stderr)
        sys.exit(EXIT_CONFIG_ERROR)
