"""The measured imbalance benchmark as a program: one small workload on two ranks, and that nothing is repeated."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from scripts import bench_imbalance

pytestmark = [pytest.mark.dist, pytest.mark.long]


def test_a_workload_is_measured_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--out", str(tmp_path), "--workload", "W1_hot_expert_set", "--rounds", "1", "--steps", "6"]
    arguments += "--ep 2 --experts 8 --top-k 2 --tokens 32 --hidden 32 --ffn 32".split()
    bench_imbalance.main(arguments)
    assert "round 1 of 1: W1_hot_expert_set done" in capsys.readouterr().err
    found = np.load(tmp_path / "round0-W1_hot_expert_set.npz")
    assert found["seconds"].shape == (2, len(found["rules"]), 2)
    assert (found["seconds"] > 0).all()
    bench_imbalance.main(arguments)
    assert capsys.readouterr().err == "7 runs are still to be made, round0-W0_balanced.npz first\n"
    with pytest.raises(SystemExit, match="its runs have hidden = 32, not 64"):
        bench_imbalance.main([*arguments, "--hidden", "64"])
