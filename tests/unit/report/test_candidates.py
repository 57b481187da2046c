"""What a decision chose between, as people read it."""

from __future__ import annotations

from typing import Any

from megatron_smartmoe.report.candidates import candidate_lines, prices, runner_up

MOVE = {"name": "move 2 experts of layer 3", "chosen": True, "layer": 2, "gain_s": 61e-6, "cost_s": 867e-6}
PARTS = {"compute_s": 50e-6, "traffic_s": 15e-6, "replicas_s": -4e-6}
OTHER = {"name": "move 4 experts of layer 4", "chosen": False, "layer": 3, "gain_s": 20e-6, "cost_s": 500e-6}
HOMES: dict[str, Any] = {
    "kind": "homes",
    "candidates": [MOVE | PARTS, OTHER],
    "horizon_iterations": 500,
    "margin": 2.0,
}
REPLICAS: dict[str, Any] = {
    "kind": "replicas",
    "price_tokens": 100.0,
    "candidates": [
        {"name": "layer 1: replicas as planned", "chosen": True, "layer": 0, "busiest_tokens": 1000.0, "transfers": 1},
        {"name": "layer 1: no replicas", "chosen": False, "layer": 0, "busiest_tokens": 1300.0, "transfers": 0},
    ],
}


def test_candidates_have_their_prices_beside_them() -> None:
    first, second, nothing = candidate_lines(HOMES)
    assert first == (
        "> move 2 experts of layer 3  saves +0.061 ms per iteration (computation +0.050, sending tokens +0.015, "
        "replicas -0.004), costs 0.867 ms once"
    )
    assert second == "  move 4 experts of layer 4  saves +0.020 ms per iteration, costs 0.500 ms once"
    assert nothing == "  change nothing             saves nothing, costs nothing"
    assert len(candidate_lines(HOMES, layer=3)) == 2
    assert prices(HOMES) == "a gain counts over 500 iterations, and must be more than 2 times the cost"


def test_tokens_are_compared_with_their_transfers() -> None:
    planned, none = candidate_lines(REPLICAS)
    assert planned == (
        "> layer 1: replicas as planned  busiest rank 1,000 tokens an iteration, 1 replica transfer in a row, worth "
        "1,100 tokens with the transfers"
    )
    assert (
        none == "  layer 1: no replicas          busiest rank 1,300 tokens an iteration, 0 replica transfers in a row"
    )
    assert runner_up(REPLICAS) == "layer 1: no replicas, 200 tokens worse"
    assert prices(REPLICAS) == "a replica transfer takes as long as 100 tokens of the busiest rank"


def test_transfers_that_are_priced_together() -> None:
    first, second = REPLICAS["candidates"]
    together = REPLICAS | {"candidates": [first | {"transfers": 3, "transfer_tokens": 250.0}, second]}
    assert candidate_lines(together)[0].endswith("3 replica transfers in a row, worth 1,250 tokens with the transfers")
    assert runner_up(together) == "layer 1: no replicas, 50 tokens worse"


def test_replicas_that_are_suspended_in_spite_of_the_forecast() -> None:
    first, second = REPLICAS["candidates"]
    suspended = REPLICAS | {"candidates": [first | {"chosen": False}, second | {"chosen": True}]}
    assert runner_up(suspended) == f"{first['name']}, 200 tokens better if the forecast is right"


def test_the_runner_up_is_the_best_that_was_not_proposed() -> None:
    # 61 us - 2 x 867 us / 500 = 57.5 us an iteration against 20 us - 2 us
    assert runner_up(HOMES) == "move 4 experts of layer 4, 0.040 ms per iteration worse"
    assert runner_up(HOMES | {"candidates": [MOVE]}) == "change nothing"
    assert runner_up({"kind": "pool", "candidates": []}) == ""


def test_a_run_of_before_says_so() -> None:
    assert candidate_lines({"kind": "homes"}) == ["not recorded: the run is of an earlier version"]
    assert candidate_lines({"kind": "pool"}) == []
    assert prices({"kind": "homes"}) == ""


def test_transfers_that_cost_nothing_say_why() -> None:
    text = "replica transfers count as nothing: computation hides them, or --smartmoe-replicas-margin is 0"
    assert prices(REPLICAS | {"price_tokens": 0.0}) == text
