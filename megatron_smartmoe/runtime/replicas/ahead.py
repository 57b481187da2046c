"""Replicas from history, planned on a thread while the iteration before still computes.

When the last micro-batch of an iteration has been dispatched, all counts that the next plan depends on are known, while
its backward passes and the optimizer's step are still to come. So planning costs the training loop nothing: the search
is C++ that does not hold the interpreter's lock.

The plan is a function of the counts and of the placement that it starts from. Where the thread has not finished, the
training loop waits for it. A plan that started from another placement than the one in force (homes have moved), or from
other counts than the iteration's in the end (Megatron ran it again), is made again. So timing never decides which plan
is used: all ranks, and a replay, have the same.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from megatron_smartmoe.placement.decisions import Decision
from megatron_smartmoe.placement.replica_planner import PlanAhead, ReplicaPlanner
from megatron_smartmoe.spec.arrays import IntArray

Counts = Callable[[], IntArray]


class PlansAhead:
    """Keeps a planner's history up to date and plans the next iteration on a thread.

    After `start`, call `observe` or `discard` before changing the planner.

    Args:
        planner: Plans from history.
    """

    def __init__(self, planner: ReplicaPlanner) -> None:
        self.planner = planner
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="smartmoe-replicas")
        self._future: Future[PlanAhead] | None = None
        self._counts: Counts | None = None  # of the iteration that is being planned from
        self._found: PlanAhead | None = None
        self._error: Exception | None = None

    def start(self, iteration: int, counts: Counts) -> None:
        """Begin to plan.

        Args:
            iteration: To plan for.
            counts: Returns the counts of the iteration before it, `[L, M, E]`; called on the thread.
        """
        self.discard()
        self._counts = counts
        self._future = self._thread.submit(lambda: self.planner.ahead(iteration, counts()))

    def discard(self) -> None:
        """Forget what was begun, once the thread has left it: its counts are not the iteration's."""
        if self._future is not None:
            self._future.exception()  # waits
        self._future = self._counts = self._found = self._error = None

    def observe(self) -> None:
        """Wait until the planner's history has the counts of the iteration that was begun to plan from."""
        if self._future is None or self._counts is None:
            return
        try:
            self._found = self._future.result()
            self.planner.adopt_history(self._found)
        except Exception as error:  # raised where the plan is asked for
            self._error = error
            self.planner.observe(self._counts())
        self._future = self._counts = None

    def plan(self, iteration: int) -> Decision | None:
        """Make the replicas of an iteration the planner's placement; None when nothing changes.

        Raises:
            PlanError: a layer cannot be planned; the message has its number.
        """
        self.observe()
        found, error = self._found, self._error
        self._found = self._error = None
        if error is not None:
            raise error
        return self.planner.plan(iteration) if found is None else self.planner.adopt_plan(found, iteration)
