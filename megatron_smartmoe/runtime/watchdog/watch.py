"""The thread that watches a node's ranks: reads their records twice a second, and says when training stands still.

It runs in the launcher, which lives as long as the ranks and computes nothing; where ranks are started without the
launcher, in the first rank of each node. Node 0 hears of the other nodes and says the line for all. It reports, and
ends nothing: a limit that was too short costs a line.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

from megatron_smartmoe.runtime.progress import Phase, ProgressTable, RankProgress, process_state
from megatron_smartmoe.runtime.watchdog.nodes import Nodes
from megatron_smartmoe.runtime.watchdog.process import is_same, kernel_view, stacks_of
from megatron_smartmoe.runtime.watchdog.verdict import RankReport, Reason, Verdict, judge

_PERIOD_S = 0.5
_ABSENT_S = 5.0  # between two turns: the job was suspended, or the machine runs nothing in time
_CONFIRMATIONS = 2  # turns in a row that have to agree
_MOST_STACKS_BYTES = 2**20  # of one rank's file, which then begins anew
_ENDING_TURNS = 4  # after which a process that has ended ends the job too, through torchrun


class Watchdog:
    """Watches the ranks of one node.

    Args:
        table: their records.
        run_dir: where stacks are written; None: they are printed.
        say: prints a line, or several.
        nodes: what connects it to other nodes; None on a single node. It is started and stopped here.
    """

    def __init__(
        self, table: ProgressTable, *, run_dir: Path | None, say: Callable[[str], object], nodes: Nodes | None = None
    ) -> None:
        self._table, self._run_dir, self._say, self._nodes = table, run_dir, say, nodes
        self._node = nodes.node if nodes is not None else 0
        self._host = socket.gethostname()
        self._episode: _Episode | None = None
        self._num_episodes = 0
        self._overdue_turns = 0
        self._stacks_taken = 0  # number of node 0's verdict for which they were
        self._watching_since = self._last_turn = time.monotonic()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="smartmoe-watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def start(self) -> None:
        """Begin to watch."""
        if self._nodes is not None:
            self._nodes.start()
        self._thread.start()

    def stop(self) -> None:
        """End it, before the ranks' records are gone."""
        self._end.set()
        self._thread.join()
        if self._nodes is not None:
            self._nodes.stop()

    def _watch(self) -> None:
        while not self._end.wait(_PERIOD_S):
            try:
                self.turn()
            except Exception as error:  # a mistake of the watchdog costs the watchdog
                self._say(f"the watchdog of {self._host} has ended ({type(error).__name__}: {error}); training goes on")
                return

    def turn(self) -> None:
        """Look once, and say what there is to say."""
        now = time.monotonic()
        if now - self._last_turn > _ABSENT_S:
            self.watched_from(now)
        self._last_turn = now
        # Step 1: where every rank is, on this node and, for node 0, on the others.
        own = self._own_reports()
        reports = own
        if self._nodes is not None:
            self._nodes.publish(own)
            reports = own + self._nodes.others()
        # Step 2: node 0 judges for all; another node does when it has lost contact with node 0.
        if self._node == 0 or (self._nodes is not None and self._nodes.is_cut_off):
            self._judge(reports)
        # Step 3: a rank of this node that node 0 has named writes its stacks.
        elif self._nodes is not None:
            self._listen(self._nodes, own)

    def _listen(self, nodes: Nodes, own: list[RankReport]) -> None:
        """On a node that hears from node 0: leave judging to it, and do what it asks for."""
        if self._episode is not None:
            self._say(f"the watchdog of node {self._node} reaches node 0 again, which reports for all nodes")
        self._episode, self._overdue_turns = None, 0
        if nodes.named is None or nodes.named[0] <= self._stacks_taken:
            return
        self._stacks_taken, rank = nodes.named
        for report in own:
            if report.progress.rank == rank:
                self._write_stacks(report, "node 0 names this rank as the slowest")

    def watched_from(self, moment: float) -> None:
        """Hold nothing against the ranks that was before `moment`, a reading of time.monotonic()."""
        self._watching_since = moment

    def _own_reports(self) -> list[RankReport]:
        reports = []
        for progress in self._table.read():
            state = process_state(progress.pid) if is_same(progress) else None
            reports.append(RankReport(progress=progress, host=self._host, node=self._node, state=state))
        return reports

    def _judge(self, reports: list[RankReport]) -> None:
        verdict = judge(reports, time.monotonic() - self._watching_since)
        self._overdue_turns = self._overdue_turns + 1 if verdict is not None else 0
        if self._episode is not None and self._episode.is_over(reports, is_overdue=verdict is not None):
            self._say(self._episode.end_line(reports))
            self._episode = None
        needed = _ENDING_TURNS if verdict is not None and verdict.reason is Reason.GONE else _CONFIRMATIONS
        if verdict is None or self._overdue_turns < needed:
            return
        if self._episode is None or self._episode.is_worse(verdict):
            began = self._episode.began if self._episode is not None else None
            self._episode = _Episode(verdict, reports, began)
            self._num_episodes += 1
            self._report(verdict)

    def _report(self, verdict: Verdict) -> None:
        report = verdict.report
        if report.node == self._node:
            stacks = self._write_stacks(report, verdict.line)
        else:
            assert self._nodes is not None
            self._nodes.name(self._num_episodes, report.progress.rank)
            stacks = self._place_of_stacks(report) if verdict.reason is not Reason.SILENT else ""
        text = "; ".join(part for part in (verdict.line, self._what_is_unknown(), stacks) if part)
        self._say(f"iteration {report.progress.iteration:8d} | WARNING: {text} |")

    def _what_is_unknown(self) -> str:
        """What a verdict of several nodes lacks; empty if nothing."""
        nodes = self._nodes
        if nodes is None:
            return ""
        if self._node:
            contact = f"has not reached node 0 for {nodes.without_contact_s:.0f} s"
            return f"this is node {self._node}, which {contact} and knows its own ranks only"
        unheard = nodes.num_unheard
        return f"{unheard} node{' has' if unheard == 1 else 's have'} never sent a report" if unheard else ""

    def _place_of_stacks(self, report: RankReport) -> str:
        """How the line names the file that another node writes."""
        if self._run_dir is None:
            return f"its stacks: see the output of {report.host}"
        return f"its stacks: {self._stacks_file(report.progress)} (written on {report.host})"

    def _stacks_file(self, rank: RankProgress) -> Path:
        assert self._run_dir is not None
        return self._run_dir / f"stacks-rank{rank.rank}.txt"

    def _write_stacks(self, report: RankReport, why: str) -> str:
        """Write the stacks of a rank of this node; returns how the line names what was written."""
        rank, stopped = report.progress, report.state in ("T", "t")
        if report.state is None:
            return "it left no stacks"
        stacks = stacks_of(rank)
        body = stacks if stacks is not None else kernel_view(rank.pid)
        absence = "a stopped process cannot print its stacks" if stopped else "it did not print its stacks"
        if self._run_dir is None:
            self._say(f"stacks of rank {rank.rank}, pid {rank.pid} on {self._host}:\n{body}")
            return "its stacks: printed above" if stacks is not None else f"{absence}: what /proc has is printed above"
        path = self._stacks_file(rank)
        head = f"{time.strftime('%Y-%m-%d %H:%M:%S')} rank {rank.rank}, pid {rank.pid} on {self._host}: {why}"
        try:
            too_long = path.exists() and path.stat().st_size > _MOST_STACKS_BYTES
            with path.open("w" if too_long else "a", encoding="utf-8") as file:
                file.write(f"==== {head}\n{body.rstrip()}\n\n")
        except OSError as error:
            return f"its stacks could not be written to {path}: {error.strerror}"
        return f"its stacks: {path}" if stacks is not None else f"{absence}: {path} has what /proc says of it"


class _Episode:
    """A time in which training stands still or is slow, from the first line about it to the last."""

    def __init__(self, verdict: Verdict, reports: list[RankReport], began: float | None) -> None:
        self._verdict = verdict
        self.began = began if began is not None else time.monotonic() - verdict.overdue_s
        self._steps = {report.progress.rank: report.progress.steps for report in reports}
        self._posted = {report.progress.rank: report.progress.posted for report in reports}

    def is_over(self, reports: list[RankReport], *, is_overdue: bool) -> bool:
        """Whether a whole step has been within its limit since; outside of steps, whether every rank has moved."""
        if is_overdue:
            return False
        ranks = [report.progress for report in reports]
        if all(rank.phase is Phase.ENDING for rank in ranks):
            return True
        if self._verdict.median_step_s is None:
            return all(rank.posted > self._posted.get(rank.rank, -1) for rank in ranks)
        return all(rank.steps >= self._steps.get(rank.rank, 0) + 2 for rank in ranks)

    def is_worse(self, verdict: Verdict) -> bool:
        """Whether what was slow stands still now."""
        return self._verdict.reason is Reason.SLOW and verdict.reason in (Reason.STOPPED, Reason.SILENT)

    def end_line(self, reports: list[RankReport]) -> str:
        """That training goes on, and after how long."""
        rank = self._verdict.report.progress.rank
        iteration = max(report.progress.iteration for report in reports)
        seconds = time.monotonic() - self.began
        text = f"training continues; it was held up for {seconds:.0f} s, the slowest rank was {rank}"
        return f"iteration {iteration:8d} | {text} |"
