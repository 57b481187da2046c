"""The fit finds constants that were put in, keeps priors where nothing was measured, and predicts other settings."""

from dataclasses import asdict, replace

import numpy as np
import pytest

from megatron_smartmoe.cost.moe_layer import LayerConstants, layer_time
from megatron_smartmoe.errors import PlanError
from scripts.validation.layer_fit import Measurement, calibrate, residuals, spread_of
from tests.unit.cost.cases import contiguous_flow

PRIOR = LayerConstants(
    fixed_s=2e-3,
    source_token_s=1e-7,
    token_s=4e-7,
    expert_s=1e-4,
    intra_token_s=4e-7,
    inter_node_token_s=1e-6,
    intra_replica_s=1e-3,
    inter_replica_s=2e-3,
)
TRUTH = replace(
    PRIOR, fixed_s=3e-3, source_token_s=5e-7, token_s=5e-7, expert_s=3e-4, intra_token_s=2e-7, inter_node_token_s=6e-7
)


def measured(
    rng: np.random.Generator, *, num_ranks: int, num_nodes: int, tokens: int, rows: int = 40, noise: float = 0.0
) -> list[Measurement]:
    """Layers of random skew, timed by the truth."""
    found = []
    for _ in range(rows):
        popularity = rng.lognormal(0, rng.uniform(0.2, 2.0), 2 * num_ranks) * (rng.random(2 * num_ranks) < 0.8) + 1e-9
        flow = contiguous_flow(rng.multinomial(tokens, popularity / popularity.sum(), size=num_ranks), num_nodes)
        time_s = layer_time(flow, TRUTH).total_s * (1 + noise * rng.standard_normal())
        found.append(Measurement(flow=flow, time_s=time_s))
    return found


def test_it_finds_the_constants_of_several_settings() -> None:
    rng = np.random.default_rng(0)
    settings: list[dict[str, int]] = [
        {"num_ranks": 4, "num_nodes": 1, "tokens": 4096},
        {"num_ranks": 4, "num_nodes": 1, "tokens": 16384},
        {"num_ranks": 8, "num_nodes": 2, "tokens": 8192},
    ]
    rows = [row for setting in settings for row in measured(rng, **setting)]
    fit = calibrate(rows, PRIOR)
    assert fit.residuals.rows == 120
    assert fit.residuals.mape < 0.005
    assert fit.residuals.r2 > 0.999
    # A token that is computed on the busiest rank mostly came over its port: the two constants show as their sum.
    found, truth = fit.constants, TRUTH
    assert found.token_s + found.intra_token_s == pytest.approx(truth.token_s + truth.intra_token_s, rel=0.2)
    for name in ("expert_s", "inter_node_token_s", "source_token_s"):
        assert getattr(found, name) == pytest.approx(getattr(truth, name), rel=0.25), name


def test_it_predicts_a_batch_and_a_node_count_that_it_was_not_fitted_to() -> None:
    rng = np.random.default_rng(1)
    rows = measured(rng, num_ranks=4, num_nodes=1, tokens=8192, noise=0.01)
    rows += measured(rng, num_ranks=8, num_nodes=2, tokens=4096, rows=10, noise=0.01)
    fit = calibrate(rows, PRIOR)
    assert residuals(measured(rng, num_ranks=4, num_nodes=1, tokens=16384), fit.constants).mape < 0.05
    assert residuals(measured(rng, num_ranks=8, num_nodes=2, tokens=8192), fit.constants).mape < 0.05


def test_what_was_not_measured_keeps_its_prior() -> None:
    rows = measured(np.random.default_rng(2), num_ranks=4, num_nodes=1, tokens=8192)
    constants = calibrate(rows, PRIOR).constants
    assert constants.inter_node_token_s == pytest.approx(PRIOR.inter_node_token_s)
    assert constants.intra_replica_s == pytest.approx(PRIOR.intra_replica_s)
    pinned = calibrate(rows, PRIOR, replace(spread_of(PRIOR), token_s=0.0)).constants
    assert pinned.token_s == PRIOR.token_s


def test_a_shared_cards_port_follows_what_was_measured_inside_the_node() -> None:
    prior = replace(PRIOR, inter_gpu_token_s=PRIOR.intra_token_s)
    constants = calibrate(measured(np.random.default_rng(2), num_ranks=4, num_nodes=1, tokens=8192), prior).constants
    assert constants.inter_gpu_token_s == pytest.approx(constants.intra_token_s)
    assert constants.intra_token_s != pytest.approx(prior.intra_token_s, rel=0.01)
    own_card = replace(prior, inter_node_token_s=0.0)
    constants = calibrate(measured(np.random.default_rng(2), num_ranks=4, num_nodes=1, tokens=8192), own_card).constants
    assert constants.inter_gpu_token_s == pytest.approx(own_card.inter_gpu_token_s)


def test_constants_are_never_negative() -> None:
    # Times that fall with the load: plain least squares would want a negative constant per token.
    flows = [contiguous_flow([[n, 0], [0, 10]]) for n in (10, 1000, 4000)]
    rows = [Measurement(flow=flow, time_s=time_s) for flow, time_s in zip(flows, (3.0, 2.0, 1.0), strict=True)]
    fitted = asdict(calibrate(rows, PRIOR).constants)
    assert not fitted.pop("levels")
    assert min(fitted.values()) >= 0


def test_residuals_by_hand() -> None:
    # The truth takes 10% more and 10% less than "measured": mape 10%, bias 0.
    flow = contiguous_flow([[100, 0], [0, 10]])
    time_s = layer_time(flow, TRUTH).total_s
    rows = [Measurement(flow=flow, time_s=time_s / 1.1), Measurement(flow=flow, time_s=time_s / 0.9)]
    found = residuals(rows, TRUTH)
    assert (found.mape, found.bias, found.worst, found.rows) == (
        pytest.approx(0.1),
        pytest.approx(0.0),
        pytest.approx(0.1),
        2,
    )


def test_nothing_to_fit() -> None:
    with pytest.raises(PlanError, match="at least one measured layer time"):
        calibrate([], PRIOR)
    with pytest.raises(PlanError, match=r"measured time\[0\] = 0.0: must be positive"):
        calibrate([Measurement(flow=contiguous_flow([[1, 1], [1, 1]]), time_s=0.0)], PRIOR)
