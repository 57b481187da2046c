"""Moving experts changes nothing but where they live: not the losses, not a weight, not a moment."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_smartmoe.runtime.decisions.command import main as replay
from tests.dist.test_smartmoe_layer import EP2, UNCLIPPED
from tests.support.checkpoints import different, tensors
from tests.support.marks import some_fast
from tests.support.training import losses, metrics, train, two_layers

pytestmark = pytest.mark.dist

PP2 = "--pipeline-model-parallel-size 2"
DISTRIBUTED = "--use-distributed-optimizer --dist-ckpt-optim-fully-reshardable"
OVERLAP = f"{DISTRIBUTED} --overlap-grad-reduce --overlap-param-gather"
MIXES = {
    "EP2": (2, EP2),
    "EP2, bf16": (2, f"{EP2} --bf16"),
    "EP2xEDP2, distributed optimizer, bf16": (4, f"{EP2} {DISTRIBUTED} --bf16"),
    "EP2xEDP2, overlapped": (4, f"{EP2} {OVERLAP}"),
    "PP2xVPP2xEP2, prediction blocks": (
        4,
        f"{PP2} --num-layers-per-virtual-pipeline-stage 1 {EP2} --mtp-num-layers 1",
    ),
    "PP2xVPP2xEP2, a chunk without experts": (
        4,
        f"{PP2} --num-layers-per-virtual-pipeline-stage 1 {EP2} --moe-layer-freq ([0]*1+[1]*3)",
    ),
    "ETP2xEP2": (4, f"--tensor-model-parallel-size 2 --sequence-parallel {EP2}"),
    "EP2, full recompute, interleaved gates": (
        2,
        f"{EP2} --recompute-granularity full --recompute-method uniform --recompute-num-layers 1 "
        "--moe-mlp-glu-interleave-size 16",
    ),
}
SHUFFLE = "--smartmoe --smartmoe-homes shuffle --smartmoe-homes-interval 2".split()
STAY = "--smartmoe --smartmoe-homes off".split()


def decisions(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "smartmoe.jsonl").read_text().splitlines()]


def compare(root: Path, world_size: int, data_flags: list[str], flags: str, iterations: int, every: int) -> int:
    """Train with and without forced migrations; everything must be equal. Returns the number of migrations."""
    runs = {"shuffled": [*SHUFFLE, "--smartmoe-homes-interval", str(every)], "stayed": STAY}
    for name, homes in runs.items():
        save = ["--save", str(root / name / "saved"), "--save-interval", str(iterations)]
        everything = [*flags.split(), *two_layers(flags), *UNCLIPPED, *homes, *save]
        train(root / name, world_size, data_flags, *everything, iterations=iterations)
    assert losses(root / "shuffled") == losses(root / "stayed")
    saved = {name: tensors(root / name / "saved", iterations) for name in runs}
    assert not different(saved["shuffled"], saved["stayed"])
    assert any("exp_avg_sq" in name and "experts" in name for name in saved["stayed"])
    return len(decisions(root / "shuffled"))


@pytest.mark.parametrize("mix", some_fast(MIXES, "EP2, bf16"))
def test_random_migrations_change_nothing(mix: str, tmp_path: Path, data_flags: list[str]) -> None:
    world_size, flags = MIXES[mix]
    assert compare(tmp_path, world_size, data_flags, flags, iterations=6, every=2) == 2


@pytest.mark.parametrize("steps", [10, pytest.param(200, marks=pytest.mark.long)])
def test_a_migration_every_5_steps(steps: int, tmp_path: Path, data_flags: list[str]) -> None:
    flags = f"{PP2} {EP2} {OVERLAP} --global-batch-size 4"
    assert compare(tmp_path, 8, data_flags, flags, iterations=steps, every=5) == steps // 5 - 1


BACKGROUND = "--async-save --use-persistent-ckpt-worker --async-strategy mcore".split()


def test_resuming_restores_the_placement(tmp_path: Path, data_flags: list[str]) -> None:
    """Saved after a migration, killed, resumed: the placement is restored, and the losses are the same."""
    flags = [*EP2.split(), *DISTRIBUTED.split(), *UNCLIPPED, *SHUFFLE]
    save = ["--save", str(tmp_path / "saved"), "--save-interval", "4"]
    whole = train(tmp_path / "whole", 4, data_flags, *flags, *save, iterations=8)
    (tmp_path / "saved" / "latest_checkpointed_iteration.txt").write_text("4")
    resumed = train(tmp_path / "resumed", 4, data_flags, *flags, "--load", str(tmp_path / "saved"), iterations=8)
    assert resumed == whole[4:]
    assert "restored expert placement from checkpoint" in (tmp_path / "resumed" / "ranks" / "rank0.log").read_text()
    left = next(decision["before"] for decision in decisions(tmp_path / "whole") if decision["iteration"] > 4)
    assert decisions(tmp_path / "resumed")[0]["before"] == left


@pytest.mark.parametrize("raw", [False, True])
def test_an_asynchronous_save_while_a_migration_is_due(raw: bool, tmp_path: Path, data_flags: list[str]) -> None:
    """Experts move after the same step that is saved, while the checkpoint is still being written.

    A run that has saved raw buffers, as was the default once, resumes with today's default.
    """
    flags = [*EP2.split(), "--use-distributed-optimizer", "--bf16", *UNCLIPPED, *SHUFFLE]
    save = ["--save", str(tmp_path / "saved"), "--save-interval", "4", *BACKGROUND]
    save += ["--no-dist-ckpt-optim-fully-reshardable"] if raw else []
    whole = train(tmp_path / "whole", 2, data_flags, *flags, *save, iterations=6)
    (tmp_path / "saved" / "latest_checkpointed_iteration.txt").write_text("4")
    load = ["--load", str(tmp_path / "saved"), "--save", str(tmp_path / "more"), "--save-interval", "4"]
    resumed = train(tmp_path / "resumed", 2, data_flags, *flags, *load, iterations=6)
    assert resumed == whole[4:]
    default = "smartmoe: default --dist-ckpt-optim-fully-reshardable   (optimizer state is saved by parameter"
    assert default in (tmp_path / "resumed" / "ranks" / "rank0.log").read_text()


def test_raw_optimizer_buffers_are_saved_at_home(tmp_path: Path, data_flags: list[str]) -> None:
    """dp_reshardable checkpoints hold raw buffers: experts go back to their first homes for the save, and return."""
    optimizer = "--use-distributed-optimizer --no-dist-ckpt-optim-fully-reshardable --bf16".split()
    flags = [*EP2.split(), *optimizer, *UNCLIPPED]  # Megatron cannot load these in fp32
    save = ["--save", str(tmp_path / "saved"), "--save-interval", "4"]
    shuffled = train(tmp_path / "shuffled", 4, data_flags, *flags, *SHUFFLE, *save, iterations=8)
    assert shuffled == train(tmp_path / "stayed", 4, data_flags, *flags, *STAY, iterations=8)
    (tmp_path / "saved" / "latest_checkpointed_iteration.txt").write_text("4")
    load = ["--load", str(tmp_path / "saved")]
    resumed = train(tmp_path / "resumed", 4, data_flags, *flags, *STAY, *load, iterations=8)
    assert resumed == shuffled[4:]


def test_a_dry_run_decides_and_moves_nothing(tmp_path: Path, data_flags: list[str]) -> None:
    """Prices at which moving always pays: `on` moves, `dry` says that it would."""
    cheap = ["--smartmoe-homes-interval", "2", "--smartmoe-homes-horizon", "1000000", "--smartmoe"]
    flags = [*EP2.split(), *UNCLIPPED, *cheap]
    runs = {
        mode: train(tmp_path / mode, 2, data_flags, *flags, "--smartmoe-homes", mode, iterations=8)
        for mode in ("on", "dry", "off")
    }
    assert runs["on"] == runs["dry"] == runs["off"]
    log = {mode: (tmp_path / mode / "ranks" / "rank0.log").read_text() for mode in runs}
    assert " experts moved | max/mean tokens per rank" in log["on"]
    assert " experts would move | max/mean tokens per rank" in log["dry"]
    assert " experts moved |" not in log["dry"]
    first = decisions(tmp_path / "on")[0]
    assert first["taken"]
    assert first["why"].startswith("pays: ")
    assert first["moved_bytes"] > 0
    assert not (tmp_path / "off" / "smartmoe.jsonl").exists()


def test_a_move_that_does_not_pay_is_refused(tmp_path: Path, data_flags: list[str]) -> None:
    dear = ["--smartmoe-homes-interval", "2", "--smartmoe-homes-margin", "1e9", "--smartmoe"]
    train(tmp_path, 2, data_flags, *EP2.split(), *dear, iterations=6)
    assert not (tmp_path / "smartmoe.jsonl").exists() or not any(d["moved_bytes"] for d in decisions(tmp_path))


def test_too_little_staging_memory_stops_the_move_not_the_training(tmp_path: Path, data_flags: list[str]) -> None:
    wide = ["--moe-ffn-hidden-size", "2048", "--smartmoe-migration-staging-mib", "7"]  # for one expert
    flags = [*EP2.split(), *UNCLIPPED, *wide]
    recorded = ["--smartmoe-record-trace", str(tmp_path / "trace.npz")]
    moved = train(tmp_path / "moved", 2, data_flags, *flags, *SHUFFLE, *recorded, iterations=4)
    assert moved == train(tmp_path / "stayed", 2, data_flags, *flags, *STAY, iterations=4)
    log = (tmp_path / "moved" / "ranks" / "rank0.log").read_text()
    assert "--smartmoe-migration-staging-mib" in log
    assert "WARNING" in log
    assert len(metrics(tmp_path / "moved")) == 4
    assert decisions(tmp_path / "moved")[0]["failure"]
    assert replay([str(tmp_path / "moved")]) == 0  # the failure is known from the log
