"""The folder of a benchmark that is resumed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def check_settings(out: Path, settings: Mapping[str, Any]) -> None:
    """Runs in one folder are of one model and one load; the folder says which.

    Raises:
        SystemExit: it has runs of another.
    """
    out.mkdir(parents=True, exist_ok=True)
    path = out / "settings.json"
    if not path.exists():
        path.write_text(json.dumps(settings, indent=2) + "\n")
    elif (before := json.loads(path.read_text())) != settings:
        changed = next(name for name in settings if before.get(name) != settings[name])
        rule = f"its runs have {changed} = {before.get(changed)}, not {settings[changed]}"
        raise SystemExit(f"--out {out}: {rule}. Pass another folder.")
