"""The lock of a run directory: one run at a time, and none for ever."""

from __future__ import annotations

import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from megatron_smartmoe.adapter.launch import run_lock
from megatron_smartmoe.adapter.launch.run_lock import FILE, Holder, RunLock, check
from megatron_smartmoe.errors import ConfigError

HOLDS = """
import sys, time
from pathlib import Path
from megatron_smartmoe.adapter.launch.run_lock import RunLock
RunLock.acquire(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(100)
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the directory."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    command = [sys.executable, "-c", HOLDS, str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environ)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_a_directory_in_use_is_refused_with_its_holder(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    since = json.loads((tmp_path / FILE).read_text())["since"]
    for use in (RunLock.acquire, check):
        with pytest.raises(ConfigError) as caught:
            use(tmp_path)
        assert str(caught.value) == (
            f"--run-dir = '{tmp_path}': is in use by another run (host {platform.node()}, pid {holder.pid}, since "
            f"{since}). Wait for it, end it (kill {holder.pid} on {platform.node()}), or pass another directory."
        )


def test_launchers_of_other_nodes_may_come_after_node_0(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without Slurm, too: the address and port of node 0 are those of one start."""
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    with RunLock.acquire(tmp_path, "node0:29500"):
        check(tmp_path, "node0:29500")
        for other in ("node0:29501", None):
            with pytest.raises(ConfigError, match="is in use by another run"):
                check(tmp_path, other)
        with pytest.raises(ConfigError, match="is in use by another run"):
            RunLock.acquire(tmp_path, "node0:29500")


def test_the_lock_of_a_killed_holder_is_taken_over_with_a_line(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    holder.send_signal(signal.SIGKILL)
    holder.wait(10)
    check(tmp_path)
    with RunLock.acquire(tmp_path) as lock:
        assert lock.taken_over is not None
        assert lock.taken_over.startswith(f"took over the run directory {tmp_path}: its last run (host ")
        assert f"pid {holder.pid}, " in lock.taken_over


def test_a_child_that_inherits_the_lock_keeps_it(tmp_path: Path) -> None:
    """The launcher is killed, and its ranks are still there."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    program = HOLDS.replace("RunLock.acquire", "lock = RunLock.acquire").replace(
        "time.sleep(100)",
        "import subprocess; subprocess.Popen(['sleep', '100'], pass_fds=[lock.descriptor], stdout=subprocess.DEVNULL)\n"
        "print(0, flush=True)\ntime.sleep(100)",
    )
    program = program.replace("import subprocess; subprocess", "import subprocess; child = subprocess")
    program = program.replace("print(0,", "print(child.pid,")
    command = [sys.executable, "-c", program, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        child = int(process.stdout.readline())
        process.kill()
    try:
        with pytest.raises(ConfigError, match="is in use by another run"):
            RunLock.acquire(tmp_path)
    finally:
        os.kill(child, signal.SIGKILL)
    deadline = time.monotonic() + 10
    while True:
        try:
            RunLock.acquire(tmp_path).release()
            return
        except ConfigError:
            assert time.monotonic() < deadline
            time.sleep(0.05)


def test_a_released_lock_is_free_and_leaves_no_line(tmp_path: Path) -> None:
    RunLock.acquire(tmp_path).release()
    assert (tmp_path / FILE).read_text() == ""
    with RunLock.acquire(tmp_path) as lock:
        assert lock.taken_over is None


def test_two_locks_in_one_process_exclude_each_other(tmp_path: Path) -> None:
    with RunLock.acquire(tmp_path), pytest.raises(ConfigError, match="is in use by another run"):
        RunLock.acquire(tmp_path)


def test_a_link_in_the_place_of_the_lock_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "victim").write_text("precious")
    (tmp_path / FILE).symlink_to("victim")
    RunLock.acquire(tmp_path).release()
    assert (tmp_path / "victim").read_text() == "precious"


def test_a_lock_file_of_somebody_else_is_free(tmp_path: Path) -> None:
    for content in ("", "garbage", "[1]", '{"pid": 1}'):
        (tmp_path / FILE).write_text(content)
        RunLock.acquire(tmp_path).release()


# --- a holder on another host, whose lock this host's file system does not see

Leave = Callable[..., Holder]


@pytest.fixture
def leave(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Leave:
    """Leave the record of a holder, with its last sign of life."""
    for name in ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)

    def leave(silent_s: float = 0.0, **changes: object) -> Holder:
        there = replace(Holder.this_process(), **{"host": "elsewhere", "pid": 4, **changes})  # type: ignore[arg-type]
        (tmp_path / FILE).write_text(json.dumps(asdict(there)))
        then = time.time() - silent_s
        os.utime(tmp_path / FILE, (then, then))
        return there

    return leave


def test_a_sign_of_life_counts_and_silence_ends_it(tmp_path: Path, leave: Leave) -> None:
    leave(silent_s=5)
    with pytest.raises(ConfigError) as caught:
        RunLock.acquire(tmp_path)
    assert str(caught.value).endswith(
        "end it (kill 4 on elsewhere), or pass another directory. If it is gone: try again 60 s after its end."
    )
    leave(silent_s=run_lock.SILENT_S + 5)
    with RunLock.acquire(tmp_path) as lock:
        assert "(host elsewhere, pid 4, since " in str(lock.taken_over)


def test_a_holder_gives_signs_of_life(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_lock, "SIGN_OF_LIFE_S", 0.01)
    with RunLock.acquire(tmp_path):
        os.utime(tmp_path / FILE, (0, 0))
        deadline = time.monotonic() + 10
        while (tmp_path / FILE).stat().st_mtime == 0:
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_a_restarted_host_has_no_holder(tmp_path: Path, leave: Leave) -> None:
    leave(host=platform.node(), boot="another", pid=os.getpid())
    RunLock.acquire(tmp_path).release()


def test_a_reused_pid_is_no_holder(tmp_path: Path, leave: Leave) -> None:
    leave(host=platform.node(), pid=os.getpid(), started_s=1.0)
    RunLock.acquire(tmp_path).release()


SQUEUE = """#!/bin/sh
case "$*" in
  "--noheader --steps 7.0") echo "7.0 running" ;;
  "--noheader --steps 8.0") ;;
  "--noheader --jobs 9") echo "slurm_load_jobs error: Invalid job id specified" >&2; exit 1 ;;
  *) echo "slurm_load_jobs error: Unable to contact slurm controller" >&2; exit 1 ;;
esac
"""


@pytest.fixture
def squeue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "squeue").write_text(SQUEUE)
    (folder / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=":")


@pytest.mark.usefixtures("squeue")
def test_slurm_says_whether_a_holder_is_gone(tmp_path: Path, leave: Leave) -> None:
    leave(job="7.0", silent_s=1000)
    with pytest.raises(ConfigError, match=r"pid 4, Slurm job 7\.0, since .*end it \(scancel 7\.0\)"):
        RunLock.acquire(tmp_path)
    for job in ("8.0", "9"):
        leave(job=job)
        with RunLock.acquire(tmp_path) as lock:
            assert f"Slurm job {job}, " in str(lock.taken_over)


@pytest.mark.usefixtures("squeue")
def test_where_slurm_does_not_answer_signs_of_life_count(tmp_path: Path, leave: Leave) -> None:
    leave(job="10.0")
    with pytest.raises(ConfigError, match="is in use"):
        RunLock.acquire(tmp_path)
    leave(job="10.0", silent_s=1000)
    RunLock.acquire(tmp_path).release()


def test_a_job_that_was_queued_again_takes_its_own_directory(
    tmp_path: Path, leave: Leave, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave(job="7.0")
    for name, value in {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_RESTART_COUNT": "1"}.items():
        monkeypatch.setenv(name, value)
    RunLock.acquire(tmp_path).release()


def test_another_node_of_the_same_step_may_start(tmp_path: Path, leave: Leave, monkeypatch: pytest.MonkeyPatch) -> None:
    there = leave(job="7.0")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_STEP_ID", "0")
    check(tmp_path)
    assert there.is_same_start(Holder.this_process())
    monkeypatch.setenv("PATH", "")  # no squeue
    monkeypatch.setenv("SLURM_STEP_ID", "1")
    with pytest.raises(ConfigError, match="is in use"):
        check(tmp_path)
