"""Random numbers that are the same for everybody who routes a token, and whenever it is routed."""

from __future__ import annotations

import pytest
import torch

from megatron_smartmoe.adapter.gates.draws import Draws, Part
from megatron_smartmoe.errors import CompatError

CPU = torch.device("cpu")
ROWS, EXPERTS = 8, 3


def drawn(part: Part, num_rows: int, num_samples: int, *, passes: int = 1, **where: int) -> torch.Tensor:
    """All micro-batches of an iteration, `[passes, rows, samples, experts]`."""
    draws = Draws(where.get("seed", 1), where.get("layer", 0), part)
    draws.begin(where.get("iteration", 5), passes)
    return torch.stack(
        [draws.uniform(num_rows, num_samples, EXPERTS, CPU).view(num_rows, num_samples, EXPERTS) for _ in range(passes)]
    )


def test_every_mix_draws_what_one_process_draws() -> None:
    whole_MSBE = drawn(Part(), ROWS, 1, passes=4)
    for dp_rank in range(2):  # every second sample
        part = drawn(Part(dp_rank=dp_rank, dp_size=2), ROWS, 1, passes=2)
        assert torch.equal(part, whole_MSBE[dp_rank::2])
    two = drawn(Part(), ROWS, 2, passes=2)  # micro-batches of two samples
    assert torch.equal(two.transpose(1, 2).reshape(4, ROWS, 1, EXPERTS), whole_MSBE)
    for sp_rank in range(2):  # a half of the rows
        part = drawn(Part(sp_rank=sp_rank, sp_size=2), ROWS // 2, 1, passes=4)
        assert torch.equal(part, whole_MSBE[:, sp_rank * 4 : sp_rank * 4 + 4])
    for cp_rank in range(2):  # a stripe and its mirror
        part = drawn(Part(cp_rank=cp_rank, cp_size=2), ROWS // 2, 1, passes=4)
        first, mirror = 2 * cp_rank, 6 - 2 * cp_rank
        assert torch.equal(part, whole_MSBE[:, [first, first + 1, mirror, mirror + 1]])


def test_another_place_draws_another_number() -> None:
    everywhere = [drawn(Part(), ROWS, 2, **{name: 9}) for name in ("seed", "layer", "iteration")]
    values = torch.cat([drawn(Part(), ROWS, 2, passes=3).flatten(), *(each.flatten() for each in everywhere)])
    assert len(values.unique()) == len(values)


def test_the_numbers_are_uniform() -> None:
    values = drawn(Part(), 2000, 10).flatten().double()
    assert 0 < values.min() < 1e-4
    assert 1 - 1e-4 < values.max() < 1
    assert torch.histc(values, 10, 0, 1).div(len(values)).sub(0.1).abs().max() < 0.01
    neighbours = torch.stack([values[:-1], values[1:]])
    assert abs(float(torch.corrcoef(neighbours)[0, 1])) < 0.02


@pytest.mark.parametrize("order", ["FFFBBB", "FBFBFB", "FFBFBB"])
def test_recomputation_draws_the_same(order: str) -> None:
    """Forward passes without gradients, and backward passes that run the layer again, in the orders of schedules."""
    draws = Draws(1, 0, Part())
    for iteration in (1, 2):
        draws.begin(iteration, 3)
        passes: dict[str, list[torch.Tensor]] = {"F": [], "B": []}
        for kind in order:
            with torch.set_grad_enabled(kind == "B"):
                passes[kind].append(draws.uniform(ROWS, 1, EXPERTS, CPU))
        assert all(torch.equal(a, b) for a, b in zip(passes["F"], passes["B"], strict=True))
        assert not torch.equal(passes["F"][0], passes["F"][1])
        assert torch.equal(draws.uniform(ROWS, 1, EXPERTS, CPU), passes["F"][0])  # the iteration is run again


def test_numbers_before_an_iteration_are_refused() -> None:
    with pytest.raises(CompatError, match="before an iteration started"):
        Draws(1, 0, Part()).uniform(ROWS, 1, EXPERTS, CPU)
