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
    "unknown": [PoolSetting(homes_interval=0, spare_slots=1, replicas="auto", overlap_degree=1)],
    "empty": [],
}
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
        says="--smartmoe-pool = 'auto': needs --smartmoe. Add --smartmoe, or leave it out.",
    ),
    "one rank": Case(
        flags="--smartmoe --smartmoe-pool auto",
        says="--smartmoe-pool = 'auto': needs expert parallelism: on one rank there is nothing to balance or to "
        "overlap. Pass --expert-model-parallel-size, or leave it out.",
    ),
    "nothing to choose": Case(
        flags=f"{LAUNCH} --smartmoe-homes off --smartmoe-pool auto",
        ranks=4,
        says="--smartmoe-pool = 'auto': leaves nothing to choose: homes stay, there are no spare slots and nothing is "
        "cut. Add --smartmoe-spare-slots 1 or --smartmoe-overlap-degree auto, or leave it out.",
    ),
    "an interval of nothing": Case(
        flags=f"{LAUNCH} --smartmoe-pool auto --smartmoe-pool-interval 0",
        ranks=4,
        says="--smartmoe-pool-interval = 0: must be at least 1. Leave it out for its default.",
    ),
    "prediction layers": Case(
        flags=f"{LAUNCH} --smartmoe-homes off --smartmoe-overlap-degree 2 --smartmoe-pool auto --mtp-num-layers 1",
        ranks=4,
        says="--mtp-num-layers = 1: does not go with --smartmoe-pool: layers of multi-token prediction share their "
        "numbers with others. Leave one of the two out.",
    ),
    "more slots than the launch": Case(
        flags=f"{FILE}/good.json",
        ranks=4,
        says="--smartmoe-pool, entry = 'homes100-K1-history-ov2': uses 1 spare slots, and --smartmoe-spare-slots is 0. "
        "Change the flag, or take the entry out of the file.",
    ),
    "more pieces than ranks": Case(
        flags=f"{FILE}/seven.json",
        ranks=4,
        says="--smartmoe-pool, entry = 'homes100-K0-off-ov7': cuts into 7 pieces: from 1 to 4, the expert-parallel "
        "ranks, are possible. Plan the pool for this launch, or take the entry out of the file.",
    ),
    "another interval": Case(
        flags=f"{FILE}/often.json",
        ranks=4,
        says="--smartmoe-pool, entry = 'homes50-K0-off-ov1': looks at the homes every 50 iterations, and the flags say "
        "--smartmoe-homes-interval 100. Change the flag, or take the entry out of the file.",
    ),
    "homes are off": Case(
        flags=f"{FILE}/often.json --smartmoe-homes off",
        ranks=4,
        says="--smartmoe-pool, entry = 'homes50-K0-off-ov1': looks at the homes every 50 iterations, and the flags say "
        "--smartmoe-homes off. Change the flag, or take the entry out of the file.",
    ),
    "copies without slots": Case(
        flags=f"{FILE}/slotless.json",
        ranks=4,
        says="--smartmoe-pool, entry = 'homes0-K0-exact-ov1': copies need spare slots, and spare slots copies: K0 goes "
        "with off. Plan the pool again.",
    ),
    "an unknown mode": Case(
        flags=f"{FILE}/unknown.json --smartmoe-spare-slots 1",
        ranks=4,
        says="--smartmoe-pool, entry = 'homes0-K1-auto-ov1': its replicas must be one of off, history, exact. Plan the "
        "pool again.",
    ),
    "no settings": Case(
        flags=f"{FILE}/empty.json",
        ranks=4,
        says=f"--smartmoe-pool = '{{data}}/empty.json': holds a pool without settings. {MAKE}",
    ),
    "no pool": Case(
        flags=f"{FILE}/other.json", ranks=4, says=f"--smartmoe-pool = '{{data}}/other.json': holds no pool. {MAKE}"
    ),
    "pieces that do not go with the rest": Case(
        flags=f"{FILE}/good.json --smartmoe-spare-slots 1 --overlap-moe-expert-parallel-comm --smartmoe-replicas off",
        ranks=4,
        says="--overlap-moe-expert-parallel-comm = True: does not go with --smartmoe-spare-slots: it runs two "
        "micro-batches of a layer at a time. Leave one of the two out.",
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
    from megatron_smartmoe.adapter.flags.pool_settings import pool_settings

    given: dict[str, Any] = {
        "smartmoe_pool": "auto",
        "smartmoe_homes": "off",
        "smartmoe_homes_interval": 100,
        "smartmoe_spare_slots": 0,
        "smartmoe_overlap_degree": "1",
        "expert_model_parallel_size": 16,
    }
    return [setting.key for setting in pool_settings(Namespace(**given | flags))]


def test_auto_is_what_the_launch_allows() -> None:
    assert keys(smartmoe_homes="on") == ["homes0-K0-off-ov1", "homes100-K0-off-ov1"]
    assert keys(smartmoe_spare_slots=2) == [
        "homes0-K0-off-ov1",
        "homes0-K1-history-ov1",
        "homes0-K1-exact-ov1",
        "homes0-K2-history-ov1",
        "homes0-K2-exact-ov1",
    ]
    pieces = {degree: [key[-1] for key in keys(smartmoe_overlap_degree=degree)] for degree in ("1", "3", "auto")}
    assert pieces == {"1": ["1"], "3": ["1", "2", "3", "4", "8"], "auto": ["1", "2", "4", "8"]}
    assert [key[-1] for key in keys(smartmoe_overlap_degree="auto", expert_model_parallel_size=6)] == ["1", "2", "4"]
    assert keys(smartmoe_pool=None) == []
