"""Running the ranks: real processes, real signals. The launcher's part runs in a process of its own."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

pytestmark = pytest.mark.timeout(60)

TIMEOUT_S = 30
LAUNCHER = """
import sys
from pathlib import Path
from megatron_smartmoe.adapter.launch import process
log = Path(sys.argv[1]) if sys.argv[1] else None
sys.exit(process.run([sys.executable, "-u", "-c", sys.argv[2]], {"FROM_LAUNCHER": "yes"}, log))
"""
Launched = subprocess.Popen[str]


class Launcher:
    """Starts launchers around a child's program, and ends them with the test."""

    def __init__(self) -> None:
        self.started: list[Launched] = []

    def start(self, child: str, log: Path | None = None) -> Launched:
        command = [sys.executable, "-c", LAUNCHER, str(log or ""), child]
        # A group of its own, so that no child outlives a test that fails.
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, process_group=0)
        self.started.append(process)
        return process

    def run(self, child: str, log: Path | None = None) -> tuple[int, str]:
        process = self.start(child, log)
        out, err = process.communicate(timeout=TIMEOUT_S)
        assert err == ""
        return process.returncode, out

    def stop(self) -> None:
        for process in self.started:
            if process.poll() is None:
                for child in psutil.Process(process.pid).children(recursive=True):
                    child.kill()
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            for pipe in (process.stdin, process.stdout, process.stderr):
                if pipe is not None:
                    pipe.close()


@pytest.fixture
def launcher() -> Iterator[Launcher]:
    launcher = Launcher()
    yield launcher
    launcher.stop()


def line(process: Launched) -> str:
    """The next line of output; the test's timeout is the limit."""
    assert process.stdout is not None
    return process.stdout.readline().strip()


@pytest.mark.parametrize("status", [0, 1, 3])
def test_the_exit_status_is_the_childs(launcher: Launcher, status: int) -> None:
    assert launcher.run(f"raise SystemExit({status})") == (status, "")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGABRT])
def test_a_child_ended_by_a_signal_gives_128_more(launcher: Launcher, number: signal.Signals) -> None:
    assert launcher.run(f"import os; os.kill(os.getpid(), {int(number)})") == (128 + number, "")


def test_output_goes_to_the_log_and_to_the_terminal(launcher: Launcher, tmp_path: Path) -> None:
    child = "import sys; print('out'); print('err', file=sys.stderr); sys.stdout.buffer.write(b'\\xc3\\xbc no newline')"
    status, out = launcher.run(child, tmp_path / "train.log")
    assert status == 0
    assert out == "out\nerr\nü no newline"
    assert (tmp_path / "train.log").read_text(encoding="utf-8") == out


def test_bytes_that_are_not_text_pass(launcher: Launcher, tmp_path: Path) -> None:
    process = launcher.start("import sys; sys.stdout.buffer.write(bytes(range(256)))", tmp_path / "log")
    assert process.wait(TIMEOUT_S) == 0
    assert (tmp_path / "log").read_bytes() == bytes(range(256))


def test_a_log_is_gone_on_with(launcher: Launcher, tmp_path: Path) -> None:
    for text in ("first", "second"):
        launcher.run(f"print({text!r})", tmp_path / "train.log")
    assert (tmp_path / "train.log").read_text() == "first\nsecond\n"


def test_a_line_is_in_the_log_as_soon_as_it_is_printed(launcher: Launcher, tmp_path: Path) -> None:
    process = launcher.start("print('ready')\nimport signal\nsignal.pause()", tmp_path / "log")
    assert line(process) == "ready"
    assert (tmp_path / "log").read_text() == "ready\n"


def test_the_environment_is_added_to(launcher: Launcher) -> None:
    child = "import os; print(os.environ['FROM_LAUNCHER'], 'PATH' in os.environ)"
    assert launcher.run(child) == (0, "yes True\n")


WAITING_FOR = """
import os, signal, sys, time
def stop(number, frame):
    print("heard", number)
    sys.exit(5)
signal.signal({number}, stop)
print("ready")
while True:
    time.sleep(0.05)  # pause() would sleep through a signal that comes just before it
"""


def test_sigterm_is_handed_on_and_the_child_has_its_time(launcher: Launcher) -> None:
    process = launcher.start(WAITING_FOR.format(number="signal.SIGTERM"))
    assert line(process) == "ready"
    process.send_signal(signal.SIGTERM)
    assert line(process) == f"heard {int(signal.SIGTERM)}"
    assert process.wait(TIMEOUT_S) == 5


def test_sigterm_ends_a_child_that_has_no_handler(launcher: Launcher) -> None:
    process = launcher.start("print('ready')\nimport signal\nsignal.pause()")
    assert line(process) == "ready"
    process.send_signal(signal.SIGTERM)
    assert process.wait(TIMEOUT_S) == 128 + signal.SIGTERM


def test_ctrl_c_reaches_the_child_and_does_not_end_the_launcher_first(launcher: Launcher) -> None:
    process = launcher.start(WAITING_FOR.format(number="signal.SIGINT"))
    assert line(process) == "ready"
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    assert line(process) == f"heard {int(signal.SIGINT)}"
    assert process.wait(TIMEOUT_S) == 5


def test_ctrl_c_on_the_launcher_alone_changes_nothing(launcher: Launcher) -> None:
    process = launcher.start(WAITING_FOR.format(number="signal.SIGTERM"))
    assert line(process) == "ready"
    process.send_signal(signal.SIGINT)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.3)
    process.send_signal(signal.SIGTERM)
    assert line(process) == f"heard {int(signal.SIGTERM)}"
    assert process.wait(TIMEOUT_S) == 5


def test_sigterm_right_after_another_signal_is_not_lost(launcher: Launcher) -> None:
    child = WAITING_FOR.format(number="signal.SIGTERM").replace("    sys.exit(5)\n", "")
    process = launcher.start(child.replace('print("ready")', 'signal.signal(2, signal.SIG_IGN)\nprint("ready")'))
    assert line(process) == "ready"
    assert process.stdout is not None
    for _ in range(100):
        process.send_signal(signal.SIGINT)
        process.send_signal(signal.SIGTERM)
        assert select.select([process.stdout], [], [], 5)[0], "lost"
        assert line(process) == f"heard {int(signal.SIGTERM)}"


# A child with no handler and its own child in a session of its own, like torchrun and a rank; the rank may install
# a handler, as Megatron does for --exit-signal SIGUSR2.
TORCHRUN = """
import os, subprocess, sys
rank = subprocess.Popen([sys.executable, "-u", "-c", os.environ["RANK_PROGRAM"]], start_new_session=True)
sys.exit(rank.wait())
"""


@pytest.mark.parametrize("send", [os.kill, os.killpg], ids=["launcher", "launcher and torchrun"])
def test_sigusr2_is_handed_to_the_ranks(launcher: Launcher, monkeypatch: pytest.MonkeyPatch, send: Any) -> None:
    """Past torchrun, which would end them 30 s later; once, also when Slurm signals the task's process group."""
    monkeypatch.setenv("RANK_PROGRAM", WAITING_FOR.format(number="signal.SIGUSR2"))
    process = launcher.start(TORCHRUN)
    assert line(process) == "ready"
    send(process.pid, signal.SIGUSR2)
    out, err = process.communicate(timeout=TIMEOUT_S)
    assert (out, err) == (f"heard {int(signal.SIGUSR2)}\n", "")
    assert process.returncode == 5


def test_sigusr2_does_not_end_a_rank_that_does_not_ask_for_it(
    launcher: Launcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK_PROGRAM", WAITING_FOR.format(number="signal.SIGUSR1").replace('"ready"', "os.getpid()"))
    process = launcher.start(TORCHRUN)
    rank = int(line(process))
    os.killpg(process.pid, signal.SIGUSR2)
    os.kill(rank, signal.SIGUSR1)
    assert line(process) == f"heard {int(signal.SIGUSR1)}"
    assert process.wait(TIMEOUT_S) == 5


def test_sigusr2_ends_neither_the_launcher_nor_its_child(launcher: Launcher) -> None:
    child = "import signal; print(signal.getsignal(signal.SIGUSR2) is signal.SIG_IGN)\ninput()\nprint('still here')"
    command = [sys.executable, "-c", LAUNCHER, "", child]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, process_group=0)
    launcher.started.append(process)
    assert line(process) == "True"
    os.killpg(process.pid, signal.SIGUSR2)
    assert process.communicate("\n", timeout=TIMEOUT_S)[0] == "still here\n"
    assert process.returncode == 0


# A rank that is killed while a helper of its lives on, and holds the output pipe; the launcher must not wait for it.
LEAVING_A_HELPER = """
import os, signal, subprocess, sys
helper = subprocess.Popen(
    [sys.executable, "-u", "-c", os.environ["HELPER_PROGRAM"]], stdin=subprocess.DEVNULL, start_new_session=True
)
print(helper.pid)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_helper_that_outlives_its_rank_is_ended(launcher: Launcher, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HELPER_PROGRAM", "import signal; signal.pause()")
    status, out = launcher.run(LEAVING_A_HELPER)
    assert status == 128 + signal.SIGKILL
    assert_gone(int(out))


def assert_gone(pid: int) -> None:
    """What the launcher killed is reaped by init once the launcher has ended: a moment later."""
    deadline = time.monotonic() + 5
    while psutil.pid_exists(pid):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_helper_that_does_not_listen_is_killed(launcher: Launcher, monkeypatch: pytest.MonkeyPatch) -> None:
    helper = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf'); signal.pause()"
    monkeypatch.setenv("HELPER_PROGRAM", helper)
    short = "\nprocess._end_orphans.__defaults__ = (0.2,)\nlog ="
    monkeypatch.setattr(sys.modules[__name__], "LAUNCHER", LAUNCHER.replace("\nlog =", short))
    status, out = launcher.run(LEAVING_A_HELPER)
    assert status == 128 + signal.SIGKILL
    assert_gone(int(out.split()[0]))


def test_how_sigterm_is_handed_on_can_be_chosen(launcher: Launcher, monkeypatch: pytest.MonkeyPatch) -> None:
    """`srun` would kill its tasks at once; the launcher tells Slurm instead."""
    asked = "lambda child: child.send_signal(__import__('signal').SIGUSR1)"
    monkeypatch.setattr(sys.modules[__name__], "LAUNCHER", LAUNCHER.replace(", log)", f", log, {asked})"))
    process = launcher.start(WAITING_FOR.format(number="signal.SIGUSR1"))
    assert line(process) == "ready"
    process.send_signal(signal.SIGTERM)
    assert line(process) == f"heard {int(signal.SIGUSR1)}"
    assert process.wait(TIMEOUT_S) == 5
