"""A run's files on a full disk."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest

from megatron_smartmoe.adapter.run_files import append_line


def test_a_line_is_appended_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    append_line(path, '{"iteration": 1}')
    before, limits = path.read_text(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 5, limits[1]))  # as a disk that takes 5 more bytes
    try:
        with pytest.raises(OSError, match="File too large"):
            append_line(path, '{"iteration": 2}')
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_text() == before
    append_line(path, '{"iteration": 3}')
    assert path.read_text() == before + '{"iteration": 3}\n'
