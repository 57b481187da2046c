"""Whether the next step may not fit into a rank's memory, judged by how its peak has just risen.

A rank's peak rises when its experts get more rows than ever before. The next rise is taken to be as large as the last
one, if there was one in the last log interval: so a warning comes before the step that fails, and a run whose peak
stands gets none.
"""

from __future__ import annotations

import numpy as np

from megatron_smartmoe.spec.arrays import FloatArray

GIB = 2**30


class PeakMemory:
    """Peaks of all ranks, log interval by log interval."""

    def __init__(self) -> None:
        self._last_R: FloatArray | None = None
        self._is_first = True
        self._warned: set[int] = set()

    def note(self, peak_R: FloatArray, limit_R: FloatArray) -> str | None:
        """Add the peaks of an interval, in bytes.

        Args:
            peak_R: of each rank since it started.
            limit_R: what each rank's memory has for it.

        Returns:
            A warning about the rank that has the least left, the first time that another rise like its last one would
            not fit.
        """
        if self._is_first:  # optimizer states are allocated in the first step: what follows it is no rise
            self._is_first = False
            return None
        last_R, self._last_R = self._last_R, peak_R
        if last_R is None:
            return None
        rise_R = peak_R - last_R
        left_R = np.where(rise_R > 0, limit_R - peak_R - rise_R, np.inf)
        rank = int(np.argmin(left_R))
        if left_R[rank] >= 0 or rank in self._warned:
            return None
        self._warned.add(rank)
        return (
            f"memory: rank {rank} peaked at {peak_R[rank] / GIB:.2f} of {limit_R[rank] / GIB:.2f} GiB, "
            f"{rise_R[rank] / GIB:.2f} GiB more than one log line before: another rise like this would not fit. Save a "
            "checkpoint and resume with a smaller --micro-batch-size, or with --recompute-granularity selective "
            "--recompute-modules moe"
        )
