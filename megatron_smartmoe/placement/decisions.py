"""A decision as it is logged: its inputs, what it changes, what it is predicted to save, and why it was taken or not.

One JSON object per line (`smartmoe.jsonl`). The digests make two runs comparable: equal inputs must give equal plans,
on every rank and in a replay.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from megatron_smartmoe.spec.arrays import FloatArray, IntArray
from megatron_smartmoe.spec.placement import SlotChange


@dataclass(frozen=True, kw_only=True)
class Decision:
    """One decision.

    Attributes:
        iteration: training iteration before which it takes effect.
        kind: which loop decided; `review` is the verdict on an earlier move of homes, kept or reverted; `pool` is a
            switch between settings of the pool; `replans` are the layers that were planned anew for a micro-batch.
        group: expert-parallel group, -1 for all of them.
        inputs: digest of the numbers that it was made from.
        before: digest of the placement before; for a switch, the setting's name.
        after: digest of the placement that was proposed; for a switch, the setting's name.
        taken: whether it is now in force.
        why: the reason in words, with the numbers.
        changes: slots that the proposal changes.
        predicted_gain_s: predicted seconds saved per iteration; in a review, what was predicted for the move.
        realised_gain_s: measured seconds saved per iteration; only a review has them.
        cost_s: one-time seconds of the move.
        moved_bytes: expert state that moves.
        failure: why the migration did not carry it out; None if it did, or if nothing was to move.
        reached: slots that a migration which failed has changed all the same.
    """

    iteration: int
    kind: Literal["homes", "replicas", "review", "pool", "replans"]
    group: int
    inputs: str
    before: str
    after: str
    taken: bool
    why: str
    changes: tuple[SlotChange, ...]
    predicted_gain_s: float | None = None
    realised_gain_s: float | None = None
    cost_s: float | None = None
    moved_bytes: int = 0
    failure: str | None = None
    reached: tuple[SlotChange, ...] = ()

    def to_line(self) -> str:
        """One line of JSON; equal decisions give equal lines."""
        content: dict[str, Any] = asdict(self)
        for name in ("changes", "reached"):
            content[name] = [[c.layer, c.rank, c.slot, c.before, c.after] for c in getattr(self, name)]
        for name in ("failure", "reached"):  # rare, and not in files of earlier versions
            if not content[name]:
                del content[name]
        return json.dumps(content, sort_keys=True)


def digest_of(*arrays: FloatArray | IntArray) -> str:
    """Equal for equal numbers, on every rank and machine; 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for array in arrays:
        whole = np.issubdtype(array.dtype, np.integer)
        digest.update(f"{array.shape}".encode())
        digest.update(np.ascontiguousarray(array).astype("<i8" if whole else "<f8").tobytes())
    return digest.hexdigest()[:16]
