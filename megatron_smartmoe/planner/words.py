"""Reading a command line of Megatron's flags as the planner needs it: which flags are said, and what they say."""

from __future__ import annotations

import re
from collections.abc import Sequence

from megatron_smartmoe.errors import ConfigError
from megatron_smartmoe.spec.parallel import Recompute


def said(words: Sequence[str]) -> dict[str, list[str]]:
    """Flag -> its values; the last of a repeated flag wins, as in argparse."""
    said: dict[str, list[str]] = {}
    flag = ""
    for word in words:
        if word.startswith("--"):
            flag, _, value = word.partition("=")
            said[flag] = [value] if value else []
        elif flag:
            said[flag].append(word)
    return said


def number(flag: str, values: list[str]) -> int:
    """The value of a flag that takes one whole number.

    Raises:
        ConfigError: it is not one.
    """
    text = " ".join(values)
    if not text.isdigit() or int(text) < 0:
        raise ConfigError(flag, text, "must be a whole number", "Change it.")
    return int(text)


def recompute_of(given: dict[str, list[str]]) -> Recompute:
    """The nearest of the planner's modes."""
    granularity = " ".join(given.get("--recompute-granularity", []))
    modules = given.get("--recompute-modules", [])
    if granularity == "full":
        return "full"
    if granularity == "selective" and ("moe" in modules or "mlp" in modules):
        return "moe"
    if granularity == "selective" and ("moe_act" in modules or "layernorm" in modules):
        return "act"
    return "none"  # `core_attn`: fused attention keeps nothing that it would recompute


def layers_of_layout(text: str) -> tuple[int, ...]:
    """Layers of each chunk of Megatron's layout text, multiplications unrolled."""
    plain = text.replace(",", "")
    for pattern in (r"\(([^)]+)\)\*(\d+)", r"(.)\*(\d+)"):
        plain = re.sub(pattern, lambda match: match[1] * int(match[2]), plain)
    if set(plain) - set("Etm|L"):
        way_out = "For example: Ett|ttt|ttL."
        raise ConfigError("--pipeline-model-parallel-layout", text, "may hold E, t, m, L and | only", way_out)
    return tuple(part.count("t") for part in plain.split("|"))
