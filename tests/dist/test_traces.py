"""Recording what a run routes, and forcing a run to route what was recorded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]

from megatron_smartmoe.cost.fitted import Count, Part
from megatron_smartmoe.report.account import read_steps
from megatron_smartmoe.spec.trace import RoutingTrace, load_trace
from tests.support.training import train

pytestmark = pytest.mark.dist

EP2 = "--expert-model-parallel-size 2".split()
PP2 = "--pipeline-model-parallel-size 2".split()
TOKENS = 64 * 4  # sequence length x global batch of the tiny model
TOP_K = 2


@pytest.fixture(scope="module")
def stock_trace(tmp_path_factory: pytest.TempPathFactory, data_flags: list[str]) -> Path:
    """Routing trace of a stock run at EP2 x PP2: 3 iterations, 4 layers on two stages, 2 source ranks."""
    folder = tmp_path_factory.mktemp("trace")
    record = ["--smartmoe-record-trace", str(folder / "trace.npz")]
    board = ["--tensorboard-dir", str(folder / "tensorboard")]
    train(folder, 4, data_flags, *EP2, *PP2, *record, *board, iterations=3)
    return folder / "trace.npz"


def summary_of(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "summary.json").read_text())
    return found


@pytest.mark.fast
def test_every_layer_rank_and_iteration_is_recorded(stock_trace: Path) -> None:
    trace = load_trace(stock_trace)
    assert trace.counts.shape == (3, 4, 2, 8)
    assert trace.iteration.tolist() == [1, 2, 3]
    assert trace.layer.tolist() == [0, 1, 2, 3]
    assert trace.meta["top_k"] == TOP_K
    assert (trace.counts.sum(axis=-1) == TOKENS // 2 * TOP_K).all()
    assert len({trace.counts[0, layer].tobytes() for layer in range(4)}) == 4


def test_every_rank_and_iteration_is_accounted_for(stock_trace: Path) -> None:
    found = read_steps(stock_trace.parent)
    assert found is not None
    record, counts = found.record, load_trace(stock_trace).counts
    assert record.basis == "cpu"
    assert record.stage_R.tolist() == [0, 0, 1, 1]
    assert record.iteration_N.tolist() == [1, 2, 3]
    rows_NLR = counts.sum(axis=2).reshape(3, 4, 2, 4).sum(axis=3)  # experts of two ranks
    assert np.array_equal(record.counts_NRC[:, :, Count.TOKENS], rows_NLR.reshape(3, 2, 2, 2).sum(axis=2).reshape(3, 4))
    assert (record.counts_NRC[:, :, Count.CALLS] == 2 * 2).all()  # layers of a stage, micro-batches
    assert (record.counts_NRC[:, :, Count.BUSIEST_TOKENS] >= record.counts_NRC[:, :, Count.TOKENS]).all()
    assert (record.seconds_NRP[:, :, [Part.OUTSIDE, Part.DISPATCH, Part.EXPERTS]] > 0).all()
    assert not record.seconds_NRP[:, :, [Part.REPLICAS, Part.MIGRATION]].any()
    summary = summary_of(stock_trace.parent)
    assert summary["account"]["step_s"] == pytest.approx(record.step_NR.max(axis=1).mean(), rel=1e-3)
    assert 0 < summary["mfu"] < 1
    assert 0 < summary["memory"]["peak_bytes"] < summary["memory"]["limit_bytes"]
    assert "smartmoe: iteration        3 | step " in (stock_trace.parent / "ranks" / "rank0.log").read_text()


def test_the_account_is_written_to_tensorboard(stock_trace: Path) -> None:
    events = EventAccumulator(str(stock_trace.parent / "tensorboard"))
    events.Reload()
    scalars = events.Tags()["scalars"]
    for name in ("step (ms)", "MFU", "dead experts", "account/residual imbalance (ms)"):
        assert f"smartmoe/{name}" in scalars
    assert "smartmoe/max over mean tokens per rank, p95/layer 4" in scalars
    assert "smartmoe/tokens per expert/layer 1" in events.Tags()["histograms"]


def test_smartmoe_routes_what_stock_megatron_routes(stock_trace: Path, tmp_path: Path, data_flags: list[str]) -> None:
    record = ["--smartmoe-record-trace", str(tmp_path / "trace.npz"), "--smartmoe"]
    ideal = ["--smartmoe-ideal-run", str(stock_trace.parent)]  # as if that run were force-balanced
    train(tmp_path, 4, data_flags, *EP2, *PP2, *record, *ideal, iterations=3)
    assert np.array_equal(load_trace(tmp_path / "trace.npz").counts, load_trace(stock_trace).counts)
    account = summary_of(tmp_path)["account"]
    assert account["ideal_s"] == pytest.approx(summary_of(stock_trace.parent)["account"]["step_s"], rel=1e-3)
    assert account["share_of_ideal"] > 0
    assert isinstance(account["unexplained_share"], float)
    assert "  share of ideal   " in (tmp_path / "ranks" / "rank0.log").read_text()


DENSE_FIRST = "--moe-layer-freq ([0]*1+[1]*3) --mtp-num-layers 1".split()  # 4 layers with experts again


@pytest.mark.parametrize(
    "flags", [[], ["--smartmoe", *DENSE_FIRST]], ids=["stock", "smartmoe, dense first layer, prediction block"]
)
def test_a_replay_routes_what_was_recorded(tmp_path: Path, data_flags: list[str], flags: list[str]) -> None:
    counts = np.random.default_rng(0).dirichlet(np.full(8, 0.5), size=(3, 4, 2))
    wanted = np.round(counts * 10_000).astype(np.uint32)
    trace = RoutingTrace(counts=wanted, iteration=np.arange(3), layer=np.arange(4))
    trace.save(tmp_path / "wanted.npz")
    files = ["--smartmoe-replay-trace", str(tmp_path / "wanted.npz"), "--smartmoe-record-trace", "{}"]
    files[-1] = str(tmp_path / "got.npz")
    train(tmp_path, 2, data_flags, *EP2, *files, *flags, iterations=3)
    got = load_trace(tmp_path / "got.npz").counts.astype(np.int64)
    assert (got.sum(axis=-1) == TOKENS // 2 * TOP_K).all()
    share = np.minimum(wanted / wanted.sum(axis=-1, keepdims=True), 1 / TOP_K)
    small = wanted.max(axis=-1, keepdims=True) / wanted.sum(axis=-1, keepdims=True) < 1 / TOP_K
    micro_batches = 2  # each is rounded for itself
    assert (np.abs(got - share * TOKENS // 2 * TOP_K) <= micro_batches)[np.broadcast_to(small, got.shape)].all()
    log = (tmp_path / "ranks" / "rank0.log").read_text()
    assert "WARNING: --smartmoe-replay-trace" in log
