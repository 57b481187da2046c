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

from megatron_smartmoe.cost.replicas import TransferPrice
from megatron_smartmoe.placement.relay import RelayTree
from megatron_smartmoe.spec.arrays import FloatArray, IntArray
from megatron_smartmoe.spec.placement import SlotChange

MOST_CANDIDATES = 4  # of a decision that are logged, so that its line stays small
MOST_FORECASTS = 2  # layers of a decision whose forecast is logged
_OFTEN_EMPTY = ("failure", "reached", "candidates", "forecast", "horizon_iterations", "margin", "price_tokens")
_HOTTEST = 3  # experts of a forecast that are logged


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """Something that a decision chose between, priced. What is not known, or does not apply, is None.

    Attributes:
        name: what it is, in words.
        chosen: whether it is what the decision proposes, which may be refused all the same.
        layer: row of the layer that it concerns; None for all.
        gain_s: predicted seconds per iteration that it saves against changing nothing; the sum of the next three.
        compute_s: of these, in the experts' computation.
        traffic_s: of these, in sending tokens.
        replicas_s: of these, in sending replicas that are not hidden.
        cost_s: one-time seconds of experts that move.
        step_s: predicted seconds of a step.
        busiest_tokens: tokens of the busiest rank, in an iteration (`replicas`) or a micro-batch (`replans`).
        transfers: transfers of replicas that follow one another.
        transfer_tokens: tokens of the busiest rank that take as long as these, as far as they are not hidden; None for
            as many times the decision's `price_tokens`.
    """

    name: str
    chosen: bool
    layer: int | None = None
    gain_s: float | None = None
    compute_s: float | None = None
    traffic_s: float | None = None
    replicas_s: float | None = None
    cost_s: float | None = None
    step_s: float | None = None
    busiest_tokens: float | None = None
    transfers: int | None = None
    transfer_tokens: float | None = None

    @classmethod
    def in_tokens(
        cls, name: str, *, chosen: bool, layer: int, busiest_tokens: float, tree: RelayTree, price: TransferPrice
    ) -> Candidate:
        """Replicas of one layer, judged by the tokens of the busiest rank and the transfers along their tree."""
        inside, between = tree.steps_by_link(price.num_nodes)
        transfers, tokens = inside + between, price.tokens(inside, between)
        return cls(
            name=name,
            chosen=chosen,
            layer=layer,
            busiest_tokens=busiest_tokens,
            transfers=transfers,
            transfer_tokens=None if tokens == transfers * price.each_tokens else tokens,
        )


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """The load of a layer that was expected.

    Attributes:
        layer: row of the layer.
        error: share of the tokens by which earlier forecasts were off (total variation).
        hottest: the experts with most tokens, and their shares of the tokens.
    """

    layer: int
    error: float
    hottest: tuple[tuple[int, float], ...]

    @classmethod
    def of(cls, layer: int, error: float, share_E: FloatArray) -> Forecast:
        """From the shares of all experts."""
        order = np.argsort(-share_E, kind="stable")[:_HOTTEST].tolist()
        hottest = tuple((expert, float(share_E[expert])) for expert in order)
        return cls(layer=layer, error=float(error), hottest=hottest)


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
        realised_gain_s: seconds saved per iteration, in reviews alone: of homes as priced on the loads since the move,
            of a switch as measured.
        cost_s: one-time seconds of the move.
        moved_bytes: expert state that moves.
        failure: why the migration did not carry it out; None if it did, or if nothing was to move.
        reached: slots that a migration which failed has changed all the same.
        candidates: what was chosen between, at most `MOST_CANDIDATES`, the best ones.
        forecast: the load that was expected, of at most `MOST_FORECASTS` layers.
        horizon_iterations: iterations that a gain is counted over.
        margin: a gain over the horizon must be above this many times the cost.
        price_tokens: tokens of the busiest rank that take as long as one transfer of a replica of a few.
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
    candidates: tuple[Candidate, ...] = ()
    forecast: tuple[Forecast, ...] = ()
    horizon_iterations: int | None = None
    margin: float | None = None
    price_tokens: float | None = None

    def to_line(self) -> str:
        """One line of JSON; equal decisions give equal lines."""
        content: dict[str, Any] = asdict(self)
        for name in ("changes", "reached"):
            content[name] = [[c.layer, c.rank, c.slot, c.before, c.after] for c in getattr(self, name)]
        content["candidates"] = [_without_unknown(one) for one in content["candidates"]]
        for name in _OFTEN_EMPTY:
            if content[name] in (None, [], ()):
                del content[name]
        return json.dumps(content, sort_keys=True)


def _without_unknown(content: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in content.items() if value is not None}


def digest_of(*arrays: FloatArray | IntArray) -> str:
    """Equal for equal numbers, on every rank and machine; 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for array in arrays:
        whole = np.issubdtype(array.dtype, np.integer)
        digest.update(f"{array.shape}".encode())
        digest.update(np.ascontiguousarray(array).astype("<i8" if whole else "<f8").tobytes())
    return digest.hexdigest()[:16]
