"""Jobs that a fault strikes: ranks from a fork server, or the whole launcher; and how they ended."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from scripts.reliability import fault_link
from scripts.reliability.corpus import ROOT
from scripts.reliability.fault_points import Order
from tests.support.ranks import start_ranks

GRACE_S = 10.0  # after a rank has died the launcher ends the others within so long; here the harness stands in for it
HANGS_S = 600.0  # no training here takes a minute on a free machine
VARIABLE = "SMARTMOE_INJECTED_FAULT"


@dataclass(frozen=True, kw_only=True)
class End:
    """How a job ended.

    Attributes:
        status: exit status of each rank, -N for signal N; of the launcher alone where it started the ranks.
        struck: whether the fault came to pass.
        seconds: from the fault, or from the start if it did not strike, to the end of the last process.
        slow_ranks: those that had not ended by themselves when the time for that was over.
        hung: whether the job had to be killed although no rank had died.
        lines: what was printed.
    """

    status: tuple[int, ...]
    struck: bool
    seconds: float
    slow_ranks: tuple[int, ...]
    hung: bool
    lines: tuple[str, ...]

    @property
    def good(self) -> bool:
        """Whether every process ended with status 0."""
        return not self.hung and all(status == 0 for status in self.status)


def run_ranks_with(
    argv: Sequence[str], world_size: int, log_dir: Path, order: Order | None, limit_s: float = HANGS_S
) -> End:
    """Train on ranks of the fork server; the harness ends them where the launcher would."""
    log_dir.mkdir(parents=True, exist_ok=True)
    started = time.time()
    networks = log_dir if order is not None and order.action == "cut the link" else None
    for old in log_dir.glob("*"):
        old.unlink()
    told = asdict(order) if order else None
    ranks = start_ranks(train_with, world_size, list(argv), told, networks, log_dir=log_dir)
    if networks is not None:
        fault_link.plug_in(networks)
    statuses: list[int | None] = [None] * world_size
    slow: tuple[int, ...] = ()
    hung, died_at, continued = False, None, False
    while True:
        time.sleep(0.02)
        statuses = [rank.exitcode for rank in ranks]
        if all(status is not None for status in statuses):
            break
        now = time.time()
        continued = continued or _continue(order, now)
        if died_at is None and any(status not in (None, 0) for status in statuses):
            died_at = now
        late = died_at is not None and now > died_at + GRACE_S
        hung = died_at is None and now > started + limit_s
        if late or hung:
            slow = tuple(number for number, status in enumerate(statuses) if status is None)
            for number in slow:
                _end(ranks[number].pid, with_stacks=hung)
            for rank in ranks:
                rank.join()
            statuses = [rank.exitcode for rank in ranks]
            break
    ended = time.time()
    lines = [
        line
        for number in range(world_size)
        for line in (log_dir / f"rank{number}.log").read_text(errors="replace").splitlines()
    ]
    struck_at = strike_of(order)
    return End(
        status=tuple(status if status is not None else -signal.SIGKILL for status in statuses),
        struck=struck_at is not None,
        seconds=round(ended - (struck_at or started), 1),
        slow_ranks=slow,
        hung=hung,
        lines=tuple(lines),
    )


def run_launcher_with(
    argv: Sequence[str], world_size: int, log_dir: Path, order: Order | None, limit_s: float = HANGS_S
) -> End:
    """Train through the launcher, as a user does, and let it deal with everything."""
    log_dir.mkdir(parents=True, exist_ok=True)
    run_dir = argv[argv.index("--smartmoe-run-dir") + 1]
    flags = [flag for flag in argv if flag not in ("--smartmoe-run-dir", run_dir)]
    command = [sys.executable, "-m", "megatron_smartmoe.adapter.launch", "--nproc", str(world_size)]
    variables = {"PYTHONPATH": f"{ROOT / 'scripts' / 'reliability' / 'inject'}:{ROOT}", "OMP_NUM_THREADS": "1"}
    if order is not None:
        variables[VARIABLE] = json.dumps(asdict(order))
    started, continued, hung = time.time(), False, False
    with (log_dir / "launcher.log").open("wb") as log:
        child = subprocess.Popen(
            [*command, "--run-dir", run_dir, *flags], env={**os.environ, **variables}, stdout=log, stderr=log
        )
        while child.poll() is None:
            time.sleep(0.05)
            continued = continued or _continue(order, time.time())
            if time.time() > started + limit_s:
                hung = True
                for process in [*psutil.Process(child.pid).children(recursive=True), psutil.Process(child.pid)]:
                    _end(process.pid, with_stacks=False)
                child.wait()
    struck_at = strike_of(order)
    return End(
        status=(child.returncode,),
        struck=struck_at is not None,
        seconds=round(time.time() - (struck_at or started), 1),
        slow_ranks=(),
        hung=hung,
        lines=tuple((log_dir / "launcher.log").read_text(errors="replace").splitlines()),
    )


def train_with(argv: list[str], order: dict[str, object] | None, networks: Path | None) -> None:
    """In a rank: the real entry, with the fault in wait; in a network of its own if there is a folder for that."""
    if networks is not None:
        fault_link.enter(networks, int(os.environ["RANK"]))
    from megatron_smartmoe.adapter.pretrain import main
    from scripts.reliability.fault_points import Order, install

    main(argv, callbacks=[install(Order(**order))] if order else [])  # type: ignore[arg-type]


def strike_of(order: Order | None) -> float | None:
    """When the fault struck; None if it has not."""
    if order is None or not Path(order.marker).exists():
        return None
    words = Path(order.marker).read_text(encoding="utf-8").split()
    return float(words[0]) if len(words) == 3 else None


def _continue(order: Order | None, now: float) -> bool:
    """Continue a rank that has stopped itself, when its time is over."""
    if order is None or order.action not in ("pause", "long pause"):
        return True
    struck_at = strike_of(order)
    if struck_at is None or now < struck_at + order.seconds:
        return False
    pid = int(Path(order.marker).read_text(encoding="utf-8").split()[2])
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGCONT)
    return True


def _end(pid: int | None, *, with_stacks: bool) -> None:
    """Kill a process, which may be stopped; with `with_stacks` a rank prints what its threads wait for."""
    assert pid is not None
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGCONT)
        if with_stacks:
            os.kill(pid, signal.SIGABRT)
            time.sleep(1)
        os.kill(pid, signal.SIGKILL)


def losses_of(run_dir: Path) -> list[tuple[int, float]]:
    """(iteration, loss) of every line of metrics.jsonl, those that a resume trained again too."""
    file = run_dir / "metrics.jsonl"
    found = []
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines() if file.exists() else ():
        with contextlib.suppress(json.JSONDecodeError):  # a disk that was full cuts lines
            content = json.loads(line)
            if "lm loss" in content:
                found.append((content["iteration"], content["lm loss"]))
    return found


def clear_lines(lines: Sequence[str], pattern: str) -> list[str]:
    """Lines that match, each once, without the frames of tracebacks."""
    return list(dict.fromkeys(line.strip() for line in lines if re.search(pattern, line) and not line.startswith("  ")))
