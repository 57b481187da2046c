"""A run that switches between settings while it trains, trains what it would have trained without."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.dist.test_homes import decisions
from tests.dist.test_parallel_equality import largest_difference
from tests.dist.test_smartmoe_layer import EP2, UNCLIPPED
from tests.support.pool import train_switching
from tests.support.replicas import balance
from tests.support.training import train

pytestmark = pytest.mark.dist

TOLERANCE = 1e-5  # of losses, relative: copies and pieces add up an expert's gradient in another order
POOL = "--smartmoe --smartmoe-pool auto --smartmoe-pool-interval 2 --smartmoe-overlap-degree 2"
SLOTS = "--smartmoe-spare-slots 2 --smartmoe-replicas-margin 0"
MOVING = "--smartmoe-homes shuffle --smartmoe-homes-interval 3"
TURNS = [  # every kind of change, most of them there and back, some of them at once
    "homes3-K2-auto-ov2",
    "homes3-K2-history-ov1",
    "homes0-K2-auto-ov1",
    "homes0-K1-history-ov2",
    "homes3-K1-exact-ov2",
    "homes3-K2-exact-ov1",
    "homes3-K0-off-ov1",
    "homes0-K0-off-ov2",
    "homes3-K1-history-ov2",
    "homes3-K0-off-ov2",
    "homes0-K2-exact-ov2",
    "homes3-K2-history-ov1",
]


def test_switching_changes_no_loss(tmp_path: Path, data_flags: list[str]) -> None:
    iterations = 2 * len(TURNS) + 1
    common = [*EP2.split(), *UNCLIPPED, "--lr", "1e-4", "--global-batch-size", "4", "--num-layers", "2"]
    still = [*common, "--smartmoe", "--smartmoe-homes", "off"]
    expected = train(tmp_path / "still", 2, data_flags, *still, iterations=iterations)
    flags = [*common, *POOL.split(), *SLOTS.split(), *MOVING.split()]
    found = train_switching(tmp_path / "switched", 2, data_flags, *flags, iterations=iterations, settings=TURNS)
    assert largest_difference(found, expected) < TOLERANCE
    said = decisions(tmp_path / "switched")
    switches = [decision for decision in said if decision["kind"] == "pool"]
    assert [decision["after"] for decision in switches] == TURNS[1:]  # the first is what it started with
    assert [decision["iteration"] for decision in switches] == list(range(4, iterations, 2))
    _check_copies(balance(tmp_path / "switched"), dict(zip(range(2, iterations, 2), TURNS, strict=True)))
    _check_homes([decision["iteration"] for decision in said if decision["kind"] == "homes"])


def _check_copies(lines: list[dict[str, Any]], turns: dict[int, str]) -> None:
    """Each setting makes copies where it should, and no more than its slots hold."""
    ranks, layers_and_batches = 2, 2 * 2
    for line in lines:
        name = turns.get(line["iteration"] - 1 - (line["iteration"] - 1) % 2)
        if name is None:
            continue
        copies = [count for layer in line["copies"] for count in layer]
        assert len(copies) == layers_and_batches
        slots = int(name.split("-K")[1][0])
        assert max(copies) <= slots * ranks, f"iteration {line['iteration']}: {name}"
        assert (max(copies) > 0) == (slots > 0), f"iteration {line['iteration']}: {name}"


def _check_homes(iterations: list[int]) -> None:
    """Experts move after every third iteration, one late, and stay while the setting is a homes0."""
    stays = {at for turn, name in enumerate(TURNS) if name.startswith("homes0") for at in (2 * turn + 3, 2 * turn + 4)}
    due = set(range(4, 2 * len(TURNS) + 2, 3))
    assert stays & due
    assert set(iterations) == due - stays


def test_a_switch_is_logged(tmp_path: Path, data_flags: list[str]) -> None:
    """Memory so slow that reading the weights twice is dear: one piece must win. The run starts with two."""
    cluster = tmp_path / "cluster.yaml"
    shipped = Path(__file__).parents[2] / "configs" / "clusters" / "cpu.yaml"
    cluster.write_text(shipped.read_text().replace("value: 26e9", "value: 26e6"))
    flags = [*EP2.split(), *POOL.split(), "--smartmoe-homes", "off", "--smartmoe-cluster", str(cluster)]
    small = ["--num-layers", "2", "--global-batch-size", "2", "--smartmoe-pool-interval", "22"]
    train(tmp_path, 2, data_flags, *flags, *small, iterations=44)
    lines = [line for line in (tmp_path / "ranks" / "rank0.log").read_text().splitlines() if "pool" in line]
    assert lines[0] == ("smartmoe: pool: 2 settings, re-evaluated every 22 iterations, starting with homes0-K0-off-ov2")
    assert lines[1].startswith(
        " smartmoe: iteration       22 | pool: homes0-K0-off-ov2 -> homes0-K0-off-ov1 | homes0-K0-off-ov2: measured "
    )
    first, second = decisions(tmp_path)
    assert (first["iteration"], first["kind"], first["taken"]) == (22, "pool", True)
    assert first["predicted_gain_s"] > 0
    assert second["iteration"] == 44
    assert second["realised_gain_s"] is not None
    assert second["why"].startswith("reverted: " if second["taken"] else "kept: ")
    assert "pool" not in (tmp_path / "ranks" / "rank1.log").read_text()


@pytest.mark.fast
def test_a_file_names_the_settings(tmp_path: Path, data_flags: list[str]) -> None:
    """One entry, in a plan's JSON; and evaluations that change nothing for the same reason are logged once."""
    entry = {"homes_interval": 0, "spare_slots": 0, "replicas": "off", "overlap_degree": 1}
    entries = [{"setting": entry, "scenario_s": {}, "expected_s": 1.0}]
    pool = {"version": 1, "launch": "a test's", "entries": entries}
    (tmp_path / "plan.json").write_text(json.dumps({"pool": pool}))
    flags = [*EP2.split(), "--smartmoe", "--smartmoe-homes", "off", "--smartmoe-pool", str(tmp_path / "plan.json")]
    train(tmp_path, 2, data_flags, *flags, "--smartmoe-pool-interval", "2", iterations=8)
    lines = [line for line in (tmp_path / "ranks" / "rank0.log").read_text().splitlines() if "| pool" in line]
    assert lines == [
        " smartmoe: iteration        2 | pool: homes0-K0-off-ov1 stays | "
        "2 iterations since the last switch, 20 are needed |"
    ]
