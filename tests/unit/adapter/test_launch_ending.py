"""How a run ended: the first cause of several deaths, and the last line."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_smartmoe.adapter.launch import deaths
from megatron_smartmoe.adapter.launch.deaths import Death, first_cause, read_death
from megatron_smartmoe.adapter.launch.ending import Ending, SharedDeaths, attempt_of, forget

KILLED = Death(rank=1, host="n1", status=-9, time_s=10.0)
LOST = Death(
    rank=0, host="n1", status=1, time_s=9.9, error="RuntimeError: Read error [::1]:1: Connection reset by peer"
)
WRONG = Death(rank=2, host="n2", status=1, time_s=10.5, error="ValueError: x = 3")


@pytest.mark.parametrize(
    ("death", "text"),
    [
        (KILLED, "rank 1 on n1 was killed by SIGKILL"),
        (
            replace(KILLED, out_of_memory=True),
            "rank 1 on n1 was killed by the kernel because the memory of the host or of its cgroup ran out (SIGKILL)",
        ),
        (replace(KILLED, status=-11), "rank 1 on n1 was killed by SIGSEGV (segmentation fault)"),
        (replace(KILLED, status=-99), "rank 1 on n1 was killed by signal 99"),
        (replace(KILLED, status=3), "rank 1 on n1 ended with exit status 3"),
        (WRONG, "rank 2 on n2 stopped with ValueError: x = 3"),
    ],
)
def test_a_death_in_words(death: Death, text: str) -> None:
    assert str(death) == text
    assert Death.from_json(json.loads(json.dumps(death.to_json()))) == death


def test_a_death_has_its_place_where_somebody_watched() -> None:
    ending = Ending(place_of=lambda rank: f"iteration 41, layer {rank}" if rank == KILLED.rank else None)
    ending.add(KILLED)
    ending.add(LOST)
    place = f" | it was in iteration 41, layer {KILLED.rank}"
    assert [str(death) for death in ending.deaths] == [f"{KILLED}{place}", str(LOST)]


def test_the_first_death_is_the_cause_and_a_lost_connection_is_not() -> None:
    """A process that is killed is gone for its peers before it is for its parent: they may be earlier."""
    assert first_cause([LOST, KILLED, WRONG]) == KILLED
    assert first_cause([WRONG, LOST]) == WRONG
    assert first_cause([LOST]) == LOST
    ended = replace(KILLED, rank=0, status=-15, time_s=9.0)  # by torchrun, before anybody saw why
    assert first_cause([ended, KILLED]) == KILLED
    assert first_cause([replace(LOST, time_s=9.1), ended]) == ended
    assert first_cause([]) is None


def test_an_exception_is_read_with_its_time(tmp_path: Path) -> None:
    file = tmp_path / "error.json"
    file.write_text(json.dumps({"message": {"message": "ValueError: a\n  b", "extraInfo": {}}}))
    os.utime(file, (5.0, 5.0))
    assert read_death(3, "n1", 1, 9.0, file, 0) == Death(
        rank=3, host="n1", status=1, time_s=5.0, error="ValueError: a b"
    )
    assert read_death(3, "n1", 2, 9.0, tmp_path / "none", 0) == Death(rank=3, host="n1", status=2, time_s=9.0)
    file.write_text('{"message": ')
    assert read_death(3, "n1", 1, 9.0, file, 0).error is None


def test_a_long_exception_is_cut(tmp_path: Path) -> None:
    (tmp_path / "e").write_text(json.dumps({"message": {"message": "E: " + "x" * 10_000}}))
    error = read_death(0, "n1", 1, 0.0, tmp_path / "e", 0).error
    assert error is not None
    assert len(error) < 500


def test_memory_that_ran_out_is_told_from_a_kill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deaths, "_VMSTAT", tmp_path / "vmstat")
    monkeypatch.setattr(deaths, "_CGROUP_EVENTS", tmp_path / "none")
    (tmp_path / "vmstat").write_text("pgfault 7\noom_kill 3\n")
    before = deaths.oom_kills()
    assert before == 3
    assert not read_death(0, "n1", -9, 0.0, None, before).out_of_memory
    (tmp_path / "vmstat").write_text("pgfault 7\noom_kill 4\n")
    assert read_death(0, "n1", -9, 0.0, None, before).out_of_memory
    assert not read_death(0, "n1", -11, 0.0, None, before).out_of_memory


# --- the last line

LOG = Path("train.log")


@pytest.fixture
def save(tmp_path: Path) -> Path:
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("16")
    return tmp_path


def line(ending: Ending, status: int, *signals: int) -> str | None:
    return ending.line(status, list(signals), LOG)


def test_a_death_what_is_saved_and_how_to_continue(save: Path, tmp_path: Path) -> None:
    ending = Ending(save=save, resume="launch --run-dir D", deaths=[KILLED])
    text = f"rank 1 on n1 was killed by SIGKILL | saved: iteration 16 in {save} | to continue: launch --run-dir D"
    assert line(ending, 137) == text
    ending.save = tmp_path / "none"
    text = f"rank 1 on n1 was killed by SIGKILL | nothing is saved yet in {tmp_path / 'none'} | to start again: launch"
    assert line(ending, 137) == text + " --run-dir D"
    ending.save = None
    text = "rank 1 on n1 was killed by SIGKILL | no folder of checkpoints (--save) | to start again: launch --run-dir D"
    assert line(ending, 137) == text


def test_other_ends() -> None:
    def says(status: int, *signals: int, **more: Any) -> str | None:
        return line(Ending(**more), status, *signals)

    assert says(0) is None
    assert says(0, signal.SIGTERM) is None  # it saved and ended, as asked
    assert says(143, signal.SIGTERM) == "ended by SIGTERM"
    assert says(130, signal.SIGINT) == "ended by SIGINT"
    assert says(130, signal.SIGINT, deaths=[replace(KILLED, status=-2)]) == "ended by SIGINT"
    assert says(1, signal.SIGTERM, deaths=[WRONG]) == f"ended by SIGTERM, and {WRONG}"
    assert says(1, signal.SIGTERM, deaths=[replace(KILLED, status=-15)]) == "ended by SIGTERM"
    assert says(1, deaths=[replace(KILLED, status=-15)]) == "rank 1 on n1 was killed by SIGTERM"
    here = os.uname().nodename
    assert says(1, error="DistNetworkError: port 1") == (
        f"torchrun on {here} failed: DistNetworkError: port 1 (more in train.log)"
    )
    assert says(-9) == f"the parent of the ranks on {here} was killed by SIGKILL"
    assert says(3) == f"the parent of the ranks on {here} ended with exit status 3"


def test_a_refusal_is_not_continued() -> None:
    refused = Death(rank=0, host="n1", status=2, time_s=1.0, error="ConfigError: --lr = 'x': is wrong. Mend it.")
    ending = Ending(resume="launch", deaths=[refused])
    assert line(ending, 2) == "rank 0 on n1 stopped with ConfigError: --lr = 'x': is wrong. Mend it."


# --- several nodes


def shared(directory: Path, name: str, attempt: str = "7.0.0") -> SharedDeaths:
    return SharedDeaths(directory=directory, name=name, attempt=attempt)


def test_nodes_tell_each_other_and_print_the_same_cause(tmp_path: Path) -> None:
    first, second = (Ending(shared=shared(tmp_path, name)) for name in ("node0", "node1"))
    assert not first.others_died()
    second.add(WRONG)
    second.add(replace(KILLED, host="n2"))
    assert first.others_died()
    assert not second.others_died()
    first.add(LOST)
    assert line(first, 143) == line(second, 137) == "rank 1 on n2 was killed by SIGKILL"
    assert line(first, 143, signal.SIGTERM) == "rank 1 on n2 was killed by SIGKILL"  # from Slurm, for this reason


def test_deaths_of_an_earlier_start_are_not_this_ones(tmp_path: Path) -> None:
    Ending(shared=shared(tmp_path, "node1", "7.0.0")).add(KILLED)
    (tmp_path / "failed-garbage.json").write_text("{")
    ending = Ending(shared=shared(tmp_path, "node0", "7.0.1"))
    assert not ending.others_died()
    assert line(ending, 0) is None
    forget(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_an_attempt_is_a_start_of_a_step() -> None:
    job = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "2"}
    assert attempt_of(job) == "7.2.0"
    assert attempt_of(job | {"SLURM_RESTART_COUNT": "1"}) == "7.2.1"


def test_a_disk_that_is_full_is_no_second_failure(tmp_path: Path) -> None:
    ending = Ending(shared=shared(tmp_path / "gone", "node0"))
    ending.add(KILLED)
    assert line(ending, 137) == str(KILLED)
