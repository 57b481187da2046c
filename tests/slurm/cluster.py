"""A real Slurm on one machine: munged, slurmctld and one slurmd per node, for tests of launch scripts.

Every daemon is a foreground child of this process, with key, sockets, ports, state and log in one directory: the host's
own munge and Slurm are never touched, and a daemon is ended by a signal to a pid that we own. (The alternative, daemons
found again by their pid files, loses the exit status, and a stale file names somebody else's process.) `setpriv
--pdeathsig` ends them even where the test process is killed and `stop` never runs.

All nodes are this host under the names n1, n2, ...: the names do not resolve, the address is 127.0.0.1, and memory,
cores and files are shared. Accounting is off: `scontrol` knows jobs that have ended, `sacct` never does.
"""

import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from tests.support.ports import free_ports

from .config import render_slurm_conf, render_topology_conf

PROGRAMS = ("munged", "slurmctld", "slurmd", "srun", "sbatch", "scontrol", "setpriv")
START_DEADLINE_S = 60.0
STOP_DEADLINE_S = 20.0
LEFTOVER_GRACE_S = 3.0
POLL_S = 0.5  # most looks start a program of Slurm's
LOG_TAIL_LINES = 25
ENDED = frozenset(
    {"BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "TIMEOUT"}
)


class ClusterError(RuntimeError):
    """The cluster did not start, did not answer, or did not end; the message ends with the daemons' logs."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """A job that has ended. `record` holds the fields of `scontrol show job`."""

    job_id: int
    state: str
    exit_code: int
    exit_signal: int
    stdout: str
    record: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class Daemon:
    """A process we started, and the file with its output."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path


def missing_requirement() -> str | None:
    """Say why a cluster cannot run on this host, or None where it can."""
    missing = [name for name in PROGRAMS if shutil.which(name, path=_search_path()) is None]
    if missing:
        return f"not installed: {', '.join(missing)} (apt-get install --no-install-recommends slurm-wlm munge)"
    if os.geteuid() != 0:
        return "slurmd starts tasks as other users and has to be root"
    return None


class SlurmCluster:
    """`with SlurmCluster(root) as slurm:` has idle nodes inside, and nothing of it is running after."""

    def __init__(self, root: Path, num_nodes: int = 4, cpus_per_node: int = 2, kill_wait_s: int = 5) -> None:
        self.root = root.resolve()
        self.num_nodes = num_nodes
        self.cpus_per_node = cpus_per_node
        self.kill_wait_s = kill_wait_s
        self.conf = self.root / "slurm.conf"
        self.node_names = [f"n{index}" for index in range(1, num_nodes + 1)]
        self.env = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SBATCH_", "SRUN_", "SALLOC_"))}
        self.env |= {"PATH": _search_path(), "SLURM_CONF": str(self.conf)}
        self._daemons: list[Daemon] = []

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop()

    def start(self) -> None:
        """Start all daemons and return when every node is idle; on failure end them and raise with their logs."""
        try:
            self._write_files()
            self._start_munged()
            self._start_daemon("slurmctld", "slurmctld", "-D")
            for name in self.node_names:
                self._start_daemon(f"slurmd-{name}", "slurmd", "-D", "-N", name)
            self.wait_until_idle()
        except BaseException:
            with contextlib.suppress(ClusterError):
                self.stop()
            raise

    def stop(self) -> None:
        """End jobs, then daemons, then what survived of a job; raise where one was dead before or had to be killed."""
        troubles = [f"{name} ended before its time" for name in self._dead()]
        try:
            if self._daemons and not troubles:
                self._cancel_all_jobs()
        except (ClusterError, subprocess.SubprocessError) as error:
            troubles.append(f"jobs could not be cancelled: {error}")
        for daemon in reversed(self._daemons):
            daemon.process.terminate()
            try:
                daemon.process.wait(STOP_DEADLINE_S)
            except subprocess.TimeoutExpired:
                daemon.process.kill()
                daemon.process.wait()
                troubles.append(f"{daemon.name} had to be killed")
        troubles += [f"{command} had to be killed" for command in self._kill_leftovers()]
        tails = self._log_tails()
        self._daemons = []
        if troubles:
            raise ClusterError("\n".join([*troubles, tails]))

    def wait_until_idle(self) -> None:
        """Return when no node has a job, nor the rest of one; raise after `START_DEADLINE_S`."""
        self._wait_until(self._all_idle, START_DEADLINE_S, f"{self.num_nodes} idle nodes")

    def processes(self) -> list[tuple[int, str]]:
        """Return (pid, command line) of all that carry this cluster's SLURM_CONF: daemons, slurmstepd, tasks."""
        return list(_processes_with(f"SLURM_CONF={self.conf}"))

    def run(
        self, *argv: str | Path, env: Mapping[str, str] | None = None, cwd: Path | None = None, timeout: float = 120.0
    ) -> subprocess.CompletedProcess[str]:
        """Run a Slurm command (`srun`, `scontrol`, ...) against this cluster; raise where it fails."""
        command = [str(word) for word in argv]
        environment = self.env | dict(env or {})
        done = subprocess.run(
            command, env=environment, cwd=cwd or self.root, timeout=timeout, capture_output=True, text=True, check=False
        )
        if done.returncode != 0:
            output = f"{done.stdout}{done.stderr}"
            raise ClusterError(f"{shlex.join(command)}: status {done.returncode}\n{output}\n{self._log_tails()}")
        return done

    def sbatch(
        self,
        script: Path,
        *args: str,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        timeout: float = 120.0,
    ) -> Job:
        """Run a batch script to its end. `args` are sbatch's options, or the script's own after a "--"."""
        return self.wait(self.submit(script, *args, env=env, cwd=cwd), timeout)

    def submit(self, script: Path, *args: str, env: Mapping[str, str] | None = None, cwd: Path | None = None) -> int:
        """Submit a batch script; return its job id."""
        options, script_args = _split_at_dashes(args)
        done = self.run("sbatch", "--parsable", *options, script.resolve(), *script_args, env=env, cwd=cwd)
        return int(done.stdout.strip().split(";")[0])

    def job_record(self, job_id: int | str) -> dict[str, str]:
        """Return what the controller knows of a job, by field name; of a task of an array it is "ARRAY_TASK"."""
        line = self.run("scontrol", "--oneliner", "show", "job", str(job_id)).stdout
        return dict(word.split("=", 1) for word in line.split() if "=" in word)

    def wait(self, job_id: int | str, timeout: float = 120.0) -> Job:
        """Wait for a job's end, through any requeue; cancel it and raise when `timeout` seconds pass."""
        try:
            self._wait_until(lambda: self.job_record(job_id)["JobState"] in ENDED, timeout, f"the end of job {job_id}")
        except ClusterError as error:
            record = self.job_record(job_id)
            self.run("scancel", str(job_id))
            raise ClusterError(f"{error}\n--- {record}\n--- stdout\n{_read(Path(record['StdOut']))}") from None
        record = self.job_record(job_id)
        exit_code, exit_signal = record["ExitCode"].split(":")
        return Job(
            job_id=int(record["JobId"]),
            state=record["JobState"],
            exit_code=int(exit_code),
            exit_signal=int(exit_signal),
            stdout=_read(Path(record["StdOut"])),
            record=record,
        )

    def _write_files(self) -> None:
        for folder in ("state", "logs", *(f"spool/{name}" for name in self.node_names)):
            (self.root / folder).mkdir(parents=True, exist_ok=True)
        key = self.root / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        (self.root / "topology.conf").write_text(render_topology_conf(self.node_names))
        ports = free_ports(self.num_nodes + 1)
        self.conf.write_text(
            render_slurm_conf(
                root=self.root,
                controller_port=ports[0],
                node_ports=dict(zip(self.node_names, ports[1:], strict=True)),
                cpus_per_node=self.cpus_per_node,
                kill_wait_s=self.kill_wait_s,
            )
        )

    def _start_munged(self) -> None:
        files = {"socket": "munge.sock", "key-file": "munge.key", "pid-file": "munged.pid", "seed-file": "munged.seed"}
        options = [f"--{option}={self.root / name}" for option, name in files.items()]
        # --force: munged wants a socket directory that all users may enter, and pytest's are the owner's alone
        self._start_daemon("munged", "munged", "--foreground", "--force", *options)
        self._wait_until((self.root / "munge.sock").exists, START_DEADLINE_S, "munged's socket")

    def _start_daemon(self, name: str, *argv: str) -> None:
        log = self.root / "logs" / f"{name}.log"
        with log.open("wb") as out:
            process = subprocess.Popen(
                ["setpriv", "--pdeathsig", "TERM", *argv],
                env=self.env,
                cwd=self.root,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,  # Ctrl-C is for pytest alone, which then stops the daemons in order
            )
        self._daemons.append(Daemon(name=name, process=process, log=log))

    def _all_idle(self) -> bool:
        with contextlib.suppress(ClusterError):  # the controller does not answer yet
            states = self.run("sinfo", "--noheader", "--Node", "--partition=test", "--format=%T").stdout.split()
            return states == ["idle"] * self.num_nodes
        return False

    def _dead(self) -> list[str]:
        return [f"{d.name} (status {d.process.returncode})" for d in self._daemons if d.process.poll() is not None]

    def _cancel_all_jobs(self) -> None:
        if job_ids := self._listed_jobs():
            self.run("scancel", *job_ids)
            self._wait_until(lambda: not self._listed_jobs(), STOP_DEADLINE_S + self.kill_wait_s, "the end of all jobs")

    def _listed_jobs(self) -> list[str]:
        return self.run("squeue", "--noheader", "--format=%A").stdout.split()

    def _kill_leftovers(self) -> list[str]:
        end = time.monotonic() + LEFTOVER_GRACE_S  # slurmstepd outlives the end of its job by a moment
        while self.processes() and time.monotonic() < end:
            time.sleep(POLL_S)
        killed = []
        for pid, command in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
                killed.append(f"{command} ({pid})")
        return killed

    def _wait_until(self, holds: Callable[[], bool], deadline_s: float, what: str) -> None:
        end = time.monotonic() + deadline_s
        while not holds():
            if dead := self._dead():
                raise ClusterError(f"waiting for {what}: {', '.join(dead)} ended\n{self._log_tails()}")
            if time.monotonic() > end:
                raise ClusterError(f"waiting for {what}: not within {deadline_s:g} s\n{self._log_tails()}")
            time.sleep(POLL_S)

    def _log_tails(self) -> str:
        return "\n".join(
            "\n".join([f"--- {daemon.log.name}", *_read(daemon.log).splitlines()[-LOG_TAIL_LINES:]])
            for daemon in self._daemons
        )


def _processes_with(variable: str) -> Iterator[tuple[int, str]]:
    """Yield (pid, command line) of the processes, but for this one, that were started with `NAME=value` set."""
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            pid = int(folder.name)
            if pid != os.getpid() and variable.encode() in (folder / "environ").read_bytes().split(b"\0"):
                yield pid, (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()


def _search_path() -> str:
    """Return PATH with the folders of the daemons, which a user's shell often leaves out."""
    return os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])


def _split_at_dashes(args: Sequence[str]) -> tuple[Sequence[str], Sequence[str]]:
    if "--" not in args:
        return args, ()
    cut = args.index("--")
    return args[:cut], args[cut + 1 :]


def _read(path: Path) -> str:
    return path.read_text(errors="replace") if path.exists() else f"({path} was never written)"
