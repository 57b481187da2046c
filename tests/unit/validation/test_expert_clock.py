"""The benchmark's clock of the experts, whose rows come in one tensor or in two blocks."""

from __future__ import annotations

import pytest
import torch

from scripts.training_bench.rank import ExpertClock


class Experts(torch.nn.Module):
    """Rows times a weight, as experts return them: with no bias."""

    def forward(self, rows: torch.Tensor | tuple[torch.Tensor, ...]) -> tuple[object, None]:
        return (rows * 2 if isinstance(rows, torch.Tensor) else tuple(each * 2 for each in rows)), None


@pytest.mark.parametrize("blocks", [False, True], ids=["one_tensor", "two_blocks"])
def test_the_clock_stops_after_both_passes(blocks: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each reading of the clock is one second later: a pass takes one, whatever the number of blocks."""
    readings = iter(range(100))
    monkeypatch.setattr("scripts.training_bench.rank.time.thread_time", lambda: float(next(readings)))
    clock, experts, inputs = ExpertClock(), Experts(), torch.ones(4, 2, requires_grad=True)
    clock.watch(experts)
    rows = (inputs * 1).tensor_split([3]) if blocks else inputs * 1
    output, _ = experts(rows)
    assert clock.seconds == 1
    (torch.cat(output) if blocks else output).sum().backward()
    assert clock.seconds == 2
    experts(torch.ones(4, 2))  # as in evaluation: no backward pass follows
    assert clock.seconds == 3
