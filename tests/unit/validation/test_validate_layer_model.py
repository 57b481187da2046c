"""scripts/validation/validate_layer_model.py on a trace and on times made here: fit one file, predict another."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from megatron_smartmoe.spec.arrays import FloatArray
from megatron_smartmoe.spec.trace import RoutingTrace
from scripts.validation.validate_layer_model import main

NUM_RANKS, NUM_EXPERTS = 16, 32


def make_trace(micro_batches: int) -> RoutingTrace:
    rng = np.random.default_rng(0)
    popularity = rng.lognormal(0, 1.5, (6, 3, 1, 1, NUM_EXPERTS))
    shape = (6, 3, NUM_RANKS, micro_batches, NUM_EXPERTS)
    counts = np.floor(4000 * np.broadcast_to(popularity / popularity.sum(axis=-1, keepdims=True), shape))
    counts = counts.astype(np.uint32) + rng.integers(0, 30, shape).astype(np.uint32)
    return RoutingTrace(
        counts=counts if micro_batches > 1 else counts[:, :, :, 0],
        iteration=np.arange(1, 61, 10),
        layer=np.array([0, 2, 4]),
    )


def truth_ms(counts_RE: FloatArray, gpus: int, mbs: int) -> float:
    """Times of a machine of our own: 3 ms, and what the busiest rank and the card between two nodes carry."""
    counts_RE = counts_RE[:gpus] / counts_RE[:gpus].sum(axis=1, keepdims=True) * mbs * 2048
    to_RR = counts_RE.reshape(gpus, gpus, -1).sum(axis=2)
    half = gpus // 2
    between = max(to_RR[:half, half:].sum(), to_RR[half:, :half].sum()) if gpus > 8 else 0
    return float(3 + 5e-4 * to_RR.sum(axis=0).max() + 4e-4 * mbs * 2048 + 7e-4 * between)


def write_times(path: Path, trace: RoutingTrace, settings: list[tuple[int, int]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["setting", "gpus", "mbs", "iter", "layer", "real_ms", "est_ms"])
        for gpus, mbs in settings:
            for at, iteration in enumerate(trace.iteration):
                for in_layer, layer in enumerate(trace.layer):
                    counts = trace.counts[at, in_layer].astype(float)
                    counts_RE = counts[:, 0] if trace.has_micro_batches else counts
                    writer.writerow(["own", gpus, mbs, iteration, layer, truth_ms(counts_RE, gpus, mbs), 0])
        writer.writerow(["own", 8, 4, 9999, 0, 1.0, 0])  # not in the trace: left out


def run(*arguments: str | Path) -> int:
    return main([str(argument) for argument in arguments])


@pytest.mark.parametrize("micro_batches", [1, 4])
def test_other_batches_and_node_counts(tmp_path: Path, micro_batches: int, capsys: pytest.CaptureFixture[str]) -> None:
    trace = make_trace(micro_batches)
    trace.save(tmp_path / "trace.npz")
    write_times(tmp_path / "fit.csv", trace, [(8, 4), (16, 4)])
    write_times(tmp_path / "predict.csv", trace, [(8, 8), (16, 8)])
    files = ("--trace", tmp_path / "trace.npz", "--fit", tmp_path / "fit.csv", "--predict", tmp_path / "predict.csv")
    assert run(*files, "--json", tmp_path / "result.json") == 0
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["rows"] == 2 * 18
    assert result["mape"] < 0.05
    assert result["r2"] > 0.95
    assert result["fit"]["mape"] < 0.01
    assert "MoE layer, forward and backward" in capsys.readouterr().out


def test_errors_name_the_file_and_the_column(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = make_trace(1)
    trace.save(tmp_path / "trace.npz")
    (tmp_path / "bad.csv").write_text("gpus,mbs,iter,layer\n8,4,1,0\n")
    write_times(tmp_path / "good.csv", trace, [(8, 4)])
    (tmp_path / "other.csv").write_text("gpus,mbs,iter,layer,real_ms\n8,4,9999,0,1\n")
    (tmp_path / "large.csv").write_text("gpus,mbs,iter,layer,real_ms\n32,4,1,0,1\n")
    for name, message in (
        ("bad.csv", "lacks column real_ms"),
        ("missing.csv", "does not exist"),
        ("other.csv", "has no row whose iter and layer are in the trace"),
        ("large.csv", "the trace has 16 source ranks"),
    ):
        status = run(
            *("--trace", tmp_path / "trace.npz", "--fit", tmp_path / "good.csv", "--predict", tmp_path / name),
            *("--json", tmp_path / "result.json"),
        )
        assert status == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "result.json").exists()
