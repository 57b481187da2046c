"""`megatron_smartmoe.selftest()`: which names of Megatron are hooked in this process, where, in which release."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_smartmoe.adapter import door, hooks
from megatron_smartmoe.errors import CompatError
from megatron_smartmoe.spec.megatron_names import NAMES


@dataclass(frozen=True, kw_only=True)
class HookState:
    """One name of Megatron.

    Attributes:
        name: in full.
        use: what the project needs it for.
        place: file of the module that was imported.
        state: `hooked`; `there` for one that is called, or hooked later or elsewhere only; `missing`;
            `optional` for one that is not there and need not be.
    """

    name: str
    use: str
    place: str
    state: str


@dataclass(frozen=True, kw_only=True)
class SelfTest:
    """What `selftest` found; its text is a table.

    Attributes:
        release: version of megatron-core.
        place: its folder.
        is_enabled: whether `enable()` was called, or our own entry runs.
        hooks: a row for each name.
    """

    release: str
    place: str
    is_enabled: bool
    hooks: tuple[HookState, ...]

    @property
    def missing(self) -> tuple[str, ...]:
        """The names that this Megatron lacks."""
        return tuple(hook.name for hook in self.hooks if hook.state == "missing")

    def __str__(self) -> str:
        number = sum(hook.state == "hooked" for hook in self.hooks)
        head = f"megatron-core {self.release} in {self.place}: {number} of {len(self.hooks)} names hooked"
        if not self.is_enabled:
            head += "; megatron_smartmoe.enable() was not called"
        width = max(len(hook.name) for hook in self.hooks)
        return "\n".join([head, *(f"  {hook.state:8} {hook.name:{width}}  {hook.use}" for hook in self.hooks)])


def selftest() -> SelfTest:
    """Look which names of Megatron are hooked. Names that only a run with `--smartmoe` hooks are so once it has begun.

    Returns:
        A table of them; `print(megatron_smartmoe.selftest())` shows it.

    Raises:
        CompatError: Megatron cannot be imported.
    """
    try:
        package = importlib.import_module("megatron.core.package_info")
    except ImportError as error:
        raise CompatError(
            f"megatron_smartmoe.selftest(): import megatron.core = {type(error).__name__}: {error}. Put a checkout of "
            "Megatron-LM on PYTHONPATH, or pip install megatron-core."
        ) from error
    replaced = set(hooks.replaced_names())
    rows = []
    for wanted in NAMES:
        found = _find(wanted.module, wanted.name)
        name = wanted.full
        if found is None and wanted.instead is not None:
            found, name = _find(wanted.module, wanted.instead), f"{wanted.module}.{wanted.instead}"
        lacking = "optional" if wanted.is_optional else "missing"
        state = lacking if found is None else "hooked" if name in replaced else "there"
        rows.append(HookState(name=name, use=wanted.use, place=found or "", state=state))
    return SelfTest(
        release=str(package.__version__),
        place=str(Path(str(package.__file__)).parents[2]),
        is_enabled=door.is_open(),
        hooks=tuple(rows),
    )


def _find(module: str, name: str) -> str | None:
    """The file of the module, if it has the name."""
    try:
        holder: Any = importlib.import_module(module)
        place = str(holder.__file__)
        for part in name.split("."):
            holder = getattr(holder, part)
    except (ImportError, AttributeError):
        return None
    return place
