"""Every decision of real runs is made again, to the digest: of one with `auto`, one that resumes, one with the pool."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_smartmoe.cli.main import main as smartmoe
from megatron_smartmoe.errors import ConfigError
from megatron_smartmoe.runtime.decisions.command import main
from megatron_smartmoe.spec.trace import load_trace
from tests.dist.test_homes import decisions
from tests.dist.test_smartmoe_layer import EP2
from tests.support.homes import train_with_hot_experts

pytestmark = pytest.mark.dist

MOVES = "--smartmoe --smartmoe-homes-interval 3 --smartmoe-homes-margin 1 --smartmoe-homes-horizon 100000"
SLOTS = "--smartmoe-spare-slots 1 --smartmoe-replicas-margin 0"
HOT = 3  # experts of rank 0 that one replica cannot make up for
SAVED_AT, STOPPED_AT, ENDED_AT = 10, 14, 18  # a move at 10 is under review when the run is saved


def flags(run_dir: Path) -> list[str]:
    trace = ["--smartmoe-record-trace", str(run_dir / "trace.npz"), "--smartmoe-record-micro-batches"]
    return [*EP2.split(), *MOVES.split(), *SLOTS.split(), *trace]


def saving(run_dir: Path) -> list[str]:
    folder = str(run_dir / "checkpoints")
    return ["--save", folder, "--load", folder, "--save-interval", str(SAVED_AT)]


@pytest.fixture(scope="module")
def auto_run(tmp_path_factory: pytest.TempPathFactory, data_flags: list[str]) -> Path:
    """Homes that move, and replicas from history and from counts; two micro-batches."""
    run_dir = tmp_path_factory.mktemp("auto")
    train_with_hot_experts(run_dir, 2, data_flags, *flags(run_dir), *saving(run_dir), iterations=STOPPED_AT, hot=HOT)
    return run_dir


@pytest.fixture(scope="module")
def resumed_run(auto_run: Path, tmp_path_factory: pytest.TempPathFactory, data_flags: list[str]) -> Path:
    """The same run, continued from the checkpoint before its last: some iterations are run again."""
    run_dir = tmp_path_factory.mktemp("resumed") / "run"
    shutil.copytree(auto_run, run_dir)
    checkpoints = run_dir / "checkpoints"
    (checkpoints / "latest_checkpointed_iteration.txt").write_text(str(SAVED_AT))
    shutil.rmtree(checkpoints / f"iter_{STOPPED_AT:07d}")
    longer = "--override-opt-param-scheduler"
    train_with_hot_experts(
        run_dir, 2, data_flags, *flags(run_dir), *saving(run_dir), longer, iterations=ENDED_AT, hot=HOT
    )
    return run_dir


@pytest.fixture(scope="module")
def pool_run(tmp_path_factory: pytest.TempPathFactory, data_flags: list[str]) -> Path:
    """A pool that switches and judges: memory so slow that reading the weights twice, for two chunks, is dear."""
    run_dir = tmp_path_factory.mktemp("pool")
    shipped = Path(__file__).parents[2] / "configs" / "clusters" / "cpu.yaml"
    cluster = run_dir / "cluster.yaml"
    cluster.write_text(shipped.read_text().replace("value: 26e9", "value: 26e6"))
    pool = "--smartmoe-pool auto --smartmoe-pool-interval 11 --smartmoe-overlap-degree 2 --global-batch-size 2"
    cluster_flag = ["--smartmoe-cluster", str(cluster)]
    train_with_hot_experts(
        run_dir, 2, data_flags, *flags(run_dir), *pool.split(), *cluster_flag, iterations=36, hot=HOT
    )
    return run_dir


@pytest.fixture(scope="module", params=["--pipeline-model-parallel-size 2", ""], ids=["PP2 x EP2", "EP2 x EDP2"])
def run_of_four(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, data_flags: list[str]
) -> Path:
    """Four ranks: two pipeline stages, or two expert-parallel groups that hold the same experts."""
    run_dir = tmp_path_factory.mktemp("four")
    train_with_hot_experts(run_dir, 4, data_flags, *flags(run_dir), *request.param.split(), iterations=14, hot=HOT)
    return run_dir


def replayed(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, Any]]:
    """Exit status and the printed JSON."""
    capsys.readouterr()
    status = main([str(run_dir), "--format", "json"])
    return status, json.loads(capsys.readouterr().out)


def kinds(found: dict[str, Any]) -> set[str]:
    return set(found["by_kind"])


def check_all(status: int, found: dict[str, Any]) -> None:
    assert found["first_difference"] is None
    assert (status, found["reproduced"]) == (0, found["decisions"])
    assert found["decisions"] > 0


def test_a_run_with_auto(auto_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, found = replayed(auto_run, capsys)
    check_all(status, found)
    assert {"homes", "review", "replicas", "replans"} <= kinds(found)
    assert found["iterations"] == [1, STOPPED_AT]
    logged = [path for path in auto_run.glob("*.jsonl") if path.name.startswith(("smartmoe", "replicas"))]
    assert found["decisions"] == sum(len(path.read_text().splitlines()) for path in logged)


def test_a_run_that_resumed(resumed_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = load_trace(resumed_run / "trace.npz")
    assert trace.iteration.tolist() == list(range(1, ENDED_AT + 1))  # continued, and nothing twice
    status, found = replayed(resumed_run, capsys)
    check_all(status, found)
    assert found["starts"] == [0, SAVED_AT]
    assert found["undone"] > 0  # of the iterations between the checkpoint and the end of the first start


def test_a_run_with_the_pool(pool_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, found = replayed(pool_run, capsys)
    check_all(status, found)
    assert {"pool", "stays"} <= kinds(found)
    switches = [one for one in decisions(pool_run) if one["kind"] == "pool"]
    assert switches[0]["taken"]
    assert switches[-1]["realised_gain_s"] is not None


def test_a_run_with_stages_or_several_groups(run_of_four: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, found = replayed(run_of_four, capsys)
    check_all(status, found)
    assert {"homes", "replicas", "replans"} <= kinds(found)
    logged = sorted(path for path in run_of_four.glob("*.jsonl") if path.name.startswith(("smartmoe", "replicas")))
    assert len(logged) == 1 + 2  # homes are decided once, replicas by each stage or group
    assert found["decisions"] == sum(len(path.read_text().splitlines()) for path in logged)


def test_what_was_changed_afterwards_is_not_reproduced(
    auto_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One digit of a digest in a log, a price of the start, a count of the trace."""
    for name in ("log", "price", "trace"):
        shutil.copytree(auto_run, tmp_path / name, ignore=shutil.ignore_patterns("checkpoints"))
    log = tmp_path / "log" / "replicas-stage0-group0.jsonl"
    first, *others = log.read_text().splitlines(keepends=True)
    changed = json.loads(first)
    changed["after"] = "0" * 16
    log.write_text("".join([json.dumps(changed) + "\n", *others]))
    start = next((tmp_path / "price" / "decisions").glob("start-*.json"))
    content = json.loads(start.read_text())
    content["homes"]["online"]["policy"]["horizon_iterations"] = 1
    start.write_text(json.dumps(content))
    trace = load_trace(auto_run / "trace.npz")
    trace.counts[4, 2, 0, 0] = trace.counts[4, 2, 0, 0, ::-1]
    trace.save(tmp_path / "trace" / "trace.npz")
    for name, log_name in (("log", log.name), ("price", "smartmoe.jsonl"), ("trace", None)):
        traced = ["--trace", str(tmp_path / name / "trace.npz")]
        assert main([str(tmp_path / name), *traced]) == 1, name
        text = capsys.readouterr().out
        assert "the first that differs: " in text
        assert log_name is None or f"({log_name})" in text
        assert "recorded " in text


def test_what_is_missing_is_named(auto_run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    trace = load_trace(auto_run / "trace.npz")
    summed = type(trace)(
        counts=trace.counts.sum(axis=3, dtype=np.uint32), iteration=trace.iteration, layer=trace.layer, meta=trace.meta
    )
    summed.save(tmp_path / "summed.npz")
    sampled = type(trace)(counts=trace.counts[::2], iteration=trace.iteration[::2], layer=trace.layer, meta=trace.meta)
    sampled.save(tmp_path / "sampled.npz")
    told = {
        "summed.npz": "--smartmoe-record-micro-batches",
        "sampled.npz": "lacks 6 of the 13 iterations 1 to 13, the first of them 2",
        "gone.npz": "the routing trace of the run is not there",
    }
    for name, says in told.items():
        with pytest.raises(ConfigError) as error:
            main([str(auto_run), "--trace", str(tmp_path / name)])
        assert says in str(error.value)
    shutil.copytree(auto_run, tmp_path / "without", ignore=shutil.ignore_patterns("decisions", "checkpoints"))
    assert smartmoe(["simulate", "--replay", str(tmp_path / "without")]) == 2
    assert "has no decisions/start-*.json" in capfd.readouterr().err


def test_a_decision_is_explained_with_its_candidates(auto_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = decisions(auto_run)
    move = next(line for line in lines if line["kind"] == "homes")
    assert len(json.dumps(move["candidates"])) < 1500
    parts = [one["compute_s"] + one["traffic_s"] + one["replicas_s"] for one in move["candidates"]]
    assert parts == pytest.approx([one["gain_s"] for one in move["candidates"]])
    assert smartmoe(["explain", str(auto_run), "--iteration", str(move["iteration"])]) == 0
    text = capsys.readouterr().out
    for row in ("inputs", "forecast", "candidates", "runner-up", "prices", "verdict", "outcome"):
        assert f"\n  {row:<10} " in text, row
    assert "turned out in iterations" in text
    replans = json.loads((auto_run / "replicas-stage0-group0.jsonl").read_text().splitlines()[0])
    assert replans["candidates"]
