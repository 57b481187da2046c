"""Each gate on a case that was worked out by hand, and its gradients against finite differences."""

from __future__ import annotations

import functools
import math
from typing import Any
from unittest import mock

import pytest
import torch

from megatron_smartmoe.adapter.gates.distributed_capacity import granted, places_before
from megatron_smartmoe.adapter.gates.noisy_top_k import keep_top_k, squared_variation
from megatron_smartmoe.adapter.gates.router import fitting, settled
from megatron_smartmoe.adapter.gates.swipe import distinct, shares
from megatron_smartmoe.adapter.gates.table import ZeroExperts
from megatron_smartmoe.adapter.gates.topology import near_or_best
from megatron_smartmoe.adapter.gates.zero_computation import ZeroComputationRouter
from megatron_smartmoe.errors import CompatError
from tests.support.gates import HIDDEN, logits_of, router

assert_close = functools.partial(torch.testing.assert_close, rtol=1e-6, atol=1e-7)


@pytest.fixture(autouse=True)
def weights_stay_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Megatron's router moves its weights to the device that CUDA names, and there is none."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: torch.device("cpu"))


def normal_cdf(x: float) -> float:
    return 0.5 * math.erfc(-x / math.sqrt(2))


# --- noisy top-k ------------------------------------------------------------------------------------------------------


def test_noisy_top_k_by_hand() -> None:
    """Token 0 chooses 2 and 0 of (1, 0, 2): without an expert that it chose, the threshold is the next one's score."""
    weights_TE, chosen_TE, threshold_TE = keep_top_k(torch.tensor([[1.0, 0.0, 2.0], [3.0, 3.5, -1.0]]), 2)
    heavier, even = 1 / (1 + math.exp(-1)), 1 / (1 + math.exp(-0.5))
    assert chosen_TE.tolist() == [[True, False, True], [True, True, False]]
    assert_close(weights_TE, torch.tensor([[1 - heavier, 0, heavier], [1 - even, even, 0]]))
    assert threshold_TE.tolist() == [[0.0, 1.0, 0.0], [-1.0, -1.0, 3.0]]


def test_the_losses_of_noisy_top_k_by_hand() -> None:
    """Without noise weights the noise has the scale softplus(0) = ln 2, and the load is a sum of normal cdfs."""
    gate = router("noisy-top-k", num_experts=3, top_k=2)
    clean_TE = [[1.0, 0.0, 2.0], [0.5, 1.5, -1.0]]
    noise_TE = [[0.0] * 3] * 2
    choice = gate.choose(torch.cat([logits_of(clean_TE), logits_of(noise_TE)], dim=1), num_rows=2)
    gate.draws.begin(1, 1)
    draws_TE = torch.special.ndtri(gate.draws.uniform(2, 1, 3, torch.device("cpu"))).tolist()
    importance_E, load_E = [0.0] * 3, [0.0] * 3
    for clean_E, draws_E in zip(clean_TE, draws_TE, strict=True):
        noisy_E = [c + math.log(2) * d for c, d in zip(clean_E, draws_E, strict=True)]
        order = sorted(range(3), key=lambda e: -noisy_E[e])
        exps = [math.exp(noisy_E[e]) for e in order[:2]]
        for expert in range(3):
            rank = order.index(expert)
            importance_E[expert] += exps[rank] / sum(exps) if rank < 2 else 0
            threshold = sorted((noisy_E[e] for e in range(3) if e != expert), reverse=True)[1]
            load_E[expert] += normal_cdf((clean_E[expert] - threshold) / math.log(2))
    expected = sum(
        sum((v - sum(values) / 3) ** 2 for v in values) / 3 / (sum(values) / 3) ** 2
        for values in (importance_E, load_E)
    )
    assert_close(float(choice.loss), expected, rtol=1e-5, atol=0)
    assert float(squared_variation(torch.tensor([1.0, 3.0]))) == pytest.approx(0.25)


def test_noise_is_for_training() -> None:
    gate = router("noisy-top-k", num_experts=4, top_k=2)
    hidden = torch.randn(6, 2, HIDDEN, generator=torch.Generator().manual_seed(0))
    noisy = gate(hidden)[0]
    gate.eval()
    weights, chosen = gate(hidden)
    logits_TE = torch.nn.functional.linear(hidden.view(12, HIDDEN), gate.weight)
    expected = keep_top_k(logits_TE, 2)
    assert_close(weights, expected[0])
    assert torch.equal(chosen, expected[1])
    assert not torch.equal(noisy, weights)


def test_the_noise_is_trained() -> None:
    """Through the loss, whose slope comes back times the coefficient; through the weights too."""
    gate = router("noisy-top-k", num_experts=4, top_k=2)
    hidden = torch.randn(6, 2, HIDDEN, generator=torch.Generator().manual_seed(0))
    weights, _ = gate(hidden)
    weights.sum().backward()  # each token's weights add up to 1: what comes back is the loss's slope
    assert gate.noise_weight.grad.abs().max() > 1e-6
    assert vars(gate.noise_weight)["sequence_parallel"] is False


# --- GShard -----------------------------------------------------------------------------------------------------------


def test_gshard_by_hand() -> None:
    """Four tokens, two experts, two places each: three first choices of expert 0, one of expert 1.

    Token 2's first choice finds no place, and neither do second choices of expert 0. Expert 1 has token 3's first
    choice, and token 0's second choice as the first of the second ones.
    """
    gate = router("gshard", num_experts=2, top_k=2, moe_expert_capacity_factor=0.5)
    rows = [[2.0, 1.5], [1.0, 0.0], [3.0, 0.0], [0.0, 2.0]]
    gate.eval()  # no chance
    choice = gate.choose(logits_of(rows), num_rows=4)
    assert choice.chosen_TE.tolist() == [[True, True], [True, False], [False, False], [False, True]]
    share = 1 / (1 + math.exp(-0.5))
    expected = [[share, 1 - share], [1 / (1 + math.exp(-1)), 0], [0, 0], [0, 1 / (1 + math.exp(-2))]]
    assert_close(choice.weights_TE, torch.tensor(expected, dtype=torch.float64))
    assert choice.loss is None
    gate.train()
    first = [1 / (1 + math.exp(b - a)) for a, b in rows]
    mean_0 = sum(first) / 4
    expected_loss = 4 * (0.75 * mean_0 + 0.25 * (1 - mean_0)) / 2
    assert_close(float(gate.choose(logits_of(rows), num_rows=4).loss), expected_loss)


def test_chance_keeps_the_second_expert_as_often_as_it_weighs() -> None:
    """g2 = 0.2 is kept with probability 0.4, and g2 = 0.5 always."""
    gate = router("gshard", num_experts=3, top_k=2, moe_expert_capacity_factor=3.0)
    rows = 4000
    unlikely = [math.log(0.8), math.log(0.2), -30.0]
    chosen_TE = gate.choose(logits_of([unlikely] * rows), num_rows=rows).chosen_TE
    assert chosen_TE[:, 0].all()
    assert float(chosen_TE[:, 1].double().mean()) == pytest.approx(0.4, abs=0.03)
    gate.draws.begin(2, 1)
    assert gate.choose(logits_of([[0.0, 0.0, -30.0]] * rows), num_rows=rows).chosen_TE[:, :2].all()


def test_places_go_to_first_choices_first() -> None:
    first = torch.tensor([[False, True], [False, True], [True, False]])
    second = ~first
    assert fitting([first, second], 2).tolist() == [[True, True], [False, True], [True, False]]
    assert fitting([first, second], 3).all()


# --- BASE -------------------------------------------------------------------------------------------------------------


def test_base_by_hand() -> None:
    """Both tokens like expert 0 better; the second one loses less. In evaluation both get it."""
    gate = router("base", num_experts=2, top_k=1)
    rows = [[5.0, 1.0], [4.0, 3.0]]
    choice = gate.choose(logits_of(rows), num_rows=2)
    sigmoid = [1 / (1 + math.exp(-x)) for x in (5, 3, 4)]
    expected = torch.tensor([[sigmoid[0], 0], [0, sigmoid[1]]], dtype=torch.float64)
    assert_close(choice.weights_TE, expected)
    gate.eval()
    expected = torch.tensor([[sigmoid[0], 0], [sigmoid[2], 0]], dtype=torch.float64)
    assert_close(gate.choose(logits_of(rows), num_rows=2).weights_TE, expected)


def test_base_needs_equal_shares() -> None:
    gate = router("base", num_experts=2, top_k=1)
    with pytest.raises(CompatError, match="must be divisible by the 2 experts"):
        gate.choose(logits_of([[1.0, 2.0]] * 3), num_rows=3)


# --- SWIPE ------------------------------------------------------------------------------------------------------------


def test_swipe_by_hand() -> None:
    """Two ranks of two tokens, top-2: each may take 4 of the 8 choices.

    All first choices are for rank 0, which accepts all four and is full. Of the second choices, rank 0's tokens want
    ranks (0, 1) and rank 1's (0, 0): three are too many, and go to rank 1, where one of the second choices is already.
    """
    counts_SKR = torch.tensor([[[2, 0], [1, 1]], [[2, 0], [2, 0]]])
    assert shares(counts_SKR, torch.tensor([[0, 0], [0, 1]]), 0).tolist() == [[0, 1], [0, 1]]
    assert shares(counts_SKR, torch.tensor([[0, 0], [0, 0]]), 1).tolist() == [[0, 1], [0, 1]]


@pytest.mark.parametrize(("num_ranks", "top_k"), [(2, 2), (4, 3), (8, 1)])
def test_swipe_gives_every_rank_the_same(num_ranks: int, top_k: int) -> None:
    generator = torch.Generator().manual_seed(3)
    weights = torch.tensor([3.0 ** -(rank % 3) for rank in range(num_ranks)])
    ranks_STK = weights.multinomial(num_ranks * 10 * top_k, replacement=True, generator=generator)
    ranks_STK = ranks_STK.view(num_ranks, 10, top_k)
    counts_SKR = torch.nn.functional.one_hot(ranks_STK, num_ranks).sum(dim=1)
    taken = torch.stack([shares(counts_SKR, ranks_TK, source) for source, ranks_TK in enumerate(ranks_STK)])
    assert torch.bincount(ranks_STK.flatten()).max() > 10 * top_k
    assert torch.bincount(taken.flatten()).tolist() == [10 * top_k] * num_ranks
    first = counts_SKR[:, 0].sum(dim=0)  # what fits stays
    assert torch.equal(taken[..., 0][:, :][ranks_STK[..., 0] == int(first.argmin())].unique(), first.argmin().view(1))


def test_swipe_gives_no_expert_twice() -> None:
    """Rank 0 has experts 0 to 2, rank 1 experts 3 to 5: the later choice takes the next free one of its rank."""
    experts_TK = torch.tensor([[1, 1, 1], [2, 0, 2], [5, 4, 5], [0, 3, 1]])
    assert distinct(experts_TK, 3).tolist() == [[1, 2, 0], [2, 0, 1], [5, 4, 3], [0, 3, 1]]


# --- Tutel's dynamic capacity -----------------------------------------------------------------------------------------


def test_dynamic_capacity_by_hand() -> None:
    """Three tokens, top-2 of three experts, a bound of two places: the third second choice of expert 1 is dropped."""
    gate = router("dynamic-capacity", num_experts=3, top_k=2, moe_expert_capacity_factor=1.0)
    rows = [[2.0, 1.0, 0.0], [0.0, 1.0, 2.0], [2.0, 1.0, 0.0]]
    choice = gate.choose(logits_of(rows), num_rows=3)
    assert choice.chosen_TE.tolist() == [[True, True, False], [False, True, True], [True, False, False]]
    kept = 1 / (1 + math.exp(-1))
    expected = torch.tensor([[kept, 1 - kept, 0], [0, 1 - kept, kept], [kept, 0, 0]], dtype=torch.float64)
    assert_close(choice.weights_TE, expected)
    wide = router("dynamic-capacity", num_experts=3, top_k=2, moe_expert_capacity_factor=3.0)
    assert wide.choose(logits_of(rows), num_rows=3).chosen_TE.sum() == 6


# --- FastMoE's distributed capacity -----------------------------------------------------------------------------------


def test_distributed_capacity_by_hand() -> None:
    """Two ranks of two tokens, top-2 of two experts, three places each, which go to first choices first.

    Expert 0 is the first choice of both tokens of rank 0 and of one of rank 1: it has no place for a second choice.
    Expert 1 is the first choice of rank 1's other token, then of rank 0's second choices, and has none for rank 1's.
    """
    first, second = torch.tensor([0, 0]), torch.tensor([1, 1])
    ranks = [[torch.nn.functional.one_hot(each, 2).bool() for each in (first, second)]]
    ranks += [[torch.tensor([[True, False], [False, True]]), torch.tensor([[False, True], [True, False]])]]
    counts_SKE = torch.stack([torch.stack([chosen.sum(dim=0) for chosen in rank]) for rank in ranks])
    assert places_before(counts_SKE, 0).tolist() == [[0, 0], [3, 1]]
    assert places_before(counts_SKE, 1).tolist() == [[2, 0], [3, 3]]
    kept = [granted(rank, places_before(counts_SKE, source), 3).tolist() for source, rank in enumerate(ranks)]
    assert kept == [[[True, True], [True, True]], [[True, False], [False, True]]]


def test_one_rank_alone_has_gshards_places() -> None:
    generator = torch.Generator().manual_seed(4)
    experts_T2 = torch.rand(40, 6, generator=generator).topk(2, dim=1).indices
    chosen_2TE = [torch.nn.functional.one_hot(experts_T, 6).bool() for experts_T in experts_T2.unbind(dim=1)]
    counts_SKE = torch.stack([chosen_TE.sum(dim=0) for chosen_TE in chosen_2TE])[None]
    for capacity in (3, 9, 40):
        assert torch.equal(granted(chosen_2TE, places_before(counts_SKE, 0), capacity), fitting(chosen_2TE, capacity))


# --- FasterMoE's topology-aware gate ----------------------------------------------------------------------------------


def test_topology_by_hand() -> None:
    """Experts 0 and 1 are near. Tokens 0, 2 and 3 like one of the far ones best; one of four tokens may leave: 3."""
    rows = [[0.0, 1.0, 2.0, -1.0], [3.0, 0.0, 2.0, 1.0], [1.0, 0.5, 0.0, 2.5], [0.2, 0.1, 4.0, 0.3]]
    near_E = torch.tensor([True, True, False, False])
    experts_T2 = near_or_best(torch.tensor(rows), near_E, 0.25)
    assert experts_T2.tolist() == [[1, 0], [0, 1], [0, 1], [0, 2]]
    assert near_or_best(torch.tensor(rows), near_E, 0.75).tolist() == [[2, 1], [0, 2], [3, 0], [2, 3]]  # all may
    assert near_or_best(torch.tensor(rows), near_E, 0.0).tolist() == [[1, 0], [0, 1], [0, 1], [0, 1]]


def test_a_node_of_one_expert_has_no_topology(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.distributed.get_process_group_ranks", lambda group: [0, 1])
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    with pytest.raises(CompatError, match="experts on a node = 1: must be at least 2"):
        router("topology", num_experts=2, top_k=2)


# --- MoE++ ------------------------------------------------------------------------------------------------------------


def zero_router(experts: ZeroExperts, **changes: Any) -> Any:
    cls = settled(ZeroComputationRouter, experts=experts, tau=0.5)
    return router("moe++", cls=cls, num_experts=2, top_k=2, **{"moe_expert_capacity_factor": 4.0, **changes})


def test_moe_plus_plus_by_hand() -> None:
    """Two experts, one zero, one copy: the tokens choose (0, copy), (copy, zero) and (1, 0)."""
    gate = zero_router(ZeroExperts(zero=1, copy=1, constant=0))
    rows = [[2.0, 0.0, -1.0, 1.0], [0.0, -1.0, 1.0, 2.0], [1.0, 2.0, 0.0, -1.0]]
    choice = gate.choose(logits_of(rows), num_rows=3)
    assert choice.chosen_TE.tolist() == [[True, False], [False, False], [True, True]]
    total = sum(math.exp(x) for x in (2, 1, 0, -1))
    two, one, naught, less = (math.exp(x) / total for x in (2, 1, 0, -1))
    expected = torch.tensor([[two, 0], [0, 0], [one, two]], dtype=torch.float64)
    assert_close(choice.weights_TE, expected)
    mean_A = [(two + naught + one) / 3, (naught + less + two) / 3, (less + one + naught) / 3, (one + two + less) / 3]
    share_A = [2 / 3, 1 / 3, 1 / 3, 2 / 3]
    eta_A = [1, 1, 0.5, 0.5]
    expected_loss = sum(e * f * p for e, f, p in zip(eta_A, share_A, mean_A, strict=True)) * 4 / 2
    assert_close(float(choice.loss), expected_loss)
    hidden = torch.randn(3, 1, HIDDEN, generator=torch.Generator().manual_seed(0))
    expected_TH = hidden.view(3, HIDDEN) * torch.tensor([[one], [two], [0.0]])
    assert_close(gate.beside(hidden).view(3, HIDDEN), expected_TH)


def test_capacities_of_moe_plus_plus() -> None:
    """Eq. 8: 16 choices, factor 1, tau 0.5, two experts and two that cost nothing: 16 / 3 places, or half of them."""
    gate = zero_router(ZeroExperts(zero=1, copy=1, constant=0), moe_expert_capacity_factor=1.0)
    assert gate._capacities(torch.zeros(8, 2)).tolist() == [3, 3, 6, 6]


def test_a_constant_expert_by_hand() -> None:
    """Without W_c it is the mean of input and vector, and what is trained has gradients."""
    gate = zero_router(ZeroExperts(zero=0, copy=0, constant=1))
    with torch.no_grad():
        gate.constant_weight.zero_()
    hidden = torch.randn(5, 2, HIDDEN, generator=torch.Generator().manual_seed(0))
    gate(hidden)
    weights_TZ = gate._weights_TZ
    assert (weights_TZ > 0).any()
    output_TH = gate.beside(hidden).view(10, HIDDEN)
    expected_TH = weights_TZ * (hidden.view(10, HIDDEN) + gate.constant_vector) / 2
    assert_close(output_TH, expected_TH)
    output_TH.square().sum().backward()
    for parameter in (gate.zero_weight, gate.constant_weight, gate.constant_vector):
        assert parameter.grad is not None
        assert parameter.grad.abs().max() > 0


@pytest.mark.parametrize("text", ["", "zero", "zero=1,zero=2", "zero=-1", "skip=1", "zero=0,copy=0"])
def test_counts_that_mean_nothing(text: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011  # the check says what is wrong
        ZeroExperts.parse(text)
    assert ZeroExperts.parse("copy=2, constant=3") == ZeroExperts(zero=0, copy=2, constant=3)


# --- all --------------------------------------------------------------------------------------------------------------

SETTINGS: dict[str, dict[str, Any]] = {
    "noisy-top-k": {"top_k": 2},
    "gshard": {"top_k": 2, "moe_expert_capacity_factor": 0.8},
    "base": {"top_k": 1},
    "swipe": {"top_k": 2},
    "dynamic-capacity": {"top_k": 2, "moe_expert_capacity_factor": 0.8},
    "distributed-capacity": {"top_k": 2, "moe_expert_capacity_factor": 0.8},
    "topology": {"top_k": 2},
    "moe++": {"top_k": 2, "moe_expert_capacity_factor": 0.8},
}


@pytest.fixture
def one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """The exchanges of gates among one rank."""

    def gather(output: torch.Tensor, part: torch.Tensor, group: Any) -> None:
        output.copy_(part)

    monkeypatch.setattr("torch.distributed.all_gather_into_tensor", gather)
    monkeypatch.setattr("torch.distributed.get_process_group_ranks", lambda group: [0])


@pytest.mark.parametrize("gate", SETTINGS)
@pytest.mark.usefixtures("one_rank")
def test_gradients_are_those_of_finite_differences(gate: str) -> None:
    """Of the weights, and of the loss; scores are far enough apart that no choice changes."""
    built = router(gate, num_experts=4, **SETTINGS[gate])
    columns = 8 if gate in ("noisy-top-k", "moe++") else 4
    generator = torch.Generator().manual_seed(2)
    logits_TE = torch.randn(8, columns, generator=generator, dtype=torch.float64, requires_grad=True)

    def outputs(logits_TE: torch.Tensor) -> tuple[torch.Tensor, ...]:
        choice = built.choose(logits_TE, num_rows=8)
        return (choice.weights_TE,) if choice.loss is None else (choice.weights_TE, choice.loss)

    assert len(outputs(logits_TE)) == (1 if gate in ("base", "swipe") else 2)
    assert torch.autograd.gradcheck(outputs, (logits_TE,), eps=1e-7, atol=1e-4)


@pytest.mark.parametrize("gate", SETTINGS)
@pytest.mark.usefixtures("one_rank")
def test_what_is_not_chosen_has_no_weight(gate: str) -> None:
    built = router(gate, num_experts=4, **SETTINGS[gate])
    hidden = torch.randn(8, 2, HIDDEN, generator=torch.Generator().manual_seed(0))
    weights_TE, chosen_TE = built(hidden)
    assert weights_TE.shape == chosen_TE.shape == (16, 4)
    assert chosen_TE.dtype == torch.bool
    assert torch.equal(weights_TE != 0, chosen_TE)
    assert int(chosen_TE.sum(dim=1).max()) <= built.topk


def test_losses_are_of_all_ranks_and_slopes_of_a_ranks_own_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ranks share a micro-batch: their slopes add up to that of one rank with all tokens."""
    rows = [[2.0, 1.5, 0.0], [1.0, 0.0, 0.5], [3.0, 0.0, 1.0], [0.0, 2.0, 0.0]]
    gate = router("gshard", num_experts=3, top_k=2, moe_expert_capacity_factor=3.0)
    whole = logits_of(rows)
    loss = gate.choose(whole, num_rows=4).loss
    loss.backward()
    gate.tp_cp_group = mock.Mock(**{"size.return_value": 2})
    parts = [logits_of(rows[:2]), logits_of(rows[2:])]
    sums: list[list[torch.Tensor]] = []
    for rank in (0, 1):  # what each rank adds up
        sums.append([])
        monkeypatch.setattr(
            "torch.distributed.all_reduce", lambda total, group, of=sums[rank]: of.append(total.clone())
        )
        gate.choose(parts[rank], num_rows=2)
    for rank in (0, 1):
        others = iter(sums[1 - rank])
        monkeypatch.setattr("torch.distributed.all_reduce", lambda total, group, of=others: total.add_(next(of)))
        part = gate.choose(parts[rank], num_rows=2).loss
        assert_close(part, loss)
        part.backward()
    assert_close(torch.cat([part.grad for part in parts if part.grad is not None]), whole.grad)


def test_a_padding_mask_is_refused() -> None:
    built = router("base", num_experts=2, top_k=1)
    with pytest.raises(CompatError, match="BaseRouter = called with a padding mask"):
        built(torch.randn(2, 1, HIDDEN), padding_mask=torch.zeros(2, 1, dtype=torch.bool))
