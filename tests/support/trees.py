"""Megatron-LM trees for tests: the installed package's files, with a change, as a fork has them."""

from __future__ import annotations

import shutil
from pathlib import Path

from megatron_smartmoe.spec.megatron_names import NAMES, installed_tree


def fork_of_installed(folder: Path, file: str | None = None, *changes: tuple[str, str]) -> Path:
    """Copy the modules that NAMES is about, and replace a text in one of them, which must be there.

    Args:
        folder: where the tree goes.
        file: relative to the tree.
        changes: (old, new) texts.
    """
    installed = installed_tree()
    assert installed is not None
    root = folder / "fork"
    modules = {"megatron.core.package_info", *(name.module for name in NAMES)}
    for module in modules:
        path = installed.joinpath(*module.split("."))
        path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        copy = root / path.relative_to(installed)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
    for old, new in changes:
        assert file is not None
        text = (root / file).read_text(encoding="utf-8")
        assert old in text, old
        (root / file).write_text(text.replace(old, new), encoding="utf-8")
    return root
