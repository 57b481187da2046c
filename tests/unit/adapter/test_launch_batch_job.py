"""What launchers leave for the script of a batch job."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from megatron_smartmoe.adapter.launch.batch_job import BatchJob, save_on_sigterm, saves_on_sigterm
from megatron_smartmoe.adapter.launch.deaths import Death
from megatron_smartmoe.errors import EXIT_CONFIG_ERROR


@pytest.fixture
def environ(tmp_path: Path) -> dict[str, str]:
    return {"SMARTMOE_TO_BE_CONTINUED": str(tmp_path / ".smartmoe-job7"), "SLURMD_NODENAME": "n2"}


def test_only_a_job_of_this_projects_script_is_one(environ: dict[str, str], tmp_path: Path) -> None:
    assert BatchJob.of_environment(tmp_path, {}) is None
    assert BatchJob.of_environment(tmp_path, {"SLURMD_NODENAME": "n2"}) is None
    job = BatchJob.of_environment(tmp_path, environ)
    assert job is not None
    assert job.stop_note == tmp_path / ".smartmoe-job7.stopped"
    assert saves_on_sigterm(environ)
    assert not saves_on_sigterm({})


def test_a_crash_is_noted_with_its_node_and_whether_anything_was_trained(
    environ: dict[str, str], tmp_path: Path
) -> None:
    note, metrics = tmp_path / ".smartmoe-job7.crashed", tmp_path / "metrics.jsonl"
    job = BatchJob.of_environment(tmp_path, environ)
    assert job is not None
    death = Death(rank=3, host="h", status=-9, time_s=1.0)
    job.note_crash(death)
    assert note.read_text() == "n2 stuck\n"
    metrics.write_text("{}\n")
    job.note_crash(death)
    assert note.read_text() == "n2 progressed\n"


def test_refused_flags_are_no_crash(environ: dict[str, str], tmp_path: Path) -> None:
    job = BatchJob.of_environment(tmp_path, environ)
    assert job is not None
    job.note_crash(Death(rank=0, host="h", status=EXIT_CONFIG_ERROR, time_s=1.0, error="ConfigError: --lr = x"))
    assert not (tmp_path / ".smartmoe-job7.crashed").exists()


def test_sigterm_raises_the_signal_that_saves(environ: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    received: list[int] = []
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR2)]
    try:
        signal.signal(signal.SIGUSR2, lambda number, frame: received.append(number))
        save_on_sigterm(signal.SIGUSR2)
        signal.raise_signal(signal.SIGTERM)
        assert received == [signal.SIGUSR2]
    finally:
        signal.signal(signal.SIGTERM, before[0])
        signal.signal(signal.SIGUSR2, before[1])
