"""SmartMoE for Megatron: expert-parallel GPT-MoE training whose load balancing never changes what is trained.

For a training script of your own:

    import megatron_smartmoe
    megatron_smartmoe.enable()  # before the first import of torch or Megatron

`enable`, `moe_spec`, `add_arguments`, `session` and `selftest` are imported when they are first used: importing this
package imports nothing else.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"
__all__ = ["__version__", "add_arguments", "enable", "moe_spec", "selftest", "session"]

_PLACES = {
    "enable": "door",
    "moe_spec": "door",
    "add_arguments": "door",
    "session": "session",
    "selftest": "selftest",
}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.adapter.{_PLACES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
