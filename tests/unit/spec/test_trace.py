"""RoutingTrace: its file, its groups, Megatron's JSONL, and the synthetic kinds."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_smartmoe.errors import ConfigError, PlanError
from megatron_smartmoe.spec.trace import RoutingTrace, from_megatron, load_trace
from tests.support.synthetic import SyntheticSpec, synthetic_trace


def small(**changes: Any) -> RoutingTrace:
    given = {
        "counts": np.arange(2 * 3 * 4 * 8, dtype=np.uint16).reshape(2, 3, 4, 8),
        "iteration": np.array([1, 11]),
        "layer": np.array([0, 2, 4]),
        "meta": {"experts": 8, "top_k": 2, "source_ranks": 4, "source": "test"},
    }
    return RoutingTrace(**{**given, **changes})


def test_file_round_trip(tmp_path: Path) -> None:
    trace = small()
    trace.save(tmp_path / "t.npz")
    again = load_trace(tmp_path / "t.npz")
    assert np.array_equal(again.counts, trace.counts)
    assert again.iteration.tolist() == [1, 11]
    assert again.layer.tolist() == [0, 2, 4]
    assert again.meta["source"] == "test"
    assert again.meta["version"] == 1
    assert (again.num_records, again.num_layers, again.num_sources, again.num_experts) == (2, 3, 4, 8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"counts": np.zeros((2, 3, 4), np.uint16)}, "must have 4 or 5 axes"),
        ({"counts": np.zeros((2, 3, 4, 8))}, "must be whole numbers, got float64"),
        ({"counts": -np.eye(8, dtype=int)[None, None, :4].repeat(2, 0).repeat(3, 1)}, "[0, 0, 0, 0] = -1"),
        ({"iteration": np.array([1])}, "trace iteration has shape (1,), counts say (2,)"),
        ({"layer": np.array([1])}, "trace layer has shape (1,), counts say (3,)"),
        ({"iteration": np.array([11, 11])}, "trace iteration[1] = 11: must be above the one before it"),
        ({"meta": {"experts": 16}}, "trace meta experts = 16: counts have 8"),
    ],
)
def test_a_contradiction_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=re.escape(message)):
        small(**changes)


def test_unreadable_files_say_why(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        load_trace(tmp_path / "none.npz")
    np.savez(tmp_path / "other.npz", counts=np.zeros(3))
    with pytest.raises(ConfigError, match="is not a routing trace"):
        load_trace(tmp_path / "other.npz")
    np.savez(tmp_path / "new.npz", counts=small().counts, iteration=[1, 2], layer=[0, 1, 2], meta='{"version": 9}')
    with pytest.raises(ConfigError, match="has version 9"):
        load_trace(tmp_path / "new.npz")
    (tmp_path / "text.npz").write_text("no zip")
    with pytest.raises(ConfigError, match="is not a routing trace"):
        load_trace(tmp_path / "text.npz")


def test_groups_of_consecutive_ranks() -> None:
    trace = small()
    groups = trace.groups(2)
    assert groups.shape == (2, 3, 2, 1, 2, 8)
    assert np.array_equal(groups[1, 2, 1, 0], trace.counts[1, 2, 2:4])
    assert trace.groups(4).shape == (2, 3, 1, 1, 4, 8)


def test_groups_keep_micro_batches_apart() -> None:
    counts = np.arange(2 * 3 * 4 * 5 * 8, dtype=np.uint16).reshape(2, 3, 4, 5, 8)
    groups = small(counts=counts).groups(2)
    assert groups.shape == (2, 3, 2, 5, 2, 8)
    assert np.array_equal(groups[1, 2, 1, 3, 0], counts[1, 2, 2, 3])


def test_few_source_ranks_are_spread_without_losing_a_token() -> None:
    trace = small()
    groups = trace.groups(12)
    assert groups.shape == (2, 3, 1, 1, 12, 8)
    assert np.array_equal(groups[:, :, 0, 0].reshape(2, 3, 4, 3, 8).sum(axis=3), trace.counts)
    assert np.ptp(groups[0, 0, 0, 0].reshape(4, 3, 8), axis=1).max() <= 1
    with pytest.raises(ConfigError, match="must divide, or be a multiple of, the trace's 4 source ranks"):
        trace.groups(3)


def megatron_line(step: int, layer: int, rank: int, chosen: list[list[int]], **more: Any) -> str:
    record = {"step": step, "stage": "pre_dispatch", "block": "decoder", "layer": layer, "rank": rank}
    return json.dumps({**record, "num_tokens": len(chosen), "topk": 2, "top_indices": chosen, **more}) + "\n"


def test_megatron_lines_become_counts(tmp_path: Path) -> None:
    for rank in range(2):
        lines = [
            megatron_line(step, layer, rank, [[0, 1], [rank + 2, 1 + 4 * micro]])
            for step in (3, 4)
            for layer in (1, 2)
            for micro in range(2)
        ]
        (tmp_path / f"router_trace_rank{rank}.jsonl").write_text("".join(lines))
    trace = load_trace(tmp_path)
    assert trace.counts.shape == (2, 2, 2, 2, 8)
    assert trace.iteration.tolist() == [3, 4]
    assert trace.layer.tolist() == [1, 2]
    assert trace.counts[0, 0, 1, 0].tolist() == [1, 2, 0, 1, 0, 0, 0, 0]
    assert trace.counts[1, 1, 0, 1].tolist() == [1, 1, 1, 0, 0, 1, 0, 0]
    assert trace.meta["top_k"] == 2


def test_megatron_ranks_sort_as_numbers_and_mtp_comes_last(tmp_path: Path) -> None:
    for rank in (2, 10):
        lines = megatron_line(0, 5, rank, [[rank % 8, 0]]) + megatron_line(0, 0, rank, [[7, 6]], block="mtp", mtp_idx=0)
        (tmp_path / f"router_trace_rank{rank}.jsonl").write_text(lines)
    trace = from_megatron(tmp_path, num_experts=16, ranks=range(3, 11))
    assert trace.num_sources == 1
    trace = from_megatron(tmp_path, num_experts=16)
    assert trace.layer.tolist() == [5, 6]
    assert trace.counts.shape == (1, 2, 2, 16)
    assert trace.counts[0, 0, 0, 2] == 1
    assert trace.counts[0, 1, 0, 7] == 1


def test_megatron_refusals_name_the_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has no router_trace_rank\*\.jsonl"):
        load_trace(tmp_path)
    file = tmp_path / "router_trace_rank0.jsonl"
    file.write_text(megatron_line(0, 1, 0, [[0, 1]]) + '{"step": 0, "blo')
    with pytest.raises(ConfigError, match=r"router_trace_rank0\.jsonl:2"):
        load_trace(file)
    file.write_text(megatron_line(0, 1, 0, [[0, 1]]) + megatron_line(1, 1, 0, [[0, 1]]) * 2)
    with pytest.raises(PlanError, match="step 0, decoder layer 1, rank 0 has 1 micro-batches, others have 2"):
        load_trace(file)
    for wrong in ("5", megatron_line(0, 1, 0, [[0, 1]]).replace("[0, 1]", '["a", 1]').strip()):
        file.write_text(wrong + "\n")
        with pytest.raises(ConfigError, match=r"router_trace_rank0\.jsonl:1 = .*: is not a JSON object with whole"):
            load_trace(file)
    file.write_text("")
    with pytest.raises(ConfigError, match="has no records"):
        load_trace(file)
    with pytest.raises(ConfigError, match=r"--trace-ranks = \[3\]: names no rank of .*There are ranks 0\."):
        load_trace(tmp_path, ranks=[3])
    with pytest.raises(ConfigError, match="does not exist"):
        load_trace(tmp_path / "router_trace_rank9.jsonl")


@pytest.mark.parametrize("kind", ["uniform", "zipf", "lognormal", "drifting", "one_hot", "burst"])
def test_synthetic_kinds_conserve_tokens_and_follow_their_seed(kind: str) -> None:
    spec = SyntheticSpec(kind=kind, num_records=14, num_layers=2, num_sources=4, num_experts=16, skew=2.0)
    trace = synthetic_trace(spec)
    assert (trace.counts.sum(axis=-1) == 2 * 8192).all()
    assert np.array_equal(trace.counts, synthetic_trace(spec).counts)
    assert trace.counts.sum(axis=2).max() <= 4 * 8192 * 1.03  # one expert per choice of a token


def test_zipf_and_one_hot_meet_their_skew() -> None:
    trace = synthetic_trace(SyntheticSpec(kind="zipf", skew=2.0, num_ranks=8, num_layers=6))
    load = trace.counts.sum(axis=2).reshape(64, 6, 8, 4).sum(axis=-1)
    assert np.mean(load.max(axis=-1) / load.mean(axis=-1)) == pytest.approx(2.0, rel=0.02)
    trace = synthetic_trace(SyntheticSpec(kind="one_hot", skew=6.0))
    load = trace.counts.sum(axis=2)
    assert np.mean(load.max(axis=-1) / load.mean(axis=-1)) == pytest.approx(6.0, rel=0.02)


def test_drift_and_bursts_change_the_load() -> None:
    calm = synthetic_trace(SyntheticSpec(kind="lognormal")).counts.sum(axis=2).astype(float)
    drifting = synthetic_trace(SyntheticSpec(kind="drifting", drift=0.1)).counts.sum(axis=2).astype(float)
    assert np.abs(drifting[32] - drifting[0]).sum() > 5 * np.abs(calm[32] - calm[0]).sum()
    burst = synthetic_trace(SyntheticSpec(kind="burst")).counts.sum(axis=2).astype(float)
    assert (burst[6] / burst[0]).max() > 3
    assert (burst[11] / burst[0]).max() < 1.5


def test_synthetic_refusals() -> None:
    with pytest.raises(ConfigError, match="Known: uniform, zipf"):
        synthetic_trace(SyntheticSpec(kind="real"))
    with pytest.raises(ConfigError, match="must be between 1 and 16 here"):
        synthetic_trace(SyntheticSpec(kind="one_hot", skew=17))
    with pytest.raises(ConfigError, match="must be between"):
        synthetic_trace(SyntheticSpec(kind="zipf", skew=17))
    with pytest.raises(ConfigError, match="burst_every = 0: must be at least 1"):
        synthetic_trace(SyntheticSpec(kind="burst", burst_every=0))
    with pytest.raises(ConfigError, match="top_k = 64: must not be above num_experts = 32"):
        synthetic_trace(SyntheticSpec(kind="uniform", top_k=64))
    with pytest.raises(ConfigError, match=r"drift = 2\.0: must not be above skew = 1"):
        synthetic_trace(SyntheticSpec(kind="drifting", drift=2.0))
