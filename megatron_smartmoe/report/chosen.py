"""What a run chose when it started, where its flags left that to it: launch.json in its directory.

arguments.txt has the flags as they were given, `auto` among them. Who predicts from a run needs what it did.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_smartmoe.errors import ConfigError
from megatron_smartmoe.spec.parallel import Dispatch
from megatron_smartmoe.spec.readers.files import Named
from megatron_smartmoe.spec.readers.json_text import read_object
from megatron_smartmoe.spec.readers.values import build

FILE = "launch.json"
_WAY_OUT = "Take it away, or restore it."


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """How a run exchanges tokens.

    Attributes:
        dispatch: of --smartmoe-dispatch.
        overlap_degree: of --smartmoe-overlap-degree, at the start.
        ranks_per_node: ranks on each node, as the ranks counted them.
    """

    dispatch: Dispatch
    overlap_degree: int
    ranks_per_node: int

    def to_text(self) -> str:
        """JSON that `read_chosen` reads back."""
        return json.dumps(asdict(self), indent=1) + "\n"


def read_chosen(directory: Path) -> Chosen | None:
    """What the run in a directory chose; None where earlier releases wrote it, or stock Megatron's layers trained.

    Raises:
        ConfigError: the file is damaged.
    """
    path = directory / FILE
    if not path.is_file():
        return None
    content = read_object(Named(path=path, field="RUN", way_out=_WAY_OUT))
    chosen = build(Chosen, content, str(path), _WAY_OUT, known_only=False)
    for name in ("overlap_degree", "ranks_per_node"):
        if getattr(chosen, name) < 1:
            raise ConfigError(f"{path}.{name}", getattr(chosen, name), "must be at least 1", _WAY_OUT)
    return chosen
