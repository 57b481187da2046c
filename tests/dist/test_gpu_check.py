"""`scripts/gpu_check.sh` where there is no GPU: the steps that a CPU can run, with the same code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.dist  # it starts processes that train nothing, and takes some seconds

SCRIPT = Path(__file__).parents[2] / "scripts" / "gpu_check.sh"


def test_the_check_runs_on_a_cpu(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = ["bash", str(SCRIPT), "--device", "cpu", "--out", str(tmp_path / "out")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    logs = "".join(log.read_text()[-1500:] for log in (tmp_path / "out").glob("*.log"))
    assert done.returncode == 0, done.stdout + done.stderr + logs
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    status = {step["name"]: step["status"] for step in found["steps"]}
    assert status.pop("grouped GEMM") == status.pop("a layer's trace") == "passed"
    assert all(each.startswith("skipped: ") for each in status.values())
    measured = {result["what"] for step in found["steps"] for result in step["results"]}
    assert {"stock: forward and backward", "exact replicas, 4 chunks: forward and backward"} <= measured
    assert found["machine"]["GPU, driver, memory"] == "none" or os.path.exists("/dev/nvidia0")
    assert "torch" in found["machine"]["software"]
