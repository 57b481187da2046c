"""Ranks that tests start here use the GPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support import ranks


@pytest.fixture(scope="module")
def gpu_ranks() -> Iterator[None]:
    """Start ranks without the CPU facade for one module."""
    with ranks.on_the_gpu():
        yield
