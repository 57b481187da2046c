"""Reductions of buckets with experts are held back for one bucket, in an order that knows nothing of replicas."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from megatron_smartmoe.adapter.moe.late_gradients import LateGradients


class Layers:
    """Three layers of one parameter each; writes down what is started and finished.

    Args:
        with_replicas: the layers that have gradients under way.
    """

    def __init__(self, with_replicas: tuple[int, ...] = (0, 1, 2)) -> None:
        self.log: list[str] = []
        spares = [SimpleNamespace(finish_returns=lambda index=index: self._finish(index)) for index in range(3)]
        self._under_way = set(with_replicas)
        self.late = LateGradients([((index,), spare) for index, spare in enumerate(spares)])  # type: ignore[misc]

    def _finish(self, index: int) -> None:
        if index in self._under_way:
            self._under_way.remove(index)
            self.log.append(f"finish {index}")

    def bucket(self, *parameters: int) -> Any:
        """A bucket group with the parameters of some layers; 9 is no expert."""
        return SimpleNamespace(params=set(parameters), name="+".join(map(str, parameters)))

    def ready(self, group: Any) -> None:
        """The last gradient of a bucket is there: Megatron starts its reduction."""
        self.late.register_grad_ready(lambda: self.start(group), group)

    def start(self, group: Any) -> None:
        """As the hooked method of Megatron does."""
        self.late.start_grad_sync(lambda: self.log.append(f"start {group.name}"), group)

    def wait(self, group: Any) -> None:
        """As the hooked method of Megatron does."""
        self.late.finish_grad_sync(lambda: self.log.append(f"wait {group.name}"), group)


def test_a_bucket_is_held_until_the_next_with_experts() -> None:
    layers = Layers()
    buckets = [layers.bucket(index) for index in (2, 1, 0)]
    dense = layers.bucket(9)
    for bucket in (buckets[0], dense, buckets[1], buckets[2]):
        layers.ready(bucket)
    assert layers.log == ["start 9", "finish 2", "start 2", "finish 1", "start 1"]
    layers.wait(dense)
    layers.wait(buckets[0])
    assert layers.log[5:] == ["finish 0", "start 0", "wait 9", "wait 2"]


@pytest.mark.parametrize("with_replicas", [(), (1,), (0, 1, 2)])
def test_the_order_does_not_depend_on_the_replicas(with_replicas: tuple[int, ...]) -> None:
    """Ranks that share experts have other replicas, and must start the same reductions in the same order."""
    layers = Layers(with_replicas)
    for index in (2, 1, 0):
        layers.ready(layers.bucket(index))
    layers.wait(layers.bucket(9))
    assert [line for line in layers.log if line.startswith("start")] == ["start 2", "start 1", "start 0"]


def test_what_is_not_overlapped_finishes_first() -> None:
    layers = Layers()
    layers.start(layers.bucket(0, 1, 2))  # one bucket, reduced behind the last backward pass
    assert layers.log == ["finish 2", "finish 1", "finish 0", "start 0+1+2"]


def test_a_start_that_waits_for_the_bucket_before_it() -> None:
    """`--reduce-scatter-with-fp32-accumulation`: it must not start those behind it."""
    layers = Layers()
    first, second = layers.bucket(2), layers.bucket(1)

    def start_second() -> None:
        layers.wait(first)
        layers.log.append("start 1")

    layers.ready(first)
    layers.late.register_grad_ready(lambda: layers.late.start_grad_sync(start_second, second), second)
    layers.ready(layers.bucket(0))
    assert layers.log == ["finish 2", "start 2", "finish 1", "wait 2", "start 1"]


def test_an_iteration_that_was_broken_off_starts_nothing_in_the_next() -> None:
    layers = Layers()
    layers.ready(layers.bucket(2))
    layers.late.forget()
    layers.wait(layers.bucket(9))
    assert layers.log == ["wait 9"]
