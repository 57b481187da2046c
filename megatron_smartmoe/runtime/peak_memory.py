"""Whether the next step may not fit into a rank's memory, judged by how its peak has risen so far.

A rank's peak rises when its experts get more rows than ever before. The next rise is taken to be as large as the
largest of the last few: then a warning comes before the step that fails, and a run whose peak stands still gets none.
"""

from __future__ import annotations

from collections import deque

import numpy as np

from megatron_smartmoe.spec.arrays import FloatArray

RISES = 5  # log intervals that are looked back at
GIB = 2**30


class PeakMemory:
    """Peaks of all ranks, log interval by log interval."""

    def __init__(self) -> None:
        self._peaks: deque[FloatArray] = deque(maxlen=RISES + 1)
        self._warned: set[int] = set()

    def note(self, peak_R: FloatArray, limit_R: FloatArray) -> str | None:
        """Add the peaks of an interval, in bytes.

        Args:
            peak_R: of each rank since it started.
            limit_R: what each rank's memory has for it.

        Returns:
            A warning about the rank that has the least left, the first time that a rise as before would not fit.
        """
        self._peaks.append(peak_R)
        if len(self._peaks) < 3:  # the first rise is that from nothing to a training that is under way
            return None
        rise_R = np.diff(np.stack(list(self._peaks)[1:] if len(self._peaks) <= RISES else self._peaks), axis=0).max(
            axis=0
        )
        left_R = limit_R - peak_R - rise_R
        rank = int(np.argmin(left_R))
        if rise_R[rank] <= 0 or left_R[rank] >= 0 or rank in self._warned:
            return None
        self._warned.add(rank)
        return (
            f"memory: rank {rank} peaked at {peak_R[rank] / GIB:.2f} of {limit_R[rank] / GIB:.2f} GiB and its peak has "
            f"risen by {rise_R[rank] / GIB:.2f} GiB from one log line to another: the next such step would not fit. "
            "Save a checkpoint and resume with a smaller --micro-batch-size, or with --recompute-granularity selective "
            "--recompute-modules moe"
        )
