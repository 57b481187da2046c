"""From the records of all ranks to the one rank that holds training up, and the line that says so.

Method. A step may take `MULTIPLE` times the median step plus a floor. Where there is no median yet, and while any rank
starts, saves, evaluates, compiles or ends, nothing may stand still for `LONG_S` instead. When a limit is passed, the
slowest rank is, in this order: one whose node is silent, whose process has ended, or is stopped; the one that the
others wait for, directly or through further ranks; and where no rank waits on the host (NCCL waits on the device), the
one that has posted fewer operations of its groups than the others. The oldest record breaks a tie.

A rank waits for those members of a group that have not posted the operation that it has: the k-th operation of a group
is the same on all its ranks. In a send or a receive it waits for the rank at the other end.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum

from megatron_smartmoe.runtime.progress import NO_PEER, Phase, RankProgress

MULTIPLE = 3.0  # of the median step
LONG_S = 300.0  # half of the time after which torch ends a job by itself (--distributed-timeout-minutes 10)
SILENT_S = 5.0  # a node reports every second
MOVING_S = 3.0  # a rank that has posted something in the last seconds is slow, and does not stand still


class Reason(Enum):
    """Why a rank is the slowest."""

    SILENT = "its node does not answer"
    GONE = "its process has ended"
    STOPPED = "stopped by a signal"
    BUSY = "the others wait for it"
    SLOW = "slower than the others"
    ALL_WAIT = "every rank waits"


@dataclass(frozen=True, kw_only=True)
class RankReport:
    """One rank, as its node's watchdog sees it.

    Attributes:
        progress: its record.
        host: name of its node.
        node: number of its node.
        state: of its process, a letter of proc(5); None if there is no such process any more.
        silent_s: how long ago its node sent this report.
    """

    progress: RankProgress
    host: str
    node: int
    state: str | None
    silent_s: float = 0.0

    @property
    def is_gone(self) -> bool:
        """Whether the process has ended."""
        return self.state in (None, "Z", "X")


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The rank that holds training up.

    Attributes:
        report: of that rank.
        reason: why it is the slowest.
        overdue_s: how long the step takes, or nothing has moved.
        limit_s: how long that may be.
        median_step_s: None where a limit of its own applies.
        num_ranks: of the job, as far as they have reported.
        num_waiting: ranks that wait in an operation.
        waited_s: by the host of the named rank in this step, and by the one that waited longest.
        hosts: of all ranks.
    """

    report: RankReport
    reason: Reason
    overdue_s: float
    limit_s: float
    median_step_s: float | None
    num_ranks: int
    num_waiting: int
    waited_s: tuple[float, float]
    hosts: tuple[str, ...]

    @property
    def line(self) -> str:
        """What a person reads, without what becomes of the stacks."""
        rank = self.report.progress
        if self.median_step_s is None:
            head = f"no progress for {self.overdue_s:.0f} s"
        else:
            head = f"this step has taken {self.overdue_s:.1f} s, the median step takes {self.median_step_s:.2f} s"
        who = f"the slowest rank is {rank.rank} of {self.num_ranks} (pid {rank.pid} on {self.report.host})"
        return f"{head}; {who}: {rank.place_in_iteration}; {self._why}"

    @property
    def _why(self) -> str:
        rank, others = self.report.progress, _waiting_text(self.num_waiting)
        match self.reason:
            case Reason.SILENT:
                seconds = self.report.silent_s
                return f"its node has not answered for {seconds:.0f} s: look at the host and at its network"
            case Reason.GONE:
                return "its process has ended"
            case Reason.STOPPED:
                return f"it is stopped by a signal, and {others}; kill -CONT {rank.pid} continues it"
            case Reason.BUSY:
                what = {"R": "it is computing", "D": "it waits for a disk or a file system"}
                state = what.get(self.report.state or "", "it is outside the collectives")
                return f"{state}, and {others}"
            case Reason.SLOW:
                own, longest = self.waited_s
                text = f"it has waited {own:.1f} s for others in this step, another rank {longest:.1f} s"
                return f"it is slow but moves, and training continues ({text})"
            case Reason.ALL_WAIT:
                hosts = f"the network of {', '.join(self.hosts)}" if len(self.hosts) > 1 else "the network"
                return f"every rank waits in an operation that the others have joined: look at {hosts}"


def _waiting_text(number: int) -> str:
    return f"{number} rank{' waits' if number == 1 else 's wait'} in a collective"


def judge(reports: Sequence[RankReport], watched_s: float = math.inf) -> Verdict | None:
    """The verdict, or None while everything is within its limit.

    Args:
        reports: of every rank that has reported, from all nodes.
        watched_s: how long the watchdog has watched; what was before that is not held against anybody.
    """
    active = [report for report in reports if not (report.is_gone and report.progress.phase is Phase.ENDING)]
    if all(report.is_gone for report in active):
        return None  # the job has ended
    limit, median = limit_s(report.progress for report in active)
    overdue = max(_overdue_s(report.progress, has_median=median is not None) for report in active)
    if min(overdue, watched_s) <= limit:
        return None
    report, reason = _slowest(active)
    waited = [other.progress.waited_s for other in active]
    return Verdict(
        report=report,
        reason=reason,
        overdue_s=overdue,
        limit_s=limit,
        median_step_s=median,
        num_ranks=len(reports),
        num_waiting=sum(other.progress.is_waiting for other in active if other is not report),
        waited_s=(report.progress.waited_s, max(waited)),
        hosts=tuple(sorted({other.host for other in active})),
    )


def limit_s(ranks: Iterable[RankProgress]) -> tuple[float, float | None]:
    """How long a step may take, and the median step; or LONG_S and None where steps cannot be compared."""
    ranks = list(ranks)
    medians = [rank.median_step_s for rank in ranks if rank.median_step_s is not None]
    if len(medians) < len(ranks) or any(rank.phase is not Phase.STEP for rank in ranks):
        return LONG_S, None
    median = max(medians)
    return MULTIPLE * median + max(rank.floor_s for rank in ranks), median


def _overdue_s(rank: RankProgress, *, has_median: bool) -> float:
    """A step is judged by its length; everything else by how long nothing has moved."""
    return rank.phase_s if has_median else rank.still_s


def _slowest(reports: Sequence[RankReport]) -> tuple[RankReport, Reason]:
    for reason, is_it in (
        (Reason.SILENT, lambda report: report.silent_s > SILENT_S),
        (Reason.GONE, lambda report: report.is_gone),
        (Reason.STOPPED, lambda report: report.state in ("T", "t")),
    ):
        if found := [report for report in reports if is_it(report)]:
            return max(found, key=lambda report: report.progress.still_s), reason
    awaited = _awaited(reports)
    if awaited is not None and awaited.progress.still_s > MOVING_S:
        return awaited, Reason.BUSY
    if awaited is None and min(report.progress.still_s for report in reports) > MOVING_S:
        return max(reports, key=lambda report: report.progress.still_s), Reason.ALL_WAIT
    return _least_waiting(reports), Reason.SLOW


def _least_waiting(reports: Sequence[RankReport]) -> RankReport:
    """The rank that kept the others waiting: of those in the earliest iteration, the one that waited least itself.

    Where hosts do not wait (NCCL), the one that is behind in its groups.
    """
    waited = [report.progress.waited_s for report in reports]
    awaited = _awaited(reports)
    if awaited is not None and max(waited) - min(waited) < MOVING_S / 2:
        return awaited
    return min(reports, key=lambda report: (report.progress.iteration, report.progress.waited_s))


def _awaited(reports: Sequence[RankReport]) -> RankReport | None:
    """Of the ranks that do not wait, the one that most of the others wait for, directly or through further ranks."""
    by_rank = {report.progress.rank: report.progress for report in reports}
    awaited: Counter[int] = Counter()
    for rank in by_rank.values():
        awaited.update(_end_of_waits(rank, by_rank))

    def lateness(report: RankReport) -> tuple[float, ...]:
        rank = report.progress
        return (-rank.iteration, awaited[rank.rank], _num_ahead(rank, by_rank.values()), rank.still_s)

    return max((report for report in reports if not report.progress.is_waiting), key=lateness, default=None)


def _end_of_waits(rank: RankProgress, by_rank: dict[int, RankProgress]) -> set[int]:
    """The ranks that do not wait, and that `rank` waits for through any number of others."""
    seen, ends, queue = {rank.rank}, set(), [rank]
    while queue:
        for other in _waits_for(queue.pop(), by_rank):
            if other.rank in seen:
                continue
            seen.add(other.rank)
            if other.is_waiting:
                queue.append(other)
            else:
                ends.add(other.rank)
    return ends


def _waits_for(rank: RankProgress, by_rank: dict[int, RankProgress]) -> list[RankProgress]:
    """The ranks that have not joined the operation in which `rank` waits."""
    if not rank.is_waiting:
        return []
    if rank.peer != NO_PEER:
        return [by_rank[rank.peer]] if rank.peer in by_rank else []
    return [
        other
        for other in by_rank.values()
        if (group := other.groups.get(rank.group_key)) is not None and group.posted < rank.number
    ]


def _num_ahead(rank: RankProgress, others: Iterable[RankProgress]) -> int:
    """In how many of its groups other ranks have posted more than it, less those in which it has."""
    ahead = 0
    for other in others:
        for key, group in rank.groups.items():
            if (theirs := other.groups.get(key)) is not None:
                ahead += (theirs.posted > group.posted) - (theirs.posted < group.posted)
    return ahead
