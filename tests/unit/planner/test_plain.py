"""A plan is never slower, in its own model, than plain Megatron; what it says of it is true."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_smartmoe.cli.plan_table import beside_plain
from megatron_smartmoe.errors import ConfigError
from megatron_smartmoe.planner.plain import plain_space, search_beside_plain
from megatron_smartmoe.planner.pricing import Pricing
from megatron_smartmoe.planner.search import Ranking, search, seconds_of
from megatron_smartmoe.planner.space import SpaceOptions
from tests.support.models import CLUSTER
from tests.unit.planner.cases import pricing

SPACE = SpaceOptions(micro_batches=(1, 2), spare_slots=(0, 1), overlap_degrees=(1, 2), max_virtual=2)


def with_memory(memory_bytes: float, skew: float) -> Pricing:
    return pricing(skew, cluster=replace(CLUSTER, gpu=replace(CLUSTER.gpu, memory_bytes=memory_bytes)))


@pytest.mark.parametrize("rank", ["expected", "worst"])
@pytest.mark.parametrize(
    ("memory_bytes", "skew", "is_plain"),
    [(24e9, 1.5, False), (24e9, 1.0, True), (8e9, 1.5, True), (7e9, 1.5, True)],
    ids=["enough memory", "even load", "only TransformerEngine's experts need little memory", "little memory"],
)
def test_never_slower_than_plain(memory_bytes: float, skew: float, is_plain: bool, rank: Ranking) -> None:
    prices = with_memory(memory_bytes, skew)
    result, plain = search_beside_plain(prices, 8, SPACE, limit=3, rank=rank)
    assert plain is not None
    assert not plain.spec.smartmoe
    alone = [search(prices, 8, space, limit=1, rank=rank).best[0] for space in (SPACE, plain_space(SPACE))]
    seconds = [seconds_of(one, rank) for one in result.best]
    assert seconds == sorted(seconds)
    assert len(seconds) == 3
    assert seconds[0] == min(seconds_of(one, rank) for one in alone)
    assert (result.best[0] is plain) == is_plain
    assert ("1 is plain" in beside_plain(result.best[0], plain, rank)) == is_plain


def test_nothing_fits_either_way() -> None:
    with pytest.raises(ConfigError, match="no launch fits"):
        search_beside_plain(with_memory(2e9, 1.5), 8, SPACE)
    assert beside_plain(search(pricing(), 8, SPACE).best[0], None, "expected").endswith("does not fit on these GPUs")
