"""What this run's machine and experts cost: the cluster file that fits, and sizes from Megatron's arguments."""

from __future__ import annotations

import os
from argparse import Namespace
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu

from megatron_smartmoe.cost.compute import ExpertShape
from megatron_smartmoe.errors import ConfigError
from megatron_smartmoe.spec.cluster import ClusterSpec, load_cluster_spec
from megatron_smartmoe.spec.shipped import CLUSTERS, fitting_cluster, shipped_clusters

_MOMENT_BYTES = 4
_MOMENTS = 2  # of Adam


def machine(options: Namespace) -> ClusterSpec:
    """The file that --smartmoe-cluster names; else the shipped one for this GPU, or for the CPU.

    Raises:
        ConfigError: no shipped file is for this GPU.
    """
    if options.smartmoe_cluster is not None:
        return load_cluster_spec(Path(options.smartmoe_cluster))
    if not torch.cuda.is_available():
        return load_cluster_spec(CLUSTERS / "cpu.yaml")
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


def expert_shape(options: Namespace) -> ExpertShape:
    """Sizes of one expert as this rank computes it."""
    ffn = options.moe_ffn_hidden_size // options.expert_tensor_parallel_size
    return ExpertShape(
        hidden=options.moe_latent_size or options.hidden_size,
        ffn=ffn,
        gated=options.swiglu,
        element_bytes=options.params_dtype.itemsize,
    )


def state_bytes(options: Namespace) -> int:
    """Bytes that move with an expert: weights, fp32 main weights where they are apart, and Adam's moments."""
    weight_bytes = options.params_dtype.itemsize
    main_bytes = 0 if weight_bytes == _MOMENT_BYTES else _MOMENT_BYTES
    return expert_shape(options).num_params * (weight_bytes + main_bytes + _MOMENTS * _MOMENT_BYTES)
