"""Rebinding names of Megatron, and that it happens in one file only."""

from __future__ import annotations

import ast
import functools
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_smartmoe.adapter import hooks
from megatron_smartmoe.errors import CompatError

PACKAGE = Path(hooks.__file__).parents[1]
HOOKS = "adapter/hooks.py"


@pytest.fixture
def module() -> Any:
    module: Any = types.ModuleType("megatron.some_module")

    def double(x: int, *, plus: int = 0) -> int:
        """Twice x."""
        return 2 * x + plus

    module.double = double
    return module


def test_rebinding_is_done_once(module: Any) -> None:
    for _ in range(2):
        hooks.rebind(module, "double", lambda call: lambda x: call(x) + 1)
    assert module.double(3) == 7
    assert module.double.__doc__ == "Twice x."


def test_hooks_with_different_keys_are_stacked(module: Any) -> None:
    for key in ("first", "second", "first", "second"):
        hooks.rebind(module, "double", lambda call: lambda x: call(x) + 1, key=key)
    assert module.double(3) == 8


def test_a_missing_name_is_an_error(module: Any) -> None:
    with pytest.raises(CompatError) as caught:
        hooks.rebind(module, "triple", lambda call: call)
    assert str(caught.value) == (
        "megatron.some_module.triple = missing: the project hooks it, and this Megatron does not have it. "
        "Use megatron-core 0.19.2 (pip install megatron-core==0.19.2), or a checkout of core_v0.17.1, core_v0.18.2, "
        "core_v0.19.0."
    )


def test_names_are_replaced_together_or_not_at_all(module: Any) -> None:
    module.found = False
    hooks.replace_names(module, {"found": True})
    assert module.found
    with pytest.raises(CompatError, match=r"some_module\.lost = missing"):
        hooks.replace_names(module, {"found": False, "lost": 1})
    assert module.found


def test_all_missing_names_of_the_loop_are_listed(module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in set(hooks._LOOP_NAMES) - {"evaluate", "train_step"}:
        setattr(module, name, module.double)
    monkeypatch.setattr("importlib.import_module", lambda name: module)
    with pytest.raises(CompatError, match=r"some_module\.train_step, megatron\.some_module\.evaluate = missing"):
        hooks.attach([])


def test_callbacks_are_called_in_their_order() -> None:
    names = [name for name in vars(hooks.Order) if name.isupper()]
    callbacks = []
    for name in reversed(names):
        callback = hooks.Callback()
        callback.order = hooks.Order[name]  # type: ignore[misc]
        callbacks.append(callback)
    assert [callback.order for callback in hooks._Loop(callbacks).callbacks] == sorted(hooks.Order)


@functools.cache
def sources() -> list[tuple[str, ast.Module]]:
    """Every module of the package but hooks.py: path and tree."""
    paths = {path.relative_to(PACKAGE).as_posix(): path for path in sorted(PACKAGE.rglob("*.py"))}
    return [(name, ast.parse(path.read_text(encoding="utf-8"))) for name, path in paths.items() if name != HOOKS]


def megatron_names(tree: ast.AST) -> set[str]:
    """Names that a module binds by importing from Megatron."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.asname or "megatron" for alias in node.names if alias.name.split(".")[0] == "megatron"}
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "megatron":
            found |= {alias.asname or alias.name for alias in node.names}
    return found


def root(node: ast.AST) -> str | None:
    """The name that a chain of attributes begins with."""
    while isinstance(node, ast.Attribute):
        node = node.value
    return node.id if isinstance(node, ast.Name) else None


def assignments(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Names of Megatron that a module assigns to: by `=`, `setattr`, or a hook of its own."""
    names = megatron_names(tree)
    for node in ast.walk(tree):
        targets: list[ast.expr] = []
        if isinstance(node, ast.Assign):
            targets = [each for target in node.targets for each in getattr(target, "elts", [target])]
        elif isinstance(node, ast.AugAssign | ast.AnnAssign):
            targets = [node.target]
        elif isinstance(node, ast.Call) and node.args:
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("setattr", "rebind", "replace_names", "object"):
                first = node.args[0]
                if root(first) in names:
                    yield ast.unparse(node), node.lineno
        for target in targets:
            if isinstance(target, ast.Attribute) and root(target) in names:
                yield ast.unparse(target), target.lineno


def test_the_search_finds_assignments() -> None:
    text = (
        "import megatron.core.optimizer as optimizer\nfrom megatron.training import training\n"
        "optimizer.Adam, optimizer.X = 1, 2\nsetattr(training, 'train', 3)\ntraining.y = 4\nother.z = 5\n"
    )
    found = [what for what, _ in assignments(ast.parse(text))]
    assert sorted(found) == ["optimizer.Adam", "optimizer.X", "setattr(training, 'train', 3)", "training.y"]


def test_only_hooks_assigns_to_names_of_megatron() -> None:
    found = [f"{name}:{line}: {what}" for name, tree in sources() for what, line in assignments(tree)]
    assert found == []


def test_only_hooks_names_functions_of_megatrons_loop() -> None:
    """Calls of Megatron's functions and prose may name them; a string or an attribute would be a second way in."""
    names = set(hooks._LOOP_NAMES)
    found = []
    for name, tree in sources():
        if (
            name == "spec/megatron_names.py"
        ):  # a table for people and parsers, which tests/dist/test_scripts.py compares
            continue
        loop = "megatron.training.training"
        if loop in (PACKAGE / name).read_text(encoding="utf-8") and loop in ast.unparse(tree):  # comments may name it
            found.append(f"{name} imports megatron.training.training")
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and node.value in names - {"evaluate"}:
                found.append(f"{name}:{node.lineno}: {node.value!r}")
    assert found == []
