"""Loads that others have recorded become traces: EPLB's weights, SGLang's and vLLM's records, in their files."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_smartmoe.errors import ConfigError
from megatron_smartmoe.spec.trace import load_trace

# The example of EPLB's README: two layers of twelve experts.
WEIGHT = [[90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86], [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27]]
NO_SOURCES = "it has no source ranks: each rank is taken to route an equal share"


def write(path: Path, content: Any) -> Path:
    """A file in the format of its suffix."""
    if path.suffix == ".npy":
        np.save(path, np.asarray(content))
    elif path.suffix == ".npz":
        np.savez(path, weight=content)
    elif path.suffix in (".pt", ".pth"):
        torch.save(torch.tensor(content) if isinstance(content, list) else content, path)
    else:
        path.write_text(json.dumps(content))
    return path


@pytest.mark.parametrize("suffix", [".json", ".txt", ".npy", ".npz", ".pt", ".pth"])
def test_a_matrix_is_a_load_of_every_layer(tmp_path: Path, suffix: str) -> None:
    trace = load_trace(write(tmp_path / f"weight{suffix}", WEIGHT))
    assert trace.counts.shape == (1, 2, 1, 12)
    assert trace.counts[0, :, 0].tolist() == WEIGHT
    assert trace.notes == (NO_SOURCES,)
    assert np.array_equal(trace.groups(4).sum(axis=(2, 3, 4)), trace.counts[:, :, 0])


@pytest.mark.parametrize("suffix", [".json", ".npy", ".pt"])
def test_a_third_axis_is_records(tmp_path: Path, suffix: str) -> None:
    trace = load_trace(write(tmp_path / f"w{suffix}", [WEIGHT, WEIGHT, WEIGHT]))
    assert trace.counts.shape == (3, 2, 1, 12)
    assert trace.iteration.tolist() == [0, 1, 2]


def test_a_json_document_may_have_several_lines(tmp_path: Path) -> None:
    (tmp_path / "w.json").write_text(json.dumps({"weight": WEIGHT}, indent=2))
    assert load_trace(tmp_path / "w.json").counts.shape == (1, 2, 1, 12)


def test_layers_by_their_numbers(tmp_path: Path) -> None:
    trace = load_trace(write(tmp_path / "w.json", {"10": WEIGHT[1], "3": WEIGHT[0]}))
    assert trace.layer.tolist() == [3, 10]
    assert trace.counts[0, :, 0].tolist() == WEIGHT


def test_fractions_are_scaled(tmp_path: Path) -> None:
    trace = load_trace(write(tmp_path / "w.npy", np.array([[0.5, 0.25, 0.25], [0.1, 0.1, 0.2]])))
    assert trace.counts[0, :, 0].tolist() == [[524288, 262144, 262144], [104858, 104858, 209715]]
    assert trace.notes[0] == "it has fractions: scaled so that the busiest layer has 1,048,576 assignments"


def sglang(records: list[dict[str, Any]], mapping: Any) -> dict[str, Any]:
    return {"records": records, "last_physical_to_logical_map": mapping}


def test_sglang_counts_of_all_ranks(tmp_path: Path) -> None:
    """Mode `stat`; the dense layer of the model has no assignments."""
    counts = torch.zeros(2, 3, 8, dtype=torch.int32)
    counts[:, 1:] = torch.arange(16).reshape(2, 8)
    content = {"rank": 0, "logical_count": counts, "average_utilization_rate_over_window": None}
    trace = load_trace(write(tmp_path / "expert_distribution_recorder_1.5.pt", content))
    assert trace.counts.shape == (2, 3, 1, 8)
    assert np.array_equal(trace.counts[:, :, 0], counts.numpy())
    as_json = load_trace(write(tmp_path / "dump.json", {"rank": 0, "logical_count": counts.tolist()}))
    assert np.array_equal(as_json.counts, trace.counts)


def test_sglang_passes_of_every_rank(tmp_path: Path) -> None:
    """Mode `per_pass`: by physical expert; expert 1 has two of them. Rank 1 lacks the last pass."""
    mapping = torch.tensor([[0, 1, 2, 1]])
    for rank, passes in ((0, (7, 8)), (1, (7,))):
        records = [
            {
                **{"forward_pass_id": number, "rank": rank, "gatherer_key": "primary"},
                "global_physical_count": torch.tensor([[1, 10, 100, 20 + rank]], dtype=torch.int32),
            }
            for number in passes
        ]
        write(tmp_path / f"expert_distribution_recorder_1.5_{rank}.pt", sglang(records, mapping))
    trace = load_trace(tmp_path)
    assert trace.iteration.tolist() == [7]
    assert trace.counts.tolist() == [[[[1, 30, 100], [1, 31, 100]]]]
    assert trace.notes == ("1 of 2 passes are used: those that all 2 ranks have",)


def test_sglang_first_recorder(tmp_path: Path) -> None:
    (tmp_path / "expert_distribution_rank0.csv").write_text("layer_id,expert_id,count\n3,0,24990\n3,18,39249\n5,1,7\n")
    trace = load_trace(tmp_path / "expert_distribution_rank0.csv")
    assert trace.layer.tolist() == [3, 5]
    assert trace.num_experts == 24
    assert trace.counts[0, 0, 0, 18] == 39249


def test_vllm_records_of_steps(tmp_path: Path) -> None:
    head = {"record_type": "eplb_load_meta", "version": 1, "num_layers": 1}
    steps = [
        {"record_type": "eplb_load_stats", "step": step, "expert_load": [[step, 1, 2]], "p2l_map": [[0, 1, 0]]}
        for step in (5, 6)
    ]
    (tmp_path / "load.jsonl").write_text("".join(json.dumps(line) + "\n" for line in (head, *steps)) + '{"record')
    trace = load_trace(tmp_path / "load.jsonl")
    assert trace.iteration.tolist() == [5, 6]
    assert trace.counts[:, 0, 0].tolist() == [[7, 1], [8, 1]]
    assert "the last line is cut short and left out" in trace.notes


class Planted:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        import os

        return os.system, (f"touch {self.path}",)


def test_a_planted_command_does_not_run(tmp_path: Path) -> None:
    torch.save({"logical_count": torch.ones(2, 4), "x": Planted(tmp_path / "ran")}, tmp_path / "w.pt")
    assert load_trace(tmp_path / "w.pt").counts.shape == (1, 2, 1, 4)
    assert not (tmp_path / "ran").exists()


def test_tuples_of_tuples_are_refused(tmp_path: Path) -> None:
    """A key that stands for 2^45 entries: hashing it would not end."""
    twice = b"".join(b"q" + bytes([at]) + b"h" + bytes([at]) + b"\x86" for at in range(45))
    with zipfile.ZipFile(tmp_path / "w.pt", "w") as archive:
        archive.writestr("w/data.pkl", b"\x80\x02})" + twice + b"K\x01s.")
    with pytest.raises(ConfigError, match="tuples of tuples that stand for too many entries"):
        load_trace(tmp_path / "w.pt")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("w.json", [[1, 2], [3]], "has rows of different lengths"),
        ("w.json", [[1, -2]], "has a negative number, -2"),
        ("w.json", [[1, True]], "must hold numbers only"),
        ("w.json", [["1", 2]], "must hold numbers only"),
        ("w.json", {"a": 1, "b": 2}, "has none of the keys of a load, but a, b"),
        ("w.json", {"expert_load": [[1, 2]], "p2l_map": [[0, 1, 2]]}, "has a map of shape (1, 3)"),
        ("w.json", {"records": [3]}, "records[0] has no global_physical_count"),
        ("w.json", 3, "is a number"),
        ("w.npy", np.array([[1.0, np.nan]]), "has a number that is not finite"),
        ("w.npy", np.zeros((2, 4)), "has no assignment"),
        ("w.npy", np.array(["a"]), "has shape (1,) and type <U1"),
        ("w.pt", {"logical_count": "x"}, "is a text"),
        ("w.pt", {"logical_count": torch.ones(2, 4, dtype=torch.bfloat16)}, "of type bfloat16: save it as float32"),
        ("w.pt", {"logical_count": torch.ones(1).expand(10**9)}, "whose elements share their bytes"),
    ],
)
def test_what_is_no_load_is_refused(tmp_path: Path, name: str, content: Any, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_trace(write(tmp_path / name, content))
    assert message in str(caught.value)
    assert name in str(caught.value)
