"""Every reader, fed damaged and hostile files: it reads them or refuses them, in bounded time and memory."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_smartmoe.errors import ConfigError
from scripts.validation import fuzz_readers
from scripts.validation.hostile_files import CANARY, READERS, Case

CASES, SEED = 150, 14


@pytest.fixture
def no_logs() -> Iterator[None]:
    """Hostile file names have no place in a report: pytest-xdist cannot send what is no UTF-8."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize("reader", READERS)
def test_no_case_is_a_traceback_a_hang_or_a_gigabyte(reader: str, tmp_path: Path, no_logs: None) -> None:
    """The same cases in every run; scripts/validation/fuzz_readers.py feeds as many as you like."""
    outcome = fuzz_readers.fuzz(reader, CASES, SEED, keep=tmp_path)
    assert outcome.failures == {}, outcome.smallest
    assert outcome.counts["refused"] > CASES / 10  # the cases are hostile
    assert outcome.counts["accepted"] > 0  # and the reader reads


def test_each_kind_of_failure_is_seen(tmp_path: Path) -> None:
    """The fuzzer itself: what it is there for is noticed."""

    def endless() -> None:
        while True:
            pass

    def reading(read: object) -> Case:
        assert callable(read)
        return Case(tmp_path, read)

    def wrong() -> None:
        raise KeyError("x")

    def refused(length: int) -> None:
        raise ConfigError("a", None, "x" * length, "")

    with fuzz_readers.bounded():
        assert fuzz_readers.outcome_of(reading(lambda: 1)) == "accepted"
        assert fuzz_readers.outcome_of(reading(lambda: refused(10))) == "refused"
        assert fuzz_readers.outcome_of(reading(lambda: refused(5000))) == "a message of 5,012 characters"
        assert fuzz_readers.outcome_of(reading(wrong)).startswith("KeyError at test_fuzz_readers.py:")
        assert fuzz_readers.outcome_of(reading(lambda: bytearray(2**31))) == "more than 1 GiB"
        before, fuzz_readers.MOST_CPU_S = fuzz_readers.MOST_CPU_S, 0.05
        try:
            assert fuzz_readers.outcome_of(reading(endless)) == "more than 0.05 s"
        finally:
            fuzz_readers.MOST_CPU_S = before
        Path(CANARY).touch()
        try:
            assert fuzz_readers.outcome_of(reading(lambda: 1)) == "ran what the file says"
        finally:
            Path(CANARY).unlink()
