"""glibc's heap checks act only when their library is preloaded, and the program notices when they do not."""

from __future__ import annotations

import pytest

from scripts.reliability import heap


def test_a_write_past_the_end_is_noticed_with_the_preload_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    if (problem := heap.checks_do_nothing()) is not None:
        pytest.skip(f"no heap checks here: {problem}")
    monkeypatch.delitem(heap.CHECKS, "LD_PRELOAD")
    problem = heap.checks_do_nothing()
    assert problem is not None
    assert problem.startswith("LD_PRELOAD = libc_malloc_debug.so.0: a byte past the end of a block is not noticed here")
