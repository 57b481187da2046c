"""A run's own cost model: a few constants by least squares from the times and the counts of its own iterations.

The times are those of parts of a step, each measured by itself on each rank (`adapter.records.account`), so every
constant is fitted to the one part that it explains, and none has to make up for another:

    experts  = token_s x tokens + group_s x groups       groups: experts of a rank that have tokens, by call
    dispatch = call_s x calls + port_token_s x tokens over the rank's busier direction of its port
    replicas = replica_s x replicas that computed tokens

Planning and migration stay as they were measured. The rest of a step is the same work in every iteration: its mean by
pipeline stage. What the constants leave unexplained is kept as residuals, iteration by iteration: error bars for who
predicts with them.

The alternative, one regression of the whole step on all counts, gives collinear counts any value: tokens of a rank, the
tokens over its port and its active experts rise and fall together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Literal

import numpy as np

from megatron_smartmoe.errors import PlanError
from megatron_smartmoe.spec.arrays import FloatArray, IntArray

WARM_UP = 5  # iterations of a run that are not representative: first allocations, caches, connections


class Part(IntEnum):
    """Parts of a step, in the order of a record's columns; they add up to the step.

    Attributes:
        OUTSIDE: everything but the MoE layers: attention, norms, loss, optimizer, data.
        DISPATCH: router, permutations, all-to-alls, shared experts.
        EXPERTS: the experts' GEMMs and activations.
        REPLICAS: weights of replicas on their way out, and their gradients on their way back.
        PLANNING: homes and replicas.
        MIGRATION: experts on their way to new homes.
    """

    OUTSIDE = 0
    DISPATCH = 1
    EXPERTS = 2
    REPLICAS = 3
    PLANNING = 4
    MIGRATION = 5


class Count(IntEnum):
    """Counts of a rank in one iteration, in the order of a record's columns; sums over its layers and micro-batches.

    Attributes:
        TOKENS: rows that its experts computed.
        GROUPS: experts and replicas with rows.
        CALLS: calls of the experts: one for each layer, micro-batch and chunk.
        PORT_TOKENS: rows that it sent to other ranks or received from them, the greater of the two; the mean of a
            layer's exchanges, where they differ.
        REPLICAS: replicas with rows.
        BUSIEST_TOKENS: rows of the busiest rank of its expert-parallel group, layer by layer.
        BUSIEST_GROUPS: groups of that rank.
        BUSIEST_PORT_TOKENS: rows over the busiest port of the group, layer by layer.
    """

    TOKENS = 0
    GROUPS = 1
    CALLS = 2
    PORT_TOKENS = 3
    REPLICAS = 4
    BUSIEST_TOKENS = 5
    BUSIEST_GROUPS = 6
    BUSIEST_PORT_TOKENS = 7


Basis = Literal["cpu", "gpu"]


@dataclass(frozen=True, kw_only=True, eq=False)
class StepRecord:
    """Times and counts of a run's steps.

    Attributes:
        basis: `cpu`: CPU seconds of each rank's thread, which waits in none of them. `gpu`: seconds of the device's
            stream, in which ranks wait for each other.
        iteration_N: the last iteration of each row.
        iterations_N: iterations that a row is the mean of.
        seconds_NRP: of each part, by rank.
        counts_NRC: counts, by rank.
        stage_R: pipeline stage of each rank.
        micro_batches: of an iteration.
        virtual: model chunks of a stage.
    """

    basis: Basis
    iteration_N: IntArray
    iterations_N: IntArray
    seconds_NRP: FloatArray
    counts_NRC: FloatArray
    stage_R: IntArray
    micro_batches: int = 1
    virtual: int = 1

    @property
    def step_NR(self) -> FloatArray:
        """Seconds of each step, by rank."""
        return self.seconds_NRP.sum(axis=2)

    def mean(self, values_N: FloatArray) -> FloatArray:
        """Mean over the iterations."""
        return np.asarray(np.average(values_N, axis=0, weights=self.iterations_N))

    def without_warm_up(self) -> StepRecord:
        """The record without the first iterations, where it has more than twice as many."""
        done = int(self.iteration_N[0]) - int(self.iterations_N[0])  # iterations before the record
        kept_N = np.nonzero(self.iteration_N - self.iterations_N - done >= WARM_UP)[0]
        if len(kept_N) <= WARM_UP:
            return self
        return replace(
            self,
            iteration_N=self.iteration_N[kept_N],
            iterations_N=self.iterations_N[kept_N],
            seconds_NRP=self.seconds_NRP[kept_N],
            counts_NRC=self.counts_NRC[kept_N],
        )


@dataclass(frozen=True, kw_only=True)
class FittedStep:
    """What a run's counts cost on its machine, forward and backward; see the module.

    Attributes:
        token_s: per row of the experts.
        group_s: per expert with rows.
        call_s: per call of the experts, for router, permutation and exchange.
        port_token_s: per row over a rank's port, all-to-alls and sorting together.
        replica_s: per replica with rows: weights out, gradients back, as far as they are exposed.
        planning_s: of an iteration, the busiest rank.
        migration_s: of an iteration, mean over the run.
        outside_s: of a step outside its MoE layers, by pipeline stage.
        residuals: measured over predicted time of the step, less 1, of each iteration, the busiest rank of each.
    """

    token_s: float
    group_s: float
    call_s: float
    port_token_s: float
    replica_s: float
    planning_s: float
    migration_s: float
    outside_s: tuple[float, ...]
    residuals: tuple[float, ...]

    @property
    def spread(self) -> float:
        """Standard deviation of the residuals."""
        return float(np.std(self.residuals))


def fit_step(record: StepRecord, also: Sequence[tuple[StepRecord, float]] = ()) -> FittedStep:
    """Fit the constants to a run.

    Args:
        record: of the run, warm-up left out.
        also: further runs of the same model that the constants of experts and dispatch have to explain, each with the
            factor between its machine's speed and the run's. Residuals are those of the run alone.

    Raises:
        PlanError: the record has no rows.
    """
    if not len(record.iteration_N):
        raise PlanError("the account has no iterations: constants are fitted from at least one")
    # Step 1: constants of the experts and of the dispatch, from all ranks and iterations.
    seconds_NP = np.concatenate([_flat(one.seconds_NRP) * speed for one, speed in ((record, 1.0), *also)])
    counts_NC = np.concatenate([_flat(one.counts_NRC) for one, _ in ((record, 1.0), *also)])
    token_s, group_s = _non_negative(counts_NC[:, [Count.TOKENS, Count.GROUPS]], seconds_NP[:, Part.EXPERTS])
    call_s, port_s = _non_negative(counts_NC[:, [Count.CALLS, Count.PORT_TOKENS]], seconds_NP[:, Part.DISPATCH])
    # Step 2: what is taken as it was measured.
    replicas = record.counts_NRC[:, :, Count.REPLICAS].sum()
    replica_s = float(record.seconds_NRP[:, :, Part.REPLICAS].sum() / replicas) if replicas else 0.0
    planning_s = record.mean(record.seconds_NRP[:, :, Part.PLANNING].max(axis=1))
    migration_s = record.mean(record.seconds_NRP[:, :, Part.MIGRATION].max(axis=1))
    outside_R = record.mean(record.seconds_NRP[:, :, Part.OUTSIDE])
    outside_S = [float(outside_R[record.stage_R == stage].mean()) for stage in range(int(record.stage_R.max()) + 1)]
    # Step 3: residuals of the busiest rank.
    modelled_NR = (
        token_s * record.counts_NRC[:, :, Count.TOKENS]
        + group_s * record.counts_NRC[:, :, Count.GROUPS]
        + call_s * record.counts_NRC[:, :, Count.CALLS]
        + port_s * record.counts_NRC[:, :, Count.PORT_TOKENS]
        + np.array(outside_S)[record.stage_R]
        + record.seconds_NRP[:, :, [Part.REPLICAS, Part.PLANNING, Part.MIGRATION]].sum(axis=2)
    )
    residuals_N = record.step_NR.max(axis=1) / modelled_NR.max(axis=1) - 1
    return FittedStep(
        token_s=token_s,
        group_s=group_s,
        call_s=call_s,
        port_token_s=port_s,
        replica_s=replica_s,
        planning_s=float(planning_s),
        migration_s=float(migration_s),
        outside_s=tuple(outside_S),
        residuals=tuple(residuals_N.tolist()),
    )


def _flat(values_NRX: FloatArray) -> FloatArray:
    return values_NRX.reshape(-1, values_NRX.shape[2])


def _non_negative(columns_NC: FloatArray, values_N: FloatArray) -> tuple[float, float]:
    """Least squares with two constants that are not negative; equal shares where the columns tell them not apart."""
    scale_C = np.maximum(columns_NC.mean(axis=0), 1e-30)
    found_C = np.linalg.lstsq(columns_NC / scale_C, values_N)[0]
    if (found_C < 0).any():
        at = int(np.argmax(found_C))
        column_N = columns_NC[:, at] / scale_C[at]
        found_C = np.zeros(2)
        found_C[at] = max(0.0, float(column_N @ values_N) / max(float(column_N @ column_N), 1e-30))
    first, second = (found_C / scale_C).tolist()
    return first, second
