"""What a second of each term of the cost model is worth in a run: factors fitted to its measured steps.

Method. The cost model predicts a step as a sum of terms. A run multiplies each group of terms with a factor of its own;
the factors are the least-squares solution over the run's measurements, their rows scaled to relative errors. One run
holds most terms constant, so the data alone cannot tell them apart: every factor has a prior, the machine's overall
speed (known to a factor of two or so) times 1 with a stated spread (ridge regression towards the prior; the mean and
the covariance of a Gaussian posterior). What the run's iterations distinguish, the experts' tokens above all, is
decided by them; what they do not keeps its prior and its uncertainty, which every prediction from it then has, too.
Measurements far off, a step in which the machine did something else, weigh less (Huber 1964).

The alternative, plain least squares, gives terms that vary alike any factor, also negative ones: the same fit to the
run, and nonsense for any other setting.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from megatron_smartmoe.spec.arrays import FloatArray

SPEED_SPREAD = 2.0  # of the machine's speed, relative: a cluster file of another machine may be used
FIRST_NOISE = 0.05  # relative standard deviation of a measurement, before the first round
LEAST_NOISE = 0.002
HUBER = 1.5  # standard deviations from which on a measurement weighs less
ROUNDS = 12
MAD_TO_DEVIATION = 1.4826  # of a normal distribution


@dataclass(frozen=True, kw_only=True, eq=False)
class Fitted:
    """Factors, and how sure they are.

    Attributes:
        factors_G: of each group of terms, in seconds a predicted second.
        covariance_GG: of the factors.
        noise: standard deviation of what was fitted around the fit, relative to a step.
    """

    factors_G: FloatArray
    covariance_GG: FloatArray
    noise: float

    def seconds(self, terms_NG: FloatArray) -> FloatArray:
        """Predicted seconds, of any shape `[..., G]`."""
        return np.asarray(terms_NG @ self.factors_G)

    def judged_by(self, residuals: FloatArray) -> Fitted:
        """The same factors with the spread of whole steps as noise, by the median: outliers do not widen it."""
        return replace(self, noise=max(LEAST_NOISE, MAD_TO_DEVIATION * float(np.median(np.abs(residuals)))))

    def deviation_s(self, terms_G: FloatArray) -> float:
        """Standard deviation of a step: how far a measured one may be off, and how little the factors are known."""
        known = float(terms_G @ self.covariance_GG @ terms_G)
        return float(np.sqrt(known + (self.noise * float(self.seconds(terms_G))) ** 2))


def fit_factors(
    terms_NG: FloatArray, seconds_N: FloatArray, spread_G: FloatArray, step_N: FloatArray | None = None
) -> Fitted:
    """Fit the factors.

    Args:
        terms_NG: predicted seconds of each measurement by group of terms.
        seconds_N: measured seconds, of a step or of one part of it.
        spread_G: standard deviation of each group's factor around the machine's overall speed, relative to it.
        step_N: seconds of the step that a part belongs to, which its error is relative to; None for whole steps.
    """
    step_N = seconds_N if step_N is None else step_N
    # Step 1: the prior: the overall speed, and every group around it.
    speed = float(seconds_N.sum() / terms_NG.sum())
    prior_GG = speed**2 * (SPEED_SPREAD**2 + np.diag(spread_G**2))
    precision_GG = np.linalg.inv(prior_GG)
    rows_NG, measured_N = terms_NG / step_N[:, None], seconds_N / step_N
    noise, weight_N = FIRST_NOISE, np.ones(len(seconds_N))
    # Step 2: rounds of "fit, see how far off measurements are, weigh them".
    for _ in range(ROUNDS):
        factors_G, covariance_GG = _posterior(rows_NG, measured_N, weight_N / noise**2, speed, precision_GG)
        error_N = measured_N - rows_NG @ factors_G
        noise = max(LEAST_NOISE, MAD_TO_DEVIATION * float(np.median(np.abs(error_N))))
        weight_N = np.minimum(1.0, HUBER * noise / np.maximum(np.abs(error_N), 1e-12))
    return Fitted(factors_G=factors_G, covariance_GG=covariance_GG, noise=noise)


def _posterior(
    rows_NG: FloatArray, measured_N: FloatArray, weight_N: FloatArray, speed: float, precision_GG: FloatArray
) -> tuple[FloatArray, FloatArray]:
    """Mean and covariance of the factors; one that came out negative is held at zero and the others fitted again."""
    size = len(precision_GG)
    kept = np.ones(size, dtype=np.bool_)
    while True:
        weighted_NG = rows_NG[:, kept] * weight_N[:, None]
        inverse = weighted_NG.T @ rows_NG[:, kept] + precision_GG[np.ix_(kept, kept)]
        # a group that is held at zero stays as far from its prior as that is
        target = precision_GG[np.ix_(kept, np.ones(size, dtype=np.bool_))] @ np.full(size, speed)
        found = np.linalg.solve(inverse, weighted_NG.T @ measured_N + target)
        if (found >= 0).all():
            factors_G, covariance_GG = np.zeros(size), np.zeros((size, size))
            factors_G[kept] = found
            covariance_GG[np.ix_(kept, kept)] = np.linalg.inv(inverse)
            return factors_G, covariance_GG
        negative = np.flatnonzero(kept)[found < 0]
        kept[negative] = False


def busiest_s(predicted_NU: FloatArray, residuals_MU: FloatArray) -> float:
    """The median step: of each the largest of its units, each as far off as some measured step was.

    Ranks that are equally loaded are not equally fast, and the step is the slowest's: without the residuals a balanced
    step would be predicted too short. Every step is combined with every measured one; with other units than were
    measured, a unit takes the residuals of another.

    Args:
        predicted_NU: predicted seconds by step and unit.
        residuals_MU: measured over predicted, minus 1, by measurement and unit.
    """
    units = np.arange(predicted_NU.shape[1]) % residuals_MU.shape[1]
    factors_MU = 1.0 + residuals_MU[:, units]
    return float(np.median([(step_U * factors_MU).max(axis=1) for step_U in predicted_NU]))
