"""The record of a rank: what it writes is what another process reads, whatever becomes of the rank."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_smartmoe.runtime.progress import (
    MAX_GROUPS,
    OPERATIONS,
    RECORD_BYTES,
    Pass,
    Phase,
    ProgressRecord,
    ProgressTable,
    RankProgress,
    Word,
    group_posted_word,
    process_state,
    read_records,
    started_ticks,
)


@pytest.fixture
def table() -> Iterator[ProgressTable]:
    table = ProgressTable(2)
    yield table
    table.close()


def written(record: ProgressRecord, **words: int) -> None:
    for name, value in words.items():
        record.words[Word[name]] = value


def only(table: ProgressTable) -> RankProgress:
    (progress,) = table.read()
    return progress


def test_a_table_has_the_records_that_were_begun(table: ProgressTable) -> None:
    assert table.read() == []
    ProgressRecord(table.path, 1, rank=5, floor_s=8.0)
    assert [progress.rank for progress in table.read()] == [5]
    ProgressRecord(table.path, 0, rank=4, floor_s=8.0)
    assert [progress.rank for progress in table.read()] == [4, 5]


def test_a_record_says_where_its_rank_is(table: ProgressTable) -> None:
    record = ProgressRecord(table.path, 0, rank=4, floor_s=2.5)
    slot = record.add_group(99, "expert model parallel group", 2)
    record.begin_step(17)
    operation = OPERATIONS.index("all-to-all")
    written(record, OPERATION=operation, GROUP=slot, NUMBER=3, LAYER=2, PASS=Pass.BACKWARD, WAITING=1, POSTED=12)
    record.words[group_posted_word(slot)] = 3
    rank = only(table)
    assert (rank.rank, rank.pid, rank.iteration, rank.posted, rank.floor_s) == (4, os.getpid(), 17, 12, 2.5)
    assert rank.started_ticks == started_ticks(os.getpid())
    assert rank.phase is Phase.STEP
    assert rank.place == "iteration 17, layer 2, backward pass, waits in an all-to-all (expert model parallel group)"
    assert rank.groups[99].posted == 3
    assert rank.groups[99].size == 2
    assert 0 <= rank.still_s <= rank.phase_s < 60


def test_place_of_a_message(table: ProgressTable) -> None:
    record = ProgressRecord(table.path, 0, rank=0, floor_s=8.0)
    assert only(table).place == "starting"
    record.begin_step(1)
    assert only(table).place == "iteration 1, no collective yet"
    slot = record.add_group(1, "", 2)
    written(record, OPERATION=OPERATIONS.index("receive"), GROUP=slot, PEER=3)
    assert only(table).place == "iteration 1, after a receive from rank 3"


def test_steps_are_timed_without_the_first_and_without_other_phases(
    table: ProgressTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    now_ns = 0
    monkeypatch.setattr(time, "monotonic_ns", lambda: now_ns)
    record = ProgressRecord(table.path, 0, rank=0, floor_s=8.0)
    medians = []
    for iteration, seconds in enumerate([100, 1, 3, 2, 9, 9], start=1):
        record.begin_step(iteration)
        medians.append(only(table).median_step_s)
        now_ns += seconds * 10**9
        with record.within(Phase.SAVE):
            assert only(table).phase is Phase.SAVE
            now_ns += 1000 * 10**9
        assert only(table).phase_s == seconds
    assert medians == [None, None, None, None, 2.0, 2.5]  # of 1, 3 and 2 s, then of 9 s too


def test_more_groups_than_there_is_room_for_share_a_slot_without_a_name(table: ProgressTable) -> None:
    record = ProgressRecord(table.path, 0, rank=0, floor_s=8.0)
    slots = [record.add_group(key, f"group {key}", 2) for key in range(1, MAX_GROUPS + 10)]
    assert max(slots) == MAX_GROUPS - 1
    groups = only(table).groups
    assert groups[MAX_GROUPS - 1].name == f"group {MAX_GROUPS - 1}"
    assert groups[-1].name == ""  # the last slot
    assert len(groups) == MAX_GROUPS


def test_a_record_is_begun_anew(table: ProgressTable) -> None:
    ProgressRecord(table.path, 0, rank=0, floor_s=8.0).begin_step(7)
    ProgressRecord(table.path, 0, rank=0, floor_s=8.0)
    assert only(table).iteration == 0


def test_what_is_no_record_is_left_out() -> None:
    assert read_records(os.urandom(RECORD_BYTES) + bytes(RECORD_BYTES)) == []


def test_the_record_of_a_killed_process_is_still_there(table: ProgressTable) -> None:
    code = (
        "import os, signal, sys; from megatron_smartmoe.runtime.progress import ProgressRecord as R; "
        "R(sys.argv[1], 0, rank=3, floor_s=8.0).begin_step(41); os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", code, table.path], check=False)
    assert done.returncode == -signal.SIGKILL
    rank = only(table)
    assert (rank.rank, rank.iteration) == (3, 41)
    assert process_state(rank.pid) is None
    assert started_ticks(rank.pid) is None


def test_a_table_is_found_from_outside(table: ProgressTable) -> None:
    ProgressRecord(table.path, 1, rank=9, floor_s=8.0)
    path = ProgressTable.path_in(os.getpid())
    assert path is not None
    assert [progress.rank for progress in read_records(Path(path).read_bytes())] == [9]


def test_the_pure_reader_needs_no_torch() -> None:
    code = "import sys, megatron_smartmoe.runtime.watchdog.watch; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
