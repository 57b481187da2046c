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

from megatron_smartmoe.adapter.launch.deaths import Death
from megatron_smartmoe.adapter.launch.ending import SharedDeaths

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

    def start(self, child: str, log: Path | None = None, stdin: int | None = None) -> Launched:
        command = [sys.executable, "-c", LAUNCHER, str(log or ""), child]
        # A group of its own, so that no child outlives a test that fails.
        process = subprocess.Popen(
            command, stdin=stdin, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, process_group=0
        )
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


def test_a_log_is_appended_to(launcher: Launcher, tmp_path: Path) -> None:
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
    print("received", number)
    sys.exit(5)
signal.signal({number}, stop)
print("ready")
while True:
    time.sleep(0.05)  # pause() would sleep through a signal that comes just before it
"""


def test_sigterm_is_forwarded_and_the_child_has_its_time(launcher: Launcher) -> None:
    process = launcher.start(WAITING_FOR.format(number="signal.SIGTERM"))
    assert line(process) == "ready"
    process.send_signal(signal.SIGTERM)
    assert line(process) == f"received {int(signal.SIGTERM)}"
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
    assert line(process) == f"received {int(signal.SIGINT)}"
    assert process.wait(TIMEOUT_S) == 5


def test_ctrl_c_on_the_launcher_alone_changes_nothing(launcher: Launcher) -> None:
    process = launcher.start(WAITING_FOR.format(number="signal.SIGTERM"))
    assert line(process) == "ready"
    process.send_signal(signal.SIGINT)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.3)
    process.send_signal(signal.SIGTERM)
    assert line(process) == f"received {int(signal.SIGTERM)}"
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
        assert line(process) == f"received {int(signal.SIGTERM)}"


# A child with no handler and its own child in a session of its own, like torchrun and a rank; the rank may install
# a handler, as Megatron does for --exit-signal SIGUSR2.
TORCHRUN = """
import os, subprocess, sys
rank = subprocess.Popen([sys.executable, "-u", "-c", os.environ["RANK_PROGRAM"]], start_new_session=True)
sys.exit(rank.wait())
"""


@pytest.mark.parametrize("send", [os.kill, os.killpg], ids=["launcher", "launcher and torchrun"])
def test_sigusr2_is_sent_to_the_ranks(launcher: Launcher, monkeypatch: pytest.MonkeyPatch, send: Any) -> None:
    """Past torchrun, which would end them 30 s later; once, also when Slurm signals the task's process group."""
    monkeypatch.setenv("RANK_PROGRAM", WAITING_FOR.format(number="signal.SIGUSR2"))
    process = launcher.start(TORCHRUN)
    assert line(process) == "ready"
    send(process.pid, signal.SIGUSR2)
    out, err = process.communicate(timeout=TIMEOUT_S)
    assert (out, err) == (f"received {int(signal.SIGUSR2)}\n", "")
    assert process.returncode == 5


def test_where_slurm_preempts_the_first_sigterm_has_the_ranks_save(
    launcher: Launcher, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    note = tmp_path / "job.stopped"
    with_note = LAUNCHER.replace(", log))", f", log, stop_note=Path({str(note)!r})))")
    monkeypatch.setattr(sys.modules[__name__], "LAUNCHER", with_note)
    monkeypatch.setenv("RANK_PROGRAM", WAITING_FOR.format(number="signal.SIGUSR2"))
    process = launcher.start(TORCHRUN)
    assert line(process) == "ready"
    assert not note.exists()
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=TIMEOUT_S)
    assert (out, err) == (f"received {int(signal.SIGUSR2)}\n", "")
    assert process.returncode == 5
    assert note.exists()


def test_sigusr2_does_not_end_a_rank_that_does_not_ask_for_it(
    launcher: Launcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK_PROGRAM", WAITING_FOR.format(number="signal.SIGUSR1").replace('"ready"', "os.getpid()"))
    process = launcher.start(TORCHRUN)
    rank = int(line(process))
    os.killpg(process.pid, signal.SIGUSR2)
    os.kill(rank, signal.SIGUSR1)
    assert line(process) == f"received {int(signal.SIGUSR1)}"
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


def test_a_helper_that_ignores_sigterm_is_killed(launcher: Launcher, monkeypatch: pytest.MonkeyPatch) -> None:
    helper = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('ready'); signal.pause()"
    monkeypatch.setenv("HELPER_PROGRAM", helper)
    short = "\nprocess._ORPHANS_GRACE_S = 0.2\nlog ="
    monkeypatch.setattr(sys.modules[__name__], "LAUNCHER", LAUNCHER.replace("\nlog =", short))
    status, out = launcher.run(LEAVING_A_HELPER)
    assert status == 128 + signal.SIGKILL
    assert_gone(int(out.split()[0]))


def test_how_sigterm_is_forwarded_can_be_chosen(launcher: Launcher, monkeypatch: pytest.MonkeyPatch) -> None:
    """`srun` would kill its tasks at once; the launcher asks Slurm instead."""
    asked = "lambda child: child.send_signal(__import__('signal').SIGUSR1)"
    monkeypatch.setattr(sys.modules[__name__], "LAUNCHER", LAUNCHER.replace(", log)", f", log, {asked})"))
    process = launcher.start(WAITING_FOR.format(number="signal.SIGUSR1"))
    assert line(process) == "ready"
    process.send_signal(signal.SIGTERM)
    assert line(process) == f"received {int(signal.SIGUSR1)}"
    assert process.wait(TIMEOUT_S) == 5


# --- output that cannot be written

MANY = 3000  # lines of 100 bytes: more than the two pipes between the child and the reader hold
PRINTING = f"for i in range({MANY}): print(f'{{i:099}}')\nraise SystemExit(3)"
PRINTED = [f"{i:099}" for i in range(MANY)]
FULL = Path("/dev/full")


def without_notes(lines: list[str]) -> list[str]:
    return [line for line in lines if not line.startswith("smartmoe: ")]


def test_the_run_continues_when_its_reader_goes_away(launcher: Launcher, tmp_path: Path) -> None:
    """As with `... | head -n 1`: all output is in the log, with one line on what happened, and so is it on stderr."""
    process = launcher.start(PRINTING, tmp_path / "log")
    assert process.stdout is not None
    assert process.stderr is not None
    assert line(process) == PRINTED[0]
    process.stdout.close()
    assert process.wait(TIMEOUT_S) == 3
    note = (
        "smartmoe: cannot write to the terminal: Broken pipe. The run continues with its output in "
        f"{tmp_path / 'log'}; kill {process.pid} ends it."
    )
    log = (tmp_path / "log").read_text().splitlines()
    assert without_notes(log) == PRINTED
    assert [text for text in log if text not in PRINTED] == [note]
    assert process.stderr.read() == note + "\n"


def test_sigterm_ends_a_run_whose_reader_is_gone(launcher: Launcher) -> None:
    process = launcher.start("while True: print('x' * 99)")
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    note = "smartmoe: cannot write to the terminal: Broken pipe. The run continues without output; "
    assert process.stderr.readline() == f"{note}kill {process.pid} ends it.\n"
    process.send_signal(signal.SIGTERM)
    assert process.wait(TIMEOUT_S) == 128 + signal.SIGTERM


def test_sigterm_ends_a_run_whose_reader_does_not_read(launcher: Launcher, tmp_path: Path) -> None:
    """The child prints while it ends, as torchrun does, into a pipe that is full already."""
    child = WAITING_FOR.format(number="signal.SIGTERM").replace('"received", number', '"x" * 500_000')
    process = launcher.start(child.replace("time.sleep(0.05)", "print('x' * 99)"), tmp_path / "log")
    while not (tmp_path / "log").exists() or (tmp_path / "log").stat().st_size < 60_000:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert process.wait(TIMEOUT_S) == 5
    assert "x" * 500_000 in (tmp_path / "log").read_text()


def test_a_log_on_a_full_disk(launcher: Launcher) -> None:
    status, out = launcher.run(PRINTING, FULL)
    assert status == 3
    assert without_notes(out.splitlines()) == PRINTED
    assert [text for text in out.splitlines() if text not in PRINTED] == [
        "smartmoe: cannot write to /dev/full: No space left on device. The run continues, and the file will say how "
        "many lines it lacks.",
        f"smartmoe: {MANY} lines are missing from /dev/full: No space left on device.",
    ]


def test_a_log_that_cannot_be_opened(launcher: Launcher, tmp_path: Path) -> None:
    status, out = launcher.run("print('on the terminal')", tmp_path / "no folder" / "log")
    assert status == 0
    assert out.splitlines()[0] == "on the terminal"
    assert "no folder/log: No such file or directory. The run continues" in out


def test_a_log_is_written_again_when_there_is_space(
    launcher: Launcher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The limit stands for a full disk: the second line fits in part, the third and fourth not at all."""
    limited = "\nimport resource; resource.setrlimit(resource.RLIMIT_FSIZE, (15, resource.RLIM_INFINITY))\nlog ="
    monkeypatch.setattr(sys.modules[__name__], "LAUNCHER", LAUNCHER.replace("\nlog =", limited))
    process = launcher.start("while True: print(input())", tmp_path / "log", stdin=subprocess.PIPE)

    def echo(text: str) -> None:
        assert process.stdin is not None
        process.stdin.write(text + "\n")
        process.stdin.flush()
        while (said := line(process)) != text:
            assert said.startswith("smartmoe: cannot write")

    for text in ("1 in the log", "2 in part", "3 is lost", "4 is lost"):
        echo(text)
    psutil.Process(process.pid).rlimit(psutil.RLIMIT_FSIZE, (psutil.RLIM_INFINITY, psutil.RLIM_INFINITY))
    echo("5 in the log")
    log = tmp_path / "log"
    note = f"smartmoe: 3 lines are missing from {log}: File too large"
    assert log.read_text() == f"1 in the log\n2 \n{note}\n5 in the log\n"


def test_neither_log_nor_terminal(launcher: Launcher) -> None:
    process = launcher.start(PRINTING, FULL)
    assert process.stdout is not None
    assert line(process) == PRINTED[0]
    process.stdout.close()
    assert process.wait(TIMEOUT_S) == 3


def test_no_terminal_from_the_start(launcher: Launcher, tmp_path: Path) -> None:
    command = ["sh", "-c", 'exec "$@" >&-', "sh", sys.executable, "-c", LAUNCHER, str(tmp_path / "log"), PRINTING]
    assert subprocess.run(command, timeout=TIMEOUT_S, check=False).returncode == 3
    assert (tmp_path / "log").read_text().splitlines() == PRINTED


# --- the last line, and the end that always comes

ENDING = """
import sys, time
from pathlib import Path
from megatron_smartmoe.adapter.launch import process
from megatron_smartmoe.adapter.launch.ending import Ending, SharedDeaths
process.GRACE_S = process._MARGIN_S = 0.3
shared = SharedDeaths(directory=Path(sys.argv[1]).parent, name="node0", attempt="7")
ending = Ending(resume="launch --run-dir D", shared=shared)
log = Path(sys.argv[1])
child = [sys.executable, "-u", "-c", sys.argv[2]]
sys.exit(process.run(child, {}, log, ending=ending, rank=RANK, limit_s=0.5))
"""
WAY_ON = "no folder of checkpoints (--save) | to start again: launch --run-dir D"


def with_ending(monkeypatch: pytest.MonkeyPatch, rank: int | None) -> None:
    monkeypatch.setattr(sys.modules[__name__], "LAUNCHER", ENDING.replace("RANK", repr(rank)))


def test_a_rank_of_a_task_is_named_when_it_dies(
    launcher: Launcher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_ending(monkeypatch, rank=3)
    status, out = launcher.run("print('text', end=''); import os; os.kill(os.getpid(), 9)", tmp_path / "log")
    last = f"smartmoe: rank 3 on {os.uname().nodename} was killed by SIGKILL | {WAY_ON}"
    assert status == 128 + signal.SIGKILL
    assert out.splitlines() == (tmp_path / "log").read_text().splitlines() == ["text", last]
    assert '"attempt": "7"' in (tmp_path / "failed-node0.json").read_text()


def test_a_rank_of_a_task_leaves_its_exception(
    launcher: Launcher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_ending(monkeypatch, rank=3)
    child = (
        "import json, os\n"
        "open(os.environ['TORCHELASTIC_ERROR_FILE'], 'w').write(json.dumps({'message': {'message': 'ValueError: x'}}))"
        "\n"
        "raise SystemExit(1)"
    )
    status, out = launcher.run(child, tmp_path / "log")
    assert (status, out) == (1, f"smartmoe: rank 3 on {os.uname().nodename} stopped with ValueError: x | {WAY_ON}\n")


def test_what_torchruns_process_reports(launcher: Launcher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Deaths and text for the log come through a pipe; the terminal has the last line."""
    with_ending(monkeypatch, rank=None)
    child = (
        "import os, json\n"
        "from megatron_smartmoe.adapter.launch.deaths import Death\n"
        "from megatron_smartmoe.adapter.launch.torchrun import Report\n"
        "report = Report.to_launcher()\n"
        "report.write('a table\\nof ')\n"
        "report.write('torchrun\\n')\n"
        "report.death(Death(rank=1, host='n1', status=-11, time_s=1.0))\n"
        "print('text of a rank')\n"
        "raise SystemExit(139)"
    )
    status, out = launcher.run(child, tmp_path / "log")
    last = f"smartmoe: rank 1 on n1 was killed by SIGSEGV (segmentation fault) | {WAY_ON}"
    assert status == 139
    assert out.splitlines() == ["text of a rank", last]
    log = (tmp_path / "log").read_text().splitlines()
    assert sorted(log[:-1]) == ["a table", "of torchrun", "text of a rank"]
    assert log[-1] == last


IGNORES_SIGTERM = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('ready'); time.sleep(100)"


def test_sigterm_ends_what_ignores_it(launcher: Launcher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_ending(monkeypatch, rank=None)
    process = launcher.start(IGNORES_SIGTERM, tmp_path / "log")
    assert line(process) == "ready"
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 128 + signal.SIGKILL
    assert out == f"smartmoe: ended by SIGTERM | {WAY_ON}\n"


def test_a_rank_of_a_task_that_is_ended_for_another_is_no_death(
    launcher: Launcher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_ending(monkeypatch, rank=3)
    process = launcher.start(IGNORES_SIGTERM, tmp_path / "log")
    assert line(process) == "ready"
    there = SharedDeaths(directory=tmp_path, name="node1", attempt="7")
    there.write([Death(rank=5, host="n2", status=3, time_s=time.time() + 1000)])  # a clock that is ahead
    out, _ = process.communicate(timeout=TIMEOUT_S)
    assert out == f"smartmoe: rank 5 on n2 ended with exit status 3 | {WAY_ON}\n"
    assert not (tmp_path / "failed-node0.json").exists()


def test_sigterm_ends_what_is_stopped(launcher: Launcher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_ending(monkeypatch, rank=None)
    process = launcher.start("import os, time; print(os.getpid()); time.sleep(100)", tmp_path / "log")
    os.kill(int(line(process)), signal.SIGSTOP)
    process.send_signal(signal.SIGTERM)
    assert process.wait(TIMEOUT_S) != 0


def test_a_death_on_another_node_ends_this_one(
    launcher: Launcher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_ending(monkeypatch, rank=None)
    process = launcher.start(IGNORES_SIGTERM, tmp_path / "log")
    assert line(process) == "ready"
    there = SharedDeaths(directory=tmp_path, name="node1", attempt="7")
    there.write([Death(rank=5, host="n2", status=3, time_s=1.0)])
    out, _ = process.communicate(timeout=TIMEOUT_S)
    assert out == f"smartmoe: rank 5 on n2 ended with exit status 3 | {WAY_ON}\n"
    assert process.returncode != 0
