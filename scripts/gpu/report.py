"""How a step of the check says what it measured."""

from __future__ import annotations

import json

from scripts.gpu.check import RESULT


def report(what: str, value: float, unit: str = "") -> None:
    """Print one measurement on a line that `check` reads."""
    print(RESULT + json.dumps({"what": what, "value": float(f"{value:.4g}"), "unit": unit}), flush=True)
