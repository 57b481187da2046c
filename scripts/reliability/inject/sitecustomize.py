"""Put into a rank's PYTHONPATH by the fault harness: when Megatron's loop gets its callbacks, the fault is one more.

Python imports a module of this name at its start. It does nothing but in a rank whose environment holds a fault, and
there it waits for one module of the product to be imported.
"""

import importlib.abc
import importlib.machinery
import json
import os
import sys
from collections.abc import Sequence
from types import ModuleType

_VARIABLE, _MODULE = "SMARTMOE_INJECTED_FAULT", "megatron_smartmoe.adapter.hooks"


class _Loader(importlib.abc.Loader):
    def __init__(self, loader: importlib.abc.Loader) -> None:
        self._loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        attach = module.attach

        def attach_with_fault(callbacks: object) -> None:
            from scripts.reliability.fault_points import Order, install

            attach([*callbacks, install(Order(**json.loads(os.environ[_VARIABLE])))])  # type: ignore[misc]

        module.attach = attach_with_fault  # type: ignore[attr-defined]


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != _MODULE:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


if _VARIABLE in os.environ and "RANK" in os.environ:
    sys.meta_path.insert(0, _Finder())
