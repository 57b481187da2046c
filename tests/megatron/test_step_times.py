"""Parts and counts of a step, from hooks on modules that are laid out as Megatron's layers are."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_smartmoe.adapter.records import scalars, step_times
from megatron_smartmoe.adapter.records.step_times import Call, Step, StepTimes
from megatron_smartmoe.cost.fitted import Part
from megatron_smartmoe.runtime.step_clock import STEP_CLOCK


class Experts(torch.nn.Linear):
    def forward(self, rows: torch.Tensor, tokens: torch.Tensor, probs: torch.Tensor) -> Any:  # type: ignore[override]
        return super().forward(rows) * probs.unsqueeze(1), None


class Layer(torch.nn.Module):
    """As a MoE layer: what it is called with and what it returns, around experts."""

    num_local_experts = 2

    def __init__(self) -> None:
        super().__init__()
        self.experts = Experts(4, 4)
        self.token_dispatcher = SimpleNamespace(input_splits=[1, 5], output_splits=[2, 1])

    def forward(self, rows: torch.Tensor) -> Any:
        output, _ = self.experts(rows * 2, torch.tensor([2, 0, 4]), torch.ones(len(rows)))
        return output * 3, None


def run_of(*layers: Layer, **args: Any) -> Any:
    ranks = SimpleNamespace(ep_rank=0, ep_size=2)
    return SimpleNamespace(layers=tuple(enumerate(layers)), ranks=ranks, args=SimpleNamespace(**args))


def step_of(times: StepTimes, layer: Layer) -> Step:
    times.begin()
    rows = torch.ones(6, 4, requires_grad=True) * 1.0
    (layer(rows)[0].sum() * 1.0).backward()
    times.end(1)
    return times.take()[0]


ONE_WAY = [Part.DISPATCH, Part.EXPERTS, Part.DISPATCH, Part.OUTSIDE]
IN_STEPS = [Part.EXPERTS, Part.OUTSIDE]  # nobody calls the layer


@pytest.mark.parametrize(("in_steps", "one_way"), [(False, ONE_WAY), (True, IN_STEPS)])
def test_both_passes_go_through_the_parts_in_turn(
    in_steps: bool, one_way: list[Part], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step_times, "has_passed", lambda marks: False)  # as a device that is behind
    layer = Layer()
    step = step_of(StepTimes(run_of(layer, overlap_moe_expert_parallel_comm=in_steps)), layer)
    assert [part for part, _ in step.marks] == [Part.OUTSIDE, *one_way, *one_way, -1]
    assert step.seconds is None
    assert step.seconds_P.sum() > 0


class TwoBlocks(Experts):
    def forward(self, rows: Any, tokens: torch.Tensor, probs: Any) -> Any:  # type: ignore[override]
        return tuple(Experts.forward(self, rows[i], tokens, probs[i])[0] for i in range(2)), None


class LayerInBlocks(Layer):
    """Its experts get the rows of home slots and of spare slots apart."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = TwoBlocks(4, 4)

    def forward(self, rows: torch.Tensor) -> Any:
        blocks = tuple((rows * 2).split([4, 2]))
        outputs, _ = self.experts(blocks, torch.tensor([2, 0, 4]), tuple(torch.ones(len(block)) for block in blocks))
        return torch.cat(outputs) * 3, None


def test_blocks_of_rows_are_timed_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_times, "has_passed", lambda marks: False)
    step = step_of(StepTimes(run_of(layer := LayerInBlocks())), layer)
    assert [part for part, _ in step.marks] == [Part.OUTSIDE, *ONE_WAY, *ONE_WAY, -1]


def test_a_step_that_has_passed_is_read_and_its_marks_given_back() -> None:
    layer = Layer()
    step = step_of(StepTimes(run_of(layer)), layer)
    assert step.marks == []
    assert step.seconds_P[[Part.OUTSIDE, Part.DISPATCH, Part.EXPERTS]].all()


def test_rows_are_counted_once_and_not_in_evaluation() -> None:
    layer = Layer()
    times = StepTimes(run_of(layer))
    layer(torch.ones(6, 4))  # no step is timed
    times.begin()
    with torch.no_grad():  # the first pass of recomputation
        layer(torch.ones(6, 4))
    layer(torch.ones(6, 4, requires_grad=True))
    times.end(1)
    [step] = times.take()
    units = times.units_of(step, micro_batches=1)
    assert units.layer_U.tolist() == [0]
    assert units.counts_U3.tolist() == [[6, 2, 5]]  # 5 of 6 rows are sent to the other rank
    assert (units.calls, units.replicas) == (1, 1)
    assert not STEP_CLOCK.is_running


def test_a_dispatch_in_two_hops_counts_its_own_rows() -> None:
    layer = Layer()
    layer.token_dispatcher.port_rows = 3
    step = step_of(times := StepTimes(run_of(layer)), layer)
    assert times.units_of(step, micro_batches=1).counts_U3.tolist() == [[6, 2, 3]]


def test_chunks_of_a_micro_batch_are_added_up() -> None:
    times = StepTimes(run_of())
    rows = [[1, 2], [3, 0], [5, 5], [0, 1]]
    calls = [Call(layer=3, rows_S=torch.tensor(each), home_slots=2, port_tokens=7) for each in rows]
    units = times.units_of(Step(iteration=1, marks=[], calls=calls), micro_batches=2)
    assert units.counts_U3.tolist() == [[6, 3, 7], [11, 3, 7]]
    assert units.calls == 4


def test_where_the_sizes_of_the_exchange_are_unknown_they_are_an_even_share() -> None:
    call = Call(layer=0, rows_S=torch.tensor([4, 6]), home_slots=2, port_tokens=None)
    units = StepTimes(run_of()).units_of(Step(iteration=1, marks=[], calls=[call]), micro_batches=1)
    assert units.counts_U3.tolist() == [[10, 2, 5]]


class Writer:
    """TensorBoard's and W&B's calls, noted."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def add_scalar(self, *call: Any) -> None:
        self.calls.append(call)

    def log(self, *call: Any) -> None:
        self.calls.append(call)

    add_histogram = add_scalar
    Histogram = staticmethod(lambda values: ("histogram", values))


def test_both_of_megatrons_writers_get_the_values(monkeypatch: pytest.MonkeyPatch) -> None:
    tensorboard, wandb = Writer(), Writer()
    monkeypatch.setattr(scalars, "get_tensorboard_writer", lambda: tensorboard)
    monkeypatch.setattr(scalars, "get_wandb_writer", lambda: wandb)
    scalars.write_scalars({"a": 1.0, "b": 2.0}, 5)
    scalars.write_histograms({"c": [1, 2]}, 5)
    assert tensorboard.calls == [("a", 1.0, 5), ("b", 2.0, 5), ("c", [1, 2], 5)]
    assert wandb.calls == [({"a": 1.0, "b": 2.0}, 5), ({"c": ("histogram", [1, 2])}, 5)]
