"""Marks of parametrised tests."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
from _pytest.mark import ParameterSet


def some_fast(names: Iterable[str], *fast: str) -> list[ParameterSet]:
    """All `names` as parameters; those in `fast` are run by `scripts/test.sh --fast` too."""
    names = list(names)
    assert set(fast) <= set(names)
    return [pytest.param(name, marks=[pytest.mark.fast] if name in fast else [], id=name) for name in names]
