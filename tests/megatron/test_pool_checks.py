"""`--smartmoe-pool`: what is refused, with its whole text, and what `auto` stands for."""

from __future__ import annotations

import json
from argparse import Namespace
from dataclasses import asdict
from typing import Any

import pytest

from megatron_smartmoe.planner.pool import PoolSetting
from tests.support.checks import Case, said_of

LAUNCH = "--smartmoe --expert-model-parallel-size 4"
FILE = f"{LAUNCH} --smartmoe-pool {{data}}"
GOOD = PoolSetting(homes_interval=100, spare_slots=1, replicas="history", overlap_degree=2)
FILES = {
    "good": [GOOD],
    "seven": [PoolSetting(homes_interval=100, spare_slots=0, replicas="off", overlap_degree=7)],
    "often": [PoolSetting(homes_interval=50, spare_slots=0, replicas="off", overlap_degree=1)],
    "slotless": [PoolSetting(homes_interval=0, spare_slots=0, replicas="exact", overlap_degree=1)],
    "empty": [],
}
AGAIN = "Write the file again with smartmoe plan --pool FILE."
MAKE = "Make one with smartmoe plan --pool FILE, or pass auto."
CASES = {
    "all well": Case(flags=f"{FILE}/good.json --smartmoe-spare-slots 2", ranks=4, verdict=True),
    "all well, in a plan": Case(flags=f"{FILE}/plan.json --smartmoe-spare-slots 2", ranks=4),
    "auto": Case(flags=f"{LAUNCH} --smartmoe-pool auto", ranks=4),
    "auto with everything": Case(
        flags=f"{LAUNCH} --smartmoe-pool auto --smartmoe-spare-slots 1 --smartmoe-overlap-degree auto",
        ranks=4,
        verdict=True,
    ),
    "without --smartmoe": Case(
        flags="--smartmoe-pool auto",
        says="--smartmoe-pool = 'auto': needs --smartmoe. Add --smartmoe, or remove it.",
    ),
    "one rank": Case(
        flags="--smartmoe --smartmoe-pool auto",
        says="--smartmoe-pool = 'auto': needs expert parallelism: on one rank there is nothing to balance or to "
        "overlap. Pass --expert-model-parallel-size 2, for example, or remove it.",
    ),
    "nothing to choose": Case(
        flags=f"{LAUNCH} --smartmoe-homes off --smartmoe-pool auto",
        ranks=4,
        says="--smartmoe-pool = 'auto': leaves nothing to choose: experts do not move, there are no spare slots, and "
        "nothing overlaps. Add --smartmoe-spare-slots 1 or --smartmoe-overlap-degree auto, or remove it.",
    ),
    "an interval of nothing": Case(
        flags=f"{LAUNCH} --smartmoe-pool auto --smartmoe-pool-interval 0",
        ranks=4,
        says="--smartmoe-pool-interval = 0: must be at least 1. The default is 100.",
    ),
    "prediction layers": Case(
        flags=f"{LAUNCH} --smartmoe-homes off --smartmoe-overlap-degree 2 --smartmoe-pool auto --mtp-num-layers 1",
        ranks=4,
        verdict=True,
    ),
    "more slots than the launch": Case(
        flags=f"{FILE}/good.json",
        ranks=4,
        says="--smartmoe-pool, entry = 'homes100-K1-history-ov2': uses 1 spare slot, and --smartmoe-spare-slots is 0. "
        "Change the flag, or remove the entry from the file.",
    ),
    "more pieces than ranks": Case(
        flags=f"{FILE}/seven.json",
        ranks=4,
        says="--smartmoe-pool, entry = 'homes100-K0-off-ov7': its overlap degree 7 must be from 1 to 4, the "
        "expert-parallel ranks. Plan the pool for this launch, or remove the entry from the file.",
    ),
    "another interval": Case(
        flags=f"{FILE}/often.json",
        ranks=4,
        says="--smartmoe-pool, entry = 'homes50-K0-off-ov1': re-evaluates expert placement every 50 iterations, and "
        "--smartmoe-homes-interval is 100. Change the flag, or remove the entry from the file.",
    ),
    "homes are off": Case(
        flags=f"{FILE}/often.json --smartmoe-homes off",
        ranks=4,
        says="--smartmoe-pool, entry = 'homes50-K0-off-ov1': re-evaluates expert placement every 50 iterations, and "
        "--smartmoe-homes is off. Change the flag, or remove the entry from the file.",
    ),
    "copies without slots": Case(
        flags=f"{FILE}/slotless.json",
        ranks=4,
        says="--smartmoe-pool, entry = 'homes0-K0-exact-ov1': spare_slots = 0 requires replicas = off, and > 0 "
        f"requires auto, history or exact. {AGAIN}",
    ),
    "no settings": Case(
        flags=f"{FILE}/empty.json",
        ranks=4,
        says=f"--smartmoe-pool = '{{data}}/empty.json': contains a pool without settings. {MAKE}",
    ),
    "no pool": Case(
        flags=f"{FILE}/other.json",
        ranks=4,
        says=f"--smartmoe-pool = '{{data}}/other.json': does not contain a pool. {MAKE}",
    ),
    "pieces that do not go with the rest": Case(
        flags=f"{FILE}/good.json --smartmoe-spare-slots 1 --overlap-moe-expert-parallel-comm --smartmoe-replicas off",
        ranks=4,
        says="--overlap-moe-expert-parallel-comm = True: is not supported with --smartmoe-overlap-degree: it overlaps "
        "the same all-to-alls with another micro-batch. Remove one of the two.",
    ),
}


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str | None]:
    data = tmp_path_factory.mktemp("pools")
    for name, settings in FILES.items():
        entries = [{"setting": asdict(setting), "scenario_s": {"even": 1.0}, "expected_s": 1.0} for setting in settings]
        content: dict[str, Any] = {"version": 1, "launch": "a test's", "entries": entries}
        (data / f"{name}.json").write_text(json.dumps(content))
        if name == "good":
            (data / "plan.json").write_text(json.dumps({"version": 1, "pool": content}))
    (data / "other.json").write_text(json.dumps({"version": 1, "pool": None}))
    return said_of(CASES, data)


@pytest.mark.dist
@pytest.mark.fast
@pytest.mark.parametrize("name", CASES)
def test_each_rule_says_field_value_rule_and_way_out(name: str, said: dict[str, str | None]) -> None:
    assert said[name] == CASES[name].says


def keys(**flags: Any) -> list[str]:
    from megatron_smartmoe.adapter.flags.pool_settings import settings_of_pool

    given: dict[str, Any] = {
        "smartmoe_pool": "auto",
        "smartmoe_homes": "off",
        "smartmoe_homes_interval": 100,
        "smartmoe_spare_slots": 0,
        "smartmoe_overlap_degree": "1",
        "expert_model_parallel_size": 16,
    }
    return [setting.key for setting in settings_of_pool(Namespace(**given | flags))]


def test_auto_is_what_the_launch_allows() -> None:
    assert keys(smartmoe_homes="on") == ["homes0-K0-off-ov1", "homes100-K0-off-ov1"]
    assert keys(smartmoe_spare_slots=2) == [
        "homes0-K0-off-ov1",
        "homes0-K1-history-ov1",
        "homes0-K1-exact-ov1",
        "homes0-K1-auto-ov1",
        "homes0-K2-history-ov1",
        "homes0-K2-exact-ov1",
        "homes0-K2-auto-ov1",
    ]
    pieces = {degree: [key[-1] for key in keys(smartmoe_overlap_degree=degree)] for degree in ("1", "3", "auto")}
    assert pieces == {"1": ["1"], "3": ["1", "2", "3", "4", "8"], "auto": ["1", "2", "4", "8"]}
    assert [key[-1] for key in keys(smartmoe_overlap_degree="auto", expert_model_parallel_size=6)] == ["1", "2", "4"]
    assert keys(smartmoe_pool=None) == []
