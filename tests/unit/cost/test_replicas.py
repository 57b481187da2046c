"""What replicas cost by their schedule: shares, what is hidden, and who sends."""

from dataclasses import replace

import numpy as np
import pytest

from megatron_smartmoe.cost.compute import ExpertShape
from megatron_smartmoe.cost.moe_layer import LayerConstants, LayerFlow, LayerTime, layer_time, transfer_price
from megatron_smartmoe.cost.replicas import ReplicaSchedule, schedule_of

# A home feeds two ranks: two transfers of 6 s leave its port, of each a third weights and the rest gradients.
FLOW = LayerFlow(
    load_ER=np.array([[10.0, 10.0, 10.0]]),
    traffic_RR=np.full((3, 3), 10.0),
    replicas_RR=np.array([[0.0, 1.0, 1.0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]]),
)
PRICES = LayerConstants(fixed_s=1.0, source_token_s=0.1, token_s=0.3, intra_replica_s=6.0)
BARE = ReplicaSchedule(weight_share=1 / 3)


def seconds(schedule: ReplicaSchedule, flow: LayerFlow = FLOW) -> LayerTime:
    return layer_time(flow, PRICES, replicas=schedule)


def test_nothing_is_hidden_without_a_schedule() -> None:
    assert (seconds(BARE).replicas_s, seconds(BARE).replicas_hidden_s) == (pytest.approx(12.0), 0.0)


def test_a_transfer_is_shared_by_the_micro_batches_that_it_serves() -> None:
    assert seconds(replace(BARE, micro_batches=4)).replicas_s == pytest.approx(3.0)


def test_weights_hide_behind_the_forward_pass() -> None:
    # The experts' forward pass takes a third of 0.3 x 10 s, the row moves and launches half of 0.1 x 30 + 1.
    forward = replace(BARE, fetch_hidden="forward", micro_batches=2)
    assert seconds(forward).replicas_hidden_s == pytest.approx(-(1.0 + 2.0) / 2)
    assert seconds(forward).total_s == pytest.approx(seconds(BARE).total_s - 12.0 + 6.0 - 1.5)


def test_no_more_is_hidden_than_there_is() -> None:
    cheap = replace(PRICES, intra_replica_s=0.3)
    found = layer_time(FLOW, cheap, replicas=replace(BARE, fetch_hidden="forward"))
    assert found.replicas_hidden_s == pytest.approx(-0.2)  # the weights; nothing hides the gradients


def test_exact_weights_hide_behind_the_first_permutation_and_the_home_rows() -> None:
    home_rows = replace(BARE, fetch_hidden="home_rows")
    assert seconds(home_rows).replicas_hidden_s == pytest.approx(-3.0 / 4)
    # a third of the arithmetic of 5 rows
    assert seconds(home_rows, replace(FLOW, early_tokens=5.0)).replicas_hidden_s == pytest.approx(-3.0 / 4 - 0.5)


def test_gradients_hide_behind_the_backward_pass() -> None:
    backward = replace(BARE, return_hidden="backward")
    assert seconds(backward).replicas_hidden_s == pytest.approx(-(2.0 + 2.0))


def test_replicas_from_history_are_paid_for_where_they_are_not_used() -> None:
    """Two transfers of 2 + 4 s for 4 micro-batches, besides those that were planned anew and hide nothing."""
    kept = replace(BARE, micro_batches=4)
    unused = replace(FLOW, replicas_RR=np.zeros((3, 3)), kept_steps=(2, 0))
    assert layer_time(unused, PRICES, replicas=BARE, kept=kept).replicas_s == pytest.approx(12.0 / 4)
    assert layer_time(
        replace(unused, kept_returns=False), PRICES, replicas=BARE, kept=kept
    ).replicas_s == pytest.approx(4.0 / 4)
    both = layer_time(replace(FLOW, kept_steps=(2, 0)), PRICES, replicas=BARE, kept=kept)
    assert both.replicas_s == pytest.approx(12.0 + 12.0 / 4)


def test_they_hide_behind_what_the_others_leave() -> None:
    forward = replace(BARE, fetch_hidden="forward", micro_batches=4)  # of 1 + 2 s
    unused = replace(FLOW, replicas_RR=np.zeros((3, 3)), kept_steps=(2, 0))
    assert layer_time(unused, PRICES, replicas=BARE, kept=forward).replicas_hidden_s == pytest.approx(-3.0 / 4)
    # the first permutation, a quarter of 3 s, hides the new ones
    anew = replace(BARE, fetch_hidden="home_rows")
    both = layer_time(replace(FLOW, kept_steps=(2, 0)), PRICES, replicas=anew, kept=forward)
    assert both.replicas_hidden_s == pytest.approx(-0.75 - (3.0 - 0.75) / 4)


def test_transfers_that_wait_for_others_follow_one_another() -> None:
    assert seconds(BARE, replace(FLOW, replica_steps=(3, 0))).replicas_s == pytest.approx(18.0)


def test_the_planners_price_of_a_transfer() -> None:
    """Weights take 2 s and gradients 4 s of a transfer; a token takes 0.3 s."""

    def tokens(schedule: ReplicaSchedule, rank_tokens: float = 10.0) -> float:
        return transfer_price(PRICES, schedule, rank_tokens).each_tokens

    assert tokens(BARE) == pytest.approx(6.0 / 0.3)
    # a forward pass of 1 + 1 s hides a third of itself of each of three transfers
    assert tokens(replace(BARE, fetch_hidden="forward")) == pytest.approx((6.0 - 2.0 / 3) / 0.3)
    assert tokens(replace(BARE, fetch_hidden="forward", return_hidden="backward"), 1000.0) == 0.0
    assert transfer_price(PRICES, BARE, 10.0, margin=2.0).each_tokens == pytest.approx(2 * 6.0 / 0.3)


@pytest.mark.parametrize("steps", [(1, 0), (3, 0), (0, 2), (2, 1)])
@pytest.mark.parametrize("rank_tokens", [3.0, 30.0])
def test_the_planners_price_is_what_the_layer_takes_longer(steps: tuple[int, int], rank_tokens: float) -> None:
    prices = replace(PRICES, inter_replica_s=11.0, intra_token_s=0.1, inter_gpu_token_s=0.4)
    flow = LayerFlow(
        load_ER=np.full((4, 4), rank_tokens / 4),
        traffic_RR=np.full((4, 4), rank_tokens / 4),
        replicas_RR=np.zeros((4, 4)),
        num_nodes=2,
        early_tokens=rank_tokens / 2,
    )
    for schedule in (BARE, replace(BARE, fetch_hidden="home_rows", return_hidden="backward")):
        with_replicas, without = (
            layer_time(replace(flow, replica_steps=each), prices, replicas=schedule).total_s for each in (steps, (0, 0))
        )
        price = transfer_price(prices, schedule, rank_tokens, num_nodes=2)
        token_s = 0.3 + 0.1 / 2 + 0.4 / 2
        assert price.tokens(*steps) * token_s == pytest.approx(with_replicas - without)


def test_holders_that_forward_unburden_the_home() -> None:
    """Rank 1 sends the weights on to rank 2: one transfer of weights at the busiest port, two of gradients."""
    relayed = replace(FLOW, fetch_RR=np.array([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0], [0.0, 0.0, 0.0]]))
    assert seconds(BARE, relayed).replicas_s == pytest.approx(2.0 + 2 * 4.0)


def test_the_schedules_of_training() -> None:
    expert = ExpertShape(hidden=8, ffn=8, element_bytes=2, grad_bytes=4)
    history = schedule_of("history", expert, micro_batches=4)
    assert (history.micro_batches, history.fetch_hidden) == (4, "forward")
    assert history.weight_share == pytest.approx(1 / 3)
    exact = schedule_of("exact", expert, micro_batches=4)
    assert (exact.micro_batches, exact.fetch_hidden) == (1, "home_rows")
    assert {history.return_hidden, exact.return_hidden} == {"backward"}
    assert schedule_of("auto", expert, micro_batches=4) == history, "auto's replicas are those from history, mostly"
    assert schedule_of("history", expert, micro_batches=4, fetched_early=False).fetch_hidden == "home_rows"
