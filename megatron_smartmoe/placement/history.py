"""Recent routing and the forecast: a window of records, a forecast with its error, and scenarios to plan for.

Forecast. Three averages run side by side, per layer: the last record, a short and a long exponential one. The one whose
forecasts have been closest lately is used, so a steady load is averaged and a drifting one is followed; the error is
kept and reported. Error and distance are total variation: the share of all tokens that would have to choose another
expert.

Jumps. A record that is several times further from its forecast than usual begins another regime (a burst, or its end).
The averages restart there instead of mixing the two, and the regime before stays among the scenarios for a while,
since bursts end. No rule that sees history alone can forecast the record in which a jump happens.

Scenarios. A plan is judged on the forecast, the latest records (their micro-batches where they are known apart), the
regime before the last jump, and perturbed forecasts, each expert up or down by its own factor. How far follows the
measured error, in steps, and the pattern never changes: a plan that is robust to them stays robust, and replicas stay
where they are. They are drawn uniformly, not from a normal distribution, because a uniform draw needs no transcendental
function and so is equal on every machine.
"""

from __future__ import annotations

import copy
import functools
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_smartmoe.errors import PlanError
from megatron_smartmoe.spec.arrays import FloatArray, IntArray
from megatron_smartmoe.spec.placement import BoolArray

_SEED = 20230711  # of the perturbed forecasts; any number would do, but it must be the same on every rank
_FIRST_JUMP = 3  # records before a jump can be distinguished from the start of the averages
_SAME_REGIME = 0.5  # a regime is back when it is this much closer to the record than the forecast; an estimate


@dataclass(frozen=True, kw_only=True)
class HistoryOptions:
    """How much is remembered.

    Attributes:
        window: records kept for scenarios.
        decays: weight of the past in each running average; 0 is the last record alone.
        error_decay: weight of the past in the running forecast errors.
        spreads: spread of each perturbed forecast, in units of the expected relative error.
        spread_steps: values of that unit; the first that is not below twice the forecast's error (jumps included) is
            taken, the last at most; `first_step` before the second record.
        first_step: see `spread_steps`.
        micro_batches: micro-batches of the last record among the scenarios, at most.
        jump: a record is a jump when its forecast is this many times further off than usual,
        least_jump: and at least this far off (total variation).
        regime_records: records for which the regime before a jump stays among the scenarios.
    """

    window: int = 2
    decays: tuple[float, ...] = (0.0, 0.5, 0.9)
    error_decay: float = 0.8
    spreads: tuple[float, ...] = (1.0, 2.0, 4.0)
    spread_steps: tuple[float, ...] = (0.01, 0.02, 0.04, 0.06, 0.12, 0.25)
    first_step: float = 0.06
    micro_batches: int = 4
    jump: float = 3.0
    least_jump: float = 0.04
    regime_records: int = 8

    @classmethod
    def for_ranks(cls, num_ranks: int) -> HistoryOptions:
        """Fewer scenarios on many ranks, where each of them takes about a millisecond to judge."""
        return cls() if num_ranks <= 16 else cls(window=1, spreads=(1.0, 2.0), micro_batches=2)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Record:
    """One record of the window.

    Attributes:
        total_LE: its counts.
        micro_LME: those of the micro-batches that scenarios use.
    """

    total_LE: IntArray
    micro_LME: IntArray


class History:
    """Counts of the latest records of every layer of one group of ranks (or of all ranks).

    Args:
        num_layers: L.
        num_experts: E.
        options: how much is remembered.
    """

    def __init__(self, num_layers: int, num_experts: int, options: HistoryOptions | None = None) -> None:
        self.options = options or HistoryOptions()
        self.num_layers, self.num_experts = num_layers, num_experts
        self.num_records = 0
        self._window: deque[_Record] = deque(maxlen=self.options.window)
        self._average_DLE = np.zeros((len(self.options.decays), num_layers, num_experts))
        self._error_DL = np.zeros((len(self.options.decays), num_layers))
        self._surprise_L = np.zeros(num_layers)  # running error of the forecasts, jumps and all
        self._regime_LE = np.zeros((num_layers, num_experts))  # the forecast before the last jump
        self._jumped_at_L = np.full(num_layers, -1)  # number of the record that jumped

    def copy(self) -> History:
        """The same history, which `update` of this one does not change, nor the other way round."""
        copied = copy.copy(self)  # `update` replaces arrays and never writes into them
        copied._window = self._window.copy()
        return copied

    def update(self, counts_LME: IntArray) -> FloatArray:
        """Add one record, micro-batches apart (M may be 1); returns the forecast's error per layer."""
        if counts_LME.ndim != 3 or counts_LME.shape[::2] != (self.num_layers, self.num_experts):
            want = f"[{self.num_layers}, micro-batches, {self.num_experts}]"
            raise PlanError(f"a record has shape {counts_LME.shape}: must be {want}")
        # Step 1: compare the record with its forecast, and restart the averages of layers whose load has jumped.
        share_LE = _shares(counts_LME.sum(axis=1).astype(np.float64))
        error_L = _distance(self.forecast_LE(), share_LE) if self.num_records else np.full(self.num_layers, np.nan)
        jumped_L = self._jumped(error_L)
        self._remember_regime(jumped_L, share_LE)
        # Step 2: update the running error of each average.
        decay_D = np.array(self.options.decays)
        if self.num_records:
            keep = self.options.error_decay if self.num_records > 1 else 0.0
            fresh_DL = keep * self._error_DL + (1 - keep) * _distance(self._average_DLE, share_LE)
            # A jump says nothing about which average forecasts best, but much about how robust a plan should be.
            self._error_DL = np.where(jumped_L, self._error_DL, fresh_DL)
            self._surprise_L = keep * self._surprise_L + (1 - keep) * error_L
        # Step 3: update the averages and the window.
        keep_D11 = (decay_D if self.num_records else np.zeros_like(decay_D))[:, None, None]
        self._average_DLE = keep_D11 * self._average_DLE + (1 - keep_D11) * share_LE
        chosen_M = _evenly(np.arange(counts_LME.shape[1]), self.options.micro_batches)
        self._window.append(_Record(total_LE=counts_LME.sum(axis=1), micro_LME=counts_LME[:, chosen_M]))
        self.num_records += 1
        return error_L

    def _jumped(self, error_L: FloatArray) -> BoolArray:
        """Layers in which this record begins another regime; never twice in a row, so that a load that always jumps
        counts as hard to forecast instead."""
        if self.num_records < _FIRST_JUMP:
            return np.zeros(self.num_layers, dtype=np.bool_)
        limit_L = np.maximum(self.options.jump * self.forecast_error_L, self.options.least_jump)
        return np.asarray((error_L > limit_L) & (self._jumped_at_L < self.num_records - 1))

    def _remember_regime(self, jumped_L: BoolArray, share_LE: FloatArray) -> None:
        """Keep the forecast from before a jump and restart the averages: from the regime before, if it is back."""
        if not jumped_L.any():
            return
        before_LE, forecast_LE = self._regime_LE.copy(), self.forecast_LE()
        is_same_L = _distance(before_LE, share_LE) < _SAME_REGIME * _distance(forecast_LE, share_LE)
        back_L = self._regime_known_L & is_same_L
        start_LE = np.where(back_L[:, None], before_LE, share_LE)
        self._average_DLE = np.where(jumped_L[:, None], start_LE, self._average_DLE)
        self._regime_LE = np.where(jumped_L[:, None], forecast_LE, before_LE)
        self._jumped_at_L = np.where(jumped_L, self.num_records, self._jumped_at_L)

    @property
    def _regime_known_L(self) -> BoolArray:
        """Layers with a jump that is not too long ago."""
        return np.asarray(self._jumped_at_L >= max(self.num_records - self.options.regime_records, 0))

    def state(self) -> dict[str, NDArray[Any]]:
        """All that the next forecasts and scenarios depend on, as arrays whose first axis is the layer."""
        state: dict[str, NDArray[Any]] = {
            "average_LDE": self._average_DLE.swapaxes(0, 1),
            "error_LD": self._error_DL.T,
            "surprise_L": self._surprise_L,
            "regime_LE": self._regime_LE,
            "jumped_at_L": self._jumped_at_L,
            "num_records_L": np.full(self.num_layers, self.num_records),
        }
        for age, record in enumerate(reversed(self._window)):
            state[f"total_{age}_LE"], state[f"micro_{age}_LME"] = record.total_LE, record.micro_LME
        return state

    def restore(self, state: Mapping[str, NDArray[Any]]) -> None:
        """Continue from what `state` gave, for the same layers and options.

        Raises:
            PlanError: it is of another shape.
        """
        # Step 1: what is there has the shape that this history's would have.
        num_records = int(state["num_records_L"][0]) if state.get("num_records_L", np.zeros(0)).size else 0
        ages = range(min(num_records, self.options.window))
        layers_experts = (self.num_layers, self.num_experts)
        shapes = {name: array.shape for name, array in History(*layers_experts, self.options).state().items()}
        shapes |= {f"total_{age}_LE": layers_experts for age in ages}
        for name, shape in shapes.items():
            if name not in state or state[name].shape != shape:
                found = state[name].shape if name in state else "missing"
                raise PlanError(f"{name} of the saved history is {found}: must be {shape}")
        micro = [state.get(f"micro_{age}_LME", np.zeros(0)) for age in ages]
        if any(one.ndim != 3 or one.shape[::2] != layers_experts for one in micro):
            raise PlanError(f"the micro-batches of the saved history have shapes {[one.shape for one in micro]}")
        # Step 2: adopt it, in the order in memory that it had, since the order of sums follows that.
        self._average_DLE = np.ascontiguousarray(state["average_LDE"].swapaxes(0, 1), np.float64)
        self._error_DL = np.ascontiguousarray(state["error_LD"].T, np.float64)
        self._surprise_L = state["surprise_L"].astype(np.float64)
        self._regime_LE = state["regime_LE"].astype(np.float64)
        self._jumped_at_L = state["jumped_at_L"].astype(np.int64)
        self._window.clear()
        for age in reversed(ages):
            total_LE = state[f"total_{age}_LE"].astype(np.int64)
            self._window.append(_Record(total_LE=total_LE, micro_LME=micro[age].astype(np.int64)))
        self.num_records = num_records

    def last_micro_batches_ME(self, layer: int) -> IntArray:
        """Counts of the last record's micro-batches, of as many as are kept."""
        return np.asarray(self._window[-1].micro_LME[layer])

    def forecast_LE(self) -> FloatArray:
        """Expected share of the tokens for each expert; even shares before the first record."""
        if not self.num_records:
            return np.full((self.num_layers, self.num_experts), 1.0 / self.num_experts)
        best_L = np.argmin(self._error_DL, axis=0)
        return np.asarray(self._average_DLE[best_L, np.arange(self.num_layers)])

    @property
    def forecast_error_L(self) -> FloatArray:
        """Running error of the forecast in use, total variation, per layer; jumps left out."""
        return np.asarray(self._error_DL.min(axis=0))

    def scenarios_KE(self, layer: int) -> FloatArray:
        """Loads to plan for, in shares: the forecast first, then recent records, perturbed forecasts last."""
        forecast_E = self.forecast_LE()[layer]
        rows = [forecast_E[None]]
        for age, record in enumerate(reversed(self._window)):
            counts_NE = record.micro_LME[layer] if age == 0 else record.total_LE[layer][None]
            rows.append(_shares(counts_NE.astype(np.float64)))
        if self._regime_known_L[layer]:
            rows.append(self._regime_LE[layer][None])
        spread = self._expected_spread(layer)
        spreads = tuple(spread * times for times in self.options.spreads)
        rows.append(forecast_E * perturbations(spreads, self.num_experts))
        return _shares(np.concatenate(rows))

    def _expected_spread(self, layer: int) -> float:
        """Relative error to expect of an expert's load: a step of `spread_steps`, so that it does not change all the
        time."""
        steps = self.options.spread_steps
        if self.num_records < 2:
            return self.options.first_step
        twice = 2.0 * float(self._surprise_L[layer])
        return next((step for step in steps if step >= twice), steps[-1])


def perturbations(spreads: tuple[float, ...], num_experts: int) -> FloatArray:
    """Fixed factors around 1 with the given standard deviations, one row each."""
    uniform = _uniform(len(spreads), num_experts)
    return np.asarray(np.maximum(1 + np.array(spreads)[:, None] * np.sqrt(3.0) * (2 * uniform - 1), 0.0))


@functools.lru_cache(maxsize=16)
def _uniform(rows: int, num_experts: int) -> FloatArray:
    return np.asarray(np.random.default_rng(_SEED).random((rows, num_experts)))


def _shares(load_NE: FloatArray) -> FloatArray:
    """Each row divided by its sum; even shares for a row without tokens."""
    total_N1 = load_NE.sum(axis=-1, keepdims=True)
    return np.where(total_N1 > 0, load_NE / np.maximum(total_N1, 1e-300), 1.0 / load_NE.shape[-1])


def _distance(share_NE: FloatArray, other_NE: FloatArray) -> FloatArray:
    return np.asarray(0.5 * np.abs(share_NE - other_NE).sum(axis=-1))


def _evenly(rows: IntArray, most: int) -> IntArray:
    """Up to `most` of the rows, evenly spaced."""
    if len(rows) <= most:
        return rows
    return rows[np.linspace(0, len(rows) - 1, most).astype(np.int64)]
