"""Parallel launches in short: `1`, `EP2`, `EP4xPP2`, `TP2`."""

from __future__ import annotations

import re
from dataclasses import dataclass

from megatron_smartmoe.errors import ConfigError

_PART = re.compile(r"(TP|PP|EP)([1-9]\d{0,2})")
_FLAGS = {
    "TP": "--tensor-model-parallel-size",
    "PP": "--pipeline-model-parallel-size",
    "EP": "--expert-model-parallel-size",
}


@dataclass(frozen=True, kw_only=True)
class Launch:
    """A number of ranks and what each does.

    Attributes:
        name: as the user wrote it.
        num_ranks: of the job.
        flags: Megatron's.
    """

    name: str
    num_ranks: int
    flags: tuple[str, ...]


def launch_of(text: str) -> Launch:
    """The launch that a text stands for.

    Raises:
        ConfigError: it stands for none.
    """
    if text == "1":
        return Launch(name="1 rank", num_ranks=1, flags=())
    sizes: dict[str, int] = {}
    for part in text.split("x"):
        found = _PART.fullmatch(part)
        if found is None or found[1] in sizes:
            rule = "must be 1, or sizes of TP, PP and EP with x between them"
            raise ConfigError("--verify", text, rule, "For example: --verify 1 EP4xPP2.")
        sizes[found[1]] = int(found[2])
    tensor, expert = sizes.get("TP", 1), sizes.get("EP", 1)
    if max(tensor, expert) % min(tensor, expert):
        raise ConfigError("--verify", text, "one of TP and EP must divide the other", "For example: --verify TP2xEP4.")
    flags = [token for name, size in sizes.items() for token in (_FLAGS[name], str(size))]
    if tensor > 1:
        flags += ["--sequence-parallel", "--expert-tensor-parallel-size", "1"]
    return Launch(name=text, num_ranks=sizes.get("PP", 1) * max(tensor, expert), flags=tuple(flags))
