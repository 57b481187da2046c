"""Watchdogs of two nodes meet in a store; what each of them gets to know, and what it does when the store is gone."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from datetime import timedelta

import pytest
import torch.distributed as dist

from megatron_smartmoe.runtime.watchdog import nodes as nodes_module
from megatron_smartmoe.runtime.watchdog.nodes import Address, Nodes
from tests.support.progress import report


@pytest.fixture
def address(monkeypatch: pytest.MonkeyPatch) -> Iterator[Address]:
    monkeypatch.setattr(nodes_module, "_PERIOD_S", 0.05)
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, timeout=timedelta(seconds=5), wait_for_workers=False)
    yield Address(host="127.0.0.1", port=store.port)
    del store


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_node_0_gets_reports_and_the_others_its_verdict(address: Address) -> None:
    pair = [Nodes(address, node=node, num_nodes=3) for node in range(2)]
    first, second = pair
    assert first.num_unheard == 2
    for node in pair:
        node.start()
    try:
        second.publish([report(4, {7: 12}, node=1), report(5, node=1)])
        wait_until(lambda: len(first.others()) == 2)
        assert first.num_unheard == 1
        assert [other.progress.rank for other in first.others()] == [4, 5]
        assert first.others()[0].progress.groups[7].posted == 12
        assert first.others()[0].silent_s < 20
        assert second.named is None
        first.name(1, 5)
        wait_until(lambda: second.named == (1, 5))
        assert not first.is_cut_off
        assert not second.is_cut_off
    finally:
        for node in pair:
            node.stop()


def test_a_silent_nodes_report_ages(address: Address) -> None:
    first, second = (Nodes(address, node=node, num_nodes=2) for node in range(2))
    first.start()
    second.start()
    second.publish([report(4, node=1)])
    wait_until(first.others)
    second.stop()
    try:
        wait_until(lambda: first.others()[0].silent_s > 0.5)
        assert first.others()[0].progress.still_s > 19.5  # it was 19 s when it was sent
    finally:
        first.stop()


def test_a_store_that_does_not_exist_cuts_a_node_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nodes_module, "_TIMEOUT_S", 0.2)
    node = Nodes(Address(host="127.0.0.1", port=1), node=1, num_nodes=2)
    node.start()
    try:
        wait_until(lambda: node.is_cut_off)
        assert node.others() == []
    finally:
        node.stop()
