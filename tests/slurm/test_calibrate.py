"""`smartmoe calibrate` in a Slurm allocation: its ranks find each other on all nodes, and one file comes out."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from megatron_smartmoe.spec.cluster import load_cluster_spec
from tests.support.ports import free_ports

from .cluster import SlurmCluster

pytestmark = [pytest.mark.slurm, pytest.mark.dist]

QUICK = "--device cpu --hidden 32 --ffn 32 --tokens 4,64,256 --sizes 1024,1e5,1e6 --repeats 2".split()


@pytest.mark.parametrize("how", [pytest.param("batch script", marks=pytest.mark.long), "a task per rank"])
def test_calibrate_on_two_nodes(slurm: SlurmCluster, tmp_path: Path, how: str) -> None:
    output = tmp_path / "cluster.yaml"
    port = {"MASTER_PORT": str(free_ports(1)[0])}  # all "nodes" are this host
    command = [sys.executable, "-m", "megatron_smartmoe.cli.main", "calibrate", *QUICK, "--output", str(output)]
    if how == "batch script":
        script = tmp_path / "job.sh"
        script.write_text(f"#!/bin/bash\nexec {' '.join(command)} --nproc 1\n")
        options = ["--nodes", "2", "--ntasks-per-node", "1", "--output", str(tmp_path / "job.log"), "--"]
        printed = slurm.sbatch(script, *options, env=port, timeout=240).stdout
    else:
        where = ["--nodes", "2", "--ntasks-per-node", "2"]
        printed = slurm.run("srun", *where, *command, env=port, timeout=240).stdout
    assert printed.count(f"wrote {output}") == 1, printed[-6000:]
    cluster = load_cluster_spec(output)
    assert (cluster.nodes, cluster.gpus_per_node) == ((2, 1) if how == "batch script" else (2, 2))
    assert cluster.sources["inter_node.bandwidth_bytes_s"].startswith("measured: ")
    assert ("all_to_all_intra" in cluster.efficiency) == (how == "a task per rank")
