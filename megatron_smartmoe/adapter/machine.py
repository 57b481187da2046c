"""This run's machine: the cluster file that fits, and the nodes of a group."""

from __future__ import annotations

import os
from argparse import Namespace
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu

from megatron_smartmoe.errors import ConfigError
from megatron_smartmoe.spec.cluster import (
    ClusterSpec,
    fitting_cluster,
    load_cluster_spec,
    shipped_clusters,
    shipped_directory,
)


def machine(options: Namespace) -> ClusterSpec:
    """The file that --smartmoe-cluster names; else the shipped one for this GPU, or for the CPU.

    Raises:
        ConfigError: no shipped file is for this GPU.
    """
    if options.smartmoe_cluster is not None:
        return load_cluster_spec(Path(options.smartmoe_cluster))
    if not torch.cuda.is_available():
        return load_cluster_spec(shipped_directory("clusters") / "cpu.yaml")
    name = torch.cuda.get_device_name()
    fitting = fitting_cluster(name)
    if fitting is None:
        known = ", ".join(sorted({spec.gpu.name for spec in shipped_clusters()}))
        way_out = f"Measure it: smartmoe calibrate --output FILE, then pass --smartmoe-cluster FILE (shipped: {known})."
        raise ConfigError("--smartmoe-cluster", None, f"no file is shipped for {name}", way_out)
    return fitting


def nodes_of_group(num_ranks: int) -> int:
    """Nodes that the expert-parallel group lies on; each rank counts as one where ranks are spread unevenly."""
    per_node = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    nodes = [rank // per_node for rank in dist.get_process_group_ranks(mpu.get_expert_model_parallel_group())]
    found = sorted(set(nodes))
    even = num_ranks % len(found) == 0 and nodes == [node for node in found for _ in range(num_ranks // len(found))]
    return len(found) if even else num_ranks
