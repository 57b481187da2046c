"""Fit the constants of a MoE layer to measured times, starting from what datasheets say.

Method. The layer's time is linear in its constants, so this is one non-negative least-squares problem (Lawson and
Hanson 1974), its rows scaled to relative errors. Each constant has one row more that pulls it to its prior, as strong
as the prior is certain (ridge regression towards the prior; the mean of a Gaussian posterior, kept non-negative). Where
measurements distinguish two constants they win, a few hundred rows against one; where they cannot (tokens sent and a
fixed cost at a single micro-batch size, links between nodes in runs on one node) the prior decides, and the model still
says something sensible about other micro-batch sizes and node counts.

GPUs that share their node's network card reach it through the port that they use inside the node, so what a token costs
that port is one and the same: the constant of traffic between nodes is pulled towards the fitted one inside the node,
not towards its own prior. Runs on one node thereby give half of what two nodes cost.

The alternative, plain least squares, gives a collinear column any value: it fits one setting to the same residual and
is off by half on the next. Which rank is the busiest depends on the constants, hence the few rounds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
from scipy.optimize import nnls

from megatron_smartmoe.cost.compute import busiest_rank
from megatron_smartmoe.cost.moe_layer import LayerConstants, LayerCounts, LayerFlow, layer_time
from megatron_smartmoe.errors import PlanError
from megatron_smartmoe.spec.arrays import FloatArray

NOISE = 0.03  # relative standard deviation of one measured layer time: an estimate
ROUNDS = 4  # of "find the busiest rank, fit"; the choice of rank settles in two or three


def spread_of(prior: LayerConstants) -> LayerConstants:
    """Standard deviation of each constant around its prior.

    Launch counts are estimates within a factor of two, as are links; what a token and an active expert cost outside
    the GEMMs is known to an order of magnitude. With a shared network card the spread of `inter_gpu_token_s` is that of
    its distance from `intra_token_s`; the card may be less than full duplex.
    """
    port_s = prior.intra_token_s if _shares_card(prior) else prior.inter_gpu_token_s
    return LayerConstants(
        fixed_s=0.5 * prior.fixed_s,
        source_token_s=10.0 * prior.source_token_s,
        token_s=prior.token_s,
        expert_s=10.0 * prior.expert_s,
        intra_token_s=0.5 * prior.intra_token_s,
        inter_gpu_token_s=0.5 * port_s,
        inter_node_token_s=0.5 * prior.inter_node_token_s,
        inter_node_reverse_token_s=0.5 * prior.inter_node_token_s,
        intra_replica_s=0.5 * prior.intra_replica_s,
        inter_replica_s=0.5 * prior.inter_replica_s,
    )


def _shares_card(prior: LayerConstants) -> bool:
    return prior.inter_node_token_s > 0


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One layer, forward and backward, as it was routed and how long it took."""

    flow: LayerFlow
    time_s: float


@dataclass(frozen=True, kw_only=True)
class Residuals:
    """How far predictions are from measurements.

    Attributes:
        mape: mean absolute error, relative to the measured time (0.05 is 5%).
        r2: share of the measured times' variance that the model explains.
        bias: mean signed relative error.
        worst: largest absolute relative error.
        rows: measurements compared.
    """

    mape: float
    r2: float
    bias: float
    worst: float
    rows: int


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Fitted constants and the residuals on the rows that they were fitted to."""

    constants: LayerConstants
    residuals: Residuals


def calibrate(
    measurements: Sequence[Measurement], prior: LayerConstants, spread: LayerConstants | None = None
) -> Calibration:
    """Fit all constants at once.

    Args:
        measurements: layers of any settings; more settings distinguish more constants.
        prior: constants of the datasheets (`moe_layer.constants_of`).
        spread: each constant's standard deviation around its prior; None takes `spread_of(prior)`. A constant with
            spread zero keeps its prior.

    Raises:
        PlanError: no measurement, or a time that is not positive.
    """
    # Step 1: check the measurements.
    time_s = np.array([m.time_s for m in measurements])
    if len(time_s) == 0:
        raise PlanError("calibration needs at least one measured layer time, got none")
    if (time_s <= 0).any():
        row = int(np.argmax(time_s <= 0))
        raise PlanError(f"measured time[{row}] = {time_s[row]}: must be positive")
    # Step 2: fit, find the busiest ranks with the fitted constants, fit again.
    names = [field.name for field in fields(LayerConstants) if field.name != "levels"]  # of machines without levels
    given = (prior, spread or spread_of(prior))
    prior_C, spread_C = (np.array([getattr(constants, name) for name in names]) for constants in given)
    constants = prior
    port = (names.index("inter_gpu_token_s"), names.index("intra_token_s")) if _shares_card(prior) else None
    for _ in range(ROUNDS):
        counts_NC = np.array([_counts(m.flow, constants.half_rate_tokens) for m in measurements])
        fitted_C = _posterior(counts_NC, time_s, prior_C, spread_C, port)
        constants = LayerConstants(**dict(zip(names, fitted_C.tolist(), strict=True)))
    return Calibration(constants=constants, residuals=residuals(measurements, constants))


def residuals(measurements: Sequence[Measurement], constants: LayerConstants) -> Residuals:
    """Compare the model with measurements that it may or may not have been fitted to."""
    time_s = np.array([m.time_s for m in measurements])
    predicted_s = np.array([layer_time(m.flow, constants).total_s for m in measurements])
    relative = predicted_s / time_s - 1
    variance = float(((time_s - time_s.mean()) ** 2).sum())
    return Residuals(
        mape=float(np.abs(relative).mean()),
        r2=1 - float(((predicted_s - time_s) ** 2).sum()) / variance if variance > 0 else 0.0,
        bias=float(relative.mean()),
        worst=float(np.abs(relative).max()),
        rows=len(time_s),
    )


def _counts(flow: LayerFlow, half_rate_tokens: float) -> tuple[float, ...]:
    """What each constant is multiplied with, in the order of LayerConstants' fields."""
    counts = LayerCounts.of(flow)
    busy = busiest_rank(counts.tokens_R, counts.active_R, half_rate_tokens)
    tokens, replicas = counts.tokens, counts.returned
    return (
        1.0,
        counts.source_tokens,
        busy.tokens,
        busy.active_experts,
        tokens.intra,
        tokens.inter_gpu,
        tokens.inter_node,
        tokens.inter_node_reverse,
        replicas.intra,
        replicas.inter_gpu,
    )


def _posterior(
    counts_NC: FloatArray,
    time_N: FloatArray,
    prior_C: FloatArray,
    spread_C: FloatArray,
    follows: tuple[int, int] | None,
) -> FloatArray:
    """Non-negative constants that balance relative errors against distance from the prior.

    Args:
        counts_NC: what each constant is multiplied with.
        time_N: measured times.
        prior_C: constants to be pulled to.
        spread_C: how strongly; zero keeps the prior.
        follows: (constant, another): the first is pulled to where its prior lies from the second's, wherever that is.
    """
    # Step 1: take the constants that keep their prior out of the problem.
    free_C = spread_C > 0
    scale_C = spread_C[free_C]
    remaining_N = time_N - counts_NC[:, ~free_C] @ prior_C[~free_C]
    # Step 2: a row per measurement, in units of its noise, and a row per constant that pulls it to its prior.
    rows = counts_NC[:, free_C] * scale_C / (NOISE * time_N)[:, None]
    target = remaining_N / (NOISE * time_N)
    pull, pulled_to = np.eye(int(free_C.sum())), prior_C[free_C] / scale_C
    if follows is not None and free_C[list(follows)].all():
        place_C = np.cumsum(free_C) - 1
        one, other = (int(place_C[constant]) for constant in follows)
        pull[one, other] = -scale_C[other] / scale_C[one]
        pulled_to[one] = (prior_C[follows[0]] - prior_C[follows[1]]) / scale_C[one]
    # Step 3: solve, and scale back.
    solution, _ = nnls(np.vstack([rows, pull]), np.concatenate([target, pulled_to]))
    fitted_C = prior_C.copy()
    fitted_C[free_C] = solution * scale_C
    return fitted_C
