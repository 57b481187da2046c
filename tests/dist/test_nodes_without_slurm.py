"""One launcher per node, as SkyPilot, Kubernetes or a loop over ssh start them: here both "nodes" are this host."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.ports import free_ports
from tests.support.training import TINY_MODEL, TINY_TRAINING, losses, train

pytestmark = pytest.mark.dist

DATA = "--mock-data --tokenizer-type NullTokenizer --vocab-size 255".split()
EP2 = "--expert-model-parallel-size 2 --smartmoe".split()


def launched(run_dir: Path, node: int, port: int) -> subprocess.Popen[str]:
    """The launcher of a node."""
    variables = {
        "SKYPILOT_NUM_NODES": "2",
        "SKYPILOT_NODE_RANK": str(node),
        "SKYPILOT_NODE_IPS": "127.0.0.1\n127.0.0.1",
    }
    environ = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    environ |= variables | {"MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    argv = ["--nproc", "1", "--run-dir", str(run_dir), *TINY_MODEL, *TINY_TRAINING, *DATA, *EP2, "--train-iters", "3"]
    return subprocess.Popen(
        [sys.executable, "-m", "megatron_smartmoe.adapter.launch", *argv],
        env=environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_two_launchers_are_one_job(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    (port,) = free_ports(1)
    nodes = [launched(run_dir, node, port) for node in (0, 1)]
    outputs = [node.communicate(timeout=240)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], outputs
    assert f"smartmoe: 2 ranks on 2 nodes (SkyPilot; node 0 is 127.0.0.1:{port})" in outputs[0]
    assert "Finished after 3 iterations." in outputs[0] + outputs[1]
    assert (run_dir / "node1.log").is_file()
    assert losses(run_dir) == train(tmp_path / "here", 2, DATA, *EP2, iterations=3)
