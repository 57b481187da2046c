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


def written(path: Path, **changes: Any) -> Path:
    """An .npz file with the arrays of a small trace, some of them changed; None leaves one out."""
    trace = small()
    arrays = {"counts": trace.counts, "iteration": trace.iteration, "layer": trace.layer, "meta": '{"version": 1}'}
    np.savez(path, **{name: value for name, value in {**arrays, **changes}.items() if value is not None})
    return path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer": None}, "has no array layer"),
        ({"meta": '{"version": 9}'}, "has version 9. Only version 1 is known"),
        ({"meta": "[" * 3000}, "is not JSON"),
        ({"meta": np.zeros(2)}, "its meta is no text"),
        ({"iteration": [1.5, 2.5]}, "has iteration of type float64: must be whole numbers"),
        ({"layer": ["a", "b", "c"]}, "has layer of type <U1: must be whole numbers"),
        (
            {"iteration": np.array([1, 2**64 - 1], np.uint64)},
            "has iteration of 18446744073709551615: must be below 2^62",
        ),
        ({"counts": np.ones((2, 3, 4))}, "is not a routing trace: trace counts must have 4 or 5 axes"),
        ({"iteration": [2, 1]}, "is not a routing trace: trace iteration[1] = 1: must be above the one before it"),
        ({"counts": np.zeros((2, 3, 4, 8), object)}, "holds object in counts: only numbers and texts are read"),
    ],
)
def test_a_damaged_file_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_trace(written(tmp_path / "t.npz", **changes))
    assert message in str(caught.value)
    assert "t.npz" in str(caught.value) or "meta" in str(caught.value)


def test_unreadable_files_say_why(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none.npz': does not exist. Give an .npz trace, Megatron's"):
        load_trace(tmp_path / "none.npz")
    (tmp_path / "text.npz").write_text("no zip")
    with pytest.raises(ConfigError, match=r"is not an \.npz file"):
        load_trace(tmp_path / "text.npz")
    (tmp_path / "cut.npz").write_bytes(written(tmp_path / "whole.npz").read_bytes()[:-30])
    with pytest.raises(ConfigError, match=r"is not an \.npz or \.pt file"):
        load_trace(tmp_path / "cut.npz")
    with pytest.raises(ConfigError, match=r"--trace-ranks = \[0\]: is for Megatron's JSONL"):
        load_trace(written(tmp_path / "t.npz"), ranks=[0])


def test_a_file_that_unpacks_to_a_thousand_times_its_size_is_refused(tmp_path: Path) -> None:
    np.savez_compressed(
        tmp_path / "t.npz", counts=np.zeros((1, 2**24, 1, 8), np.uint8), iteration=[1], layer=[0], meta=""
    )
    with pytest.raises(ConfigError, match=r"declares 134,217,728 numbers in counts: at most 8,388,608 are read from"):
        load_trace(tmp_path / "t.npz")


def test_a_trace_without_assignments_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has no assignment of a token to an expert"):
        load_trace(written(tmp_path / "t.npz", counts=np.zeros((2, 3, 4, 8), np.uint8)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"counts": np.full((2, 3, 4, 8), 2**40)}, "trace counts have 1099511627776: must be at most 4294967295"),
        ({"layer": np.array([1, 1, 2])}, "trace layer names a layer twice"),
        ({"counts": np.zeros((1, 1, 1, 70_000), np.uint8)}, "trace counts have 70,000 experts: must be at most 65,536"),
    ],
)
def test_a_number_out_of_bounds_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=re.escape(message)):
        small(**changes)


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


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"top_indices": [["a", 1]]}, "is not a JSON object with whole numbers in top_indices"),
        ({"top_indices": [[1.5, 1]]}, "is not a JSON object with whole numbers in top_indices"),
        ({"top_indices": [[True, 1]]}, "is not a JSON object with whole numbers in top_indices"),
        ({"top_indices": [[0, 1], [2]]}, "is not a JSON object with whole numbers in top_indices"),
        ({"step": "a"}, "step = 'a': must be a whole number of at least 0"),
        ({"layer": 1.5}, "layer = 1.5: must be a whole number"),
        ({"rank": [0]}, "rank = [0]: must be a whole number"),
        ({"topk": None}, "topk = None: must be a whole number"),
        ({"block": 3}, "block = 3: must be a text"),
        ({"mtp_idx": -1}, "mtp_idx = -1: must be a whole number"),
        ({"top_indices": [[10**9]]}, "the trace names expert 1000000000: must be below 65,536"),
        ({"top_indices": [[-2]]}, "the trace names expert -2"),
    ],
)
def test_a_damaged_megatron_line_is_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    line = megatron_line(0, 1, 0, [[0, 1]])
    wrong = json.dumps({**json.loads(line), **changes}) + "\n"
    (tmp_path / "router_trace_rank0.jsonl").write_text(line + wrong)
    with pytest.raises((ConfigError, PlanError)) as caught:
        load_trace(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path}/router_trace_rank0.jsonl:2")
    assert message in str(caught.value)


def test_megatron_refusals_name_the_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has no router_trace_rank\*\.jsonl"):
        load_trace(tmp_path)
    file = tmp_path / "router_trace_rank0.jsonl"
    line = megatron_line(0, 1, 0, [[0, 1]])
    for wrong in ('{"step": 0, "blo\n', "5\n", "{}\n", "[" * 3000 + "\n"):
        file.write_text(line + wrong + line)
        with pytest.raises(ConfigError, match=r"router_trace_rank0\.jsonl:2"):
            load_trace(file)
    file.write_bytes(line.encode() + b"\xff\n" + line.encode())
    with pytest.raises(ConfigError, match=r"router_trace_rank0\.jsonl:2 = .*is not UTF-8 text: byte 0xff"):
        load_trace(file)
    file.write_text(line)
    with pytest.raises(PlanError, match=r"jsonl:1: the trace names expert 1: must be below 1$"):
        load_trace(file, num_experts=1)
    with pytest.raises(ConfigError, match=r"--trace-experts = 1000000000: must be a whole number of at least 1 and at"):
        load_trace(file, num_experts=10**9)
    file.write_text("")
    with pytest.raises(ConfigError, match="has no records"):
        load_trace(file)
    with pytest.raises(ConfigError, match=r"--trace-ranks = \[3\]: names no rank of .*There are ranks 0\."):
        load_trace(tmp_path, ranks=[3])
    with pytest.raises(ConfigError, match="does not exist"):
        load_trace(tmp_path / "router_trace_rank9.jsonl")


def write_ranks(folder: Path, lines_of_rank: dict[int, str]) -> None:
    for rank, lines in lines_of_rank.items():
        (folder / f"router_trace_rank{rank}.jsonl").write_text(lines)


def test_blank_lines_are_left_out(tmp_path: Path) -> None:
    line = megatron_line(0, 1, 0, [[0, 1]])
    write_ranks(tmp_path, {0: "\n" + line + "  \n\n" + line})
    assert load_trace(tmp_path).counts.sum() == 4


def test_a_rank_that_stopped_early_is_used_as_far_as_it_came(tmp_path: Path) -> None:
    """Rank 1 was killed in step 2, in the middle of a line."""
    whole = {rank: [megatron_line(step, 1, rank, [[step, 5]]) for step in range(4)] for rank in range(2)}
    write_ranks(tmp_path, {0: "".join(whole[0]), 1: "".join(whole[1][:2]) + whole[1][2][:50], 2: ""})
    trace = load_trace(tmp_path)
    assert trace.iteration.tolist() == [0, 1]
    assert trace.counts.sum(axis=(2, 3)).tolist() == [[4], [4]]
    assert trace.notes == (
        "1 of 3 files have no records (the first is router_trace_rank2.jsonl) and are left out",
        "the last line of rank 1 is cut short and left out",
        "2 ranks are read as one pipeline stage; if they are N of them, pass --trace-stages N",
        "2 of 4 steps are used: rank 1 stopped at step 1",
    )


def test_micro_batches_may_vary(tmp_path: Path) -> None:
    """As the batch grows; and in the last step rank 1 has one micro-batch less."""
    batches = {0: 1, 1: 2, 2: 3}
    lines = {
        rank: [megatron_line(step, 1, rank, [[micro, 7]]) for step, most in batches.items() for micro in range(most)]
        for rank in range(2)
    }
    write_ranks(tmp_path, {0: "".join(lines[0]), 1: "".join(lines[1][:-1])})
    trace = load_trace(tmp_path)
    assert trace.counts.shape == (3, 1, 2, 2, 8)
    assert [trace.num_micro_batches(record) for record in range(3)] == [1, 2, 2]
    assert trace.counts[:, 0, :, :, 7].tolist() == [[[1, 0], [1, 0]], [[1, 1], [1, 1]], [[1, 1], [1, 1]]]
    assert trace.notes[-2:] == (
        "step 2: 2 of 3 micro-batches are used, rank 1 has no more",
        "steps have 1, 2 micro-batches: each is used with its own",
    )


def test_pipeline_stages_are_told_apart_by_their_layers(tmp_path: Path) -> None:
    """Megatron numbers layers by their place in the stage; a prediction block is on the last one."""
    for rank in range(4):
        places = range(2) if rank < 2 else range(1)
        lines = "".join(megatron_line(0, place, rank, [[rank, place]]) for place in places)
        lines += megatron_line(0, 0, rank, [[7, 6]], block="mtp", mtp_idx=0) if rank > 1 else ""
        write_ranks(tmp_path, {rank: lines})
    trace = load_trace(tmp_path)
    assert trace.layer.tolist() == [0, 1, 2, 3]
    assert trace.num_sources == 2
    assert trace.counts[0, 2].tolist() == [[1, 0, 1, 0, 0, 0, 0, 0], [1, 0, 0, 1, 0, 0, 0, 0]]
    assert trace.notes == ("2 pipeline stages, told apart by their layers: ranks 0 to 1; ranks 2 to 3",)


def test_pipeline_stages_with_equal_layers_are_counted_by_the_user(tmp_path: Path) -> None:
    write_ranks(tmp_path, {rank: megatron_line(0, 0, rank, [[rank, 4]]) for rank in range(4)})
    assert load_trace(tmp_path).counts.shape == (1, 1, 4, 8)
    trace = load_trace(tmp_path, stages=2)
    assert trace.layer.tolist() == [0, 1]
    assert trace.counts.argmax(axis=-1).tolist() == [[[0, 1], [2, 3]]]
    with pytest.raises(ConfigError, match="--trace-stages = 3: must divide the trace's 4 ranks"):
        load_trace(tmp_path, stages=3)


@pytest.mark.parametrize("num_stages", [1, 2, 4])
def test_pipeline_stages_with_equal_layers_are_told_apart_by_their_loads(tmp_path: Path, num_stages: int) -> None:
    """Eight ranks; those of a stage have the same routers, whose popularity drifts a little from rank to rank."""
    random, ranks_of_stage = np.random.default_rng(5), 8 // num_stages
    popularity = random.dirichlet(np.ones(16), size=(num_stages, 2))
    for rank in range(8):
        lines = ""
        for layer in range(2):
            share_E = popularity[rank // ranks_of_stage, layer] * random.uniform(0.9, 1.1, 16)
            chosen = [random.choice(16, 2, replace=False, p=share_E / share_E.sum()).tolist() for _ in range(300)]
            lines += megatron_line(0, layer, rank, chosen)
        write_ranks(tmp_path, {rank: lines})
    trace = load_trace(tmp_path)
    assert trace.counts.shape == (1, 2 * num_stages, ranks_of_stage, 16)
    assert f"{num_stages} pipeline stage" in trace.notes[0] or num_stages == 1
    assert load_trace(tmp_path, stages=1).counts.shape == (1, 2, 8, 16)


def test_layers_that_are_numbered_over_all_stages_keep_their_numbers(tmp_path: Path) -> None:
    write_ranks(tmp_path, {rank: megatron_line(0, 3 + rank // 2, rank, [[rank, 4]]) for rank in range(4)})
    trace = load_trace(tmp_path)
    assert trace.layer.tolist() == [3, 4]
    assert trace.num_sources == 2


def test_stages_of_different_sizes_are_refused(tmp_path: Path) -> None:
    write_ranks(tmp_path, {rank: megatron_line(0, int(rank > 0), rank, [[rank, 4]]) for rank in range(3)})
    with pytest.raises(PlanError, match="told apart by their layers, have 1, 2 ranks: pass --trace-ranks"):
        load_trace(tmp_path)


def test_a_few_bytes_that_stand_for_gigabytes_are_refused(tmp_path: Path) -> None:
    lines = "".join(megatron_line(step, 1, 0, [[65_535]]) for step in range(600))
    write_ranks(tmp_path, {0: lines})
    with pytest.raises(ConfigError, match=r"would become 39,321,600 counts \(600 x 1 x 1 x 1 x 65536\), too many"):
        load_trace(tmp_path)


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
