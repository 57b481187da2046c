"""The pool: every switchable setting priced, saved, read back; a switch needs a margin and a pause."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_smartmoe.errors import ConfigError
from megatron_smartmoe.planner.pool import Pool, PoolSetting, choose, make_pool
from megatron_smartmoe.planner.space import SpaceOptions
from megatron_smartmoe.spec.parallel import ParallelSpec, Replicas
from tests.support.models import SMALL
from tests.unit.planner.cases import pricing

SPEC = ParallelSpec(
    gpus=8, ep=4, pp=2, global_batch=64, spare_slots=1, replicas="history", homes_interval=100, micro_batch=2
)
OFF = PoolSetting(homes_interval=0, spare_slots=0, replicas="off", overlap_degree=1)
ON = replace(OFF, spare_slots=1, replicas="history")


@pytest.fixture(scope="module")
def pool() -> Pool:
    prices = pricing(5.0)
    return make_pool(prices.price(SPEC), prices, SpaceOptions())


def test_it_holds_every_setting_once_fastest_first(pool: Pool) -> None:
    settings = [entry.setting for entry in pool.entries]
    assert len(set(settings)) == len(settings) == 2 * 4 * 3  # intervals x (off, history, exact, auto) x degrees
    seconds = [entry.expected_s for entry in pool.entries]
    assert seconds == sorted(seconds)


def test_the_plans_own_setting_has_the_plans_price(pool: Pool) -> None:
    own = PoolSetting(homes_interval=100, spare_slots=1, replicas="history", overlap_degree=1)
    price = next(entry.expected_s for entry in pool.entries if entry.setting == own)
    assert price == pytest.approx(pricing(5.0).price(SPEC).expected_s)


@pytest.mark.parametrize("mode", ["history", "exact"])
def test_replicas_that_do_not_pay_are_not_priced(mode: Replicas) -> None:
    """A few tokens a micro-batch: training would make no replica, so a launch with spare slots costs no more."""
    bare = replace(SPEC, pp=1, homes_interval=0, spare_slots=0, replicas="off", micro_batch=1, global_batch=8)
    with_slots = replace(bare, spare_slots=1, replicas=mode)
    few = pricing(5.0, model=replace(SMALL, seq_length=8))
    assert few.price(with_slots).expected_s == pytest.approx(few.price(bare).expected_s)
    many = pricing(5.0, model=replace(SMALL, seq_length=4096))
    assert many.price(with_slots).expected_s < many.price(bare).expected_s


def test_it_reads_back_what_it_saved(pool: Pool, tmp_path: Path) -> None:
    pool.save(tmp_path / "pool.json")
    assert Pool.from_json(json.loads((tmp_path / "pool.json").read_text())) == pool


def test_another_version_is_refused(pool: Pool) -> None:
    with pytest.raises(ConfigError, match=r"must be 1\. Write the pool again with smartmoe plan --pool FILE"):
        Pool.from_json({**pool.to_json(), "version": 2})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"setting": {"homes_interval": 1.5}}, "setting.homes_interval = 1.5: must be a whole number"),
        ({"setting": {"replicas": "some"}}, "setting.replicas = 'some': must be one of off, history, exact, auto"),
        ({"setting": {"extra": 1}}, "setting.extra = 1: is not a known key"),
        ({"scenario_s": {"a": "1"}}, "scenario_s.a = '1': must be a number"),
        ({"expected_s": -1}, "expected_s = -1: must be a number of at least 0"),
        ({"expected_s": None}, "expected_s = None: must be a number"),
    ],
)
def test_a_damaged_entry_is_named(pool: Pool, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    content = pool.to_json()
    for key, value in changes.items():
        entry = content["entries"][2]
        entry[key] = {**entry[key], **value} if isinstance(value, dict) else value
    path = tmp_path / "pool.json"
    path.write_text(json.dumps({"pool": content}))
    with pytest.raises(ConfigError) as caught:
        Pool.load(path, "--smartmoe-pool")
    assert str(caught.value).startswith(f"{path}: pool.entries[2].{message}")


@pytest.mark.parametrize("text", ["{", "[" * 100_000, '{"pool": NaN}', "[]"])
def test_a_file_that_is_no_object_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "pool.json").write_text(text)
    with pytest.raises(ConfigError, match=r"pool\.json"):
        Pool.load(tmp_path / "pool.json", "--smartmoe-pool")


def test_it_switches_for_more_than_the_margin() -> None:
    switch = choose(OFF, {OFF: 1.0, ON: 0.9}, measured_s=1.1, since_switch=50)
    assert switch.switched
    assert switch.setting == ON
    assert switch.why == (
        "homes0-K0-off-ov1: measured 1.100 s per step; homes0-K1-history-ov1: predicted 0.990 s (10.0% less)"
    )


@pytest.mark.parametrize(
    ("other_s", "since", "why"),
    [
        (0.99, 50, "is predicted to save 1.0%, below 2%"),
        (0.5, 3, "3 iterations since the last switch, 20 are needed"),
        (1.2, 50, "no other setting is predicted to be faster"),
    ],
)
def test_it_stays(other_s: float, since: int, why: str) -> None:
    switch = choose(OFF, {OFF: 1.0, ON: other_s}, measured_s=1.0, since_switch=since)
    assert not switch.switched
    assert switch.setting == OFF
    assert why in switch.why


def test_of_equals_it_takes_the_one_that_changes_least() -> None:
    """Whether homes move is no matter of the copies; without this the name would decide."""
    now, both = replace(ON, homes_interval=100), OFF
    copies_alone = replace(OFF, homes_interval=100)
    switch = choose(now, {now: 1.0, both: 0.8999, copies_alone: 0.9}, measured_s=1.0, since_switch=50)
    assert switch.setting == copies_alone
    clearly = choose(now, {now: 1.0, both: 0.89, copies_alone: 0.9}, measured_s=1.0, since_switch=50)
    assert clearly.setting == both
    assert not choose(now, {now: 1.0, both: 0.999}, measured_s=1.0, since_switch=50, margin=0.0).switched
