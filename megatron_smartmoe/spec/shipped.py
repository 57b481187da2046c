"""The cluster files of this repository, and which of them is for a device."""

from __future__ import annotations

from megatron_smartmoe.spec.cluster import ClusterSpec, load_cluster_spec
from megatron_smartmoe.spec.yaml_io import shipped_directory

CLUSTERS = shipped_directory("clusters")


def shipped_clusters() -> list[ClusterSpec]:
    """All of them, in the order of their file names."""
    return [load_cluster_spec(path) for path in sorted(CLUSTERS.glob("*.yaml"))]


def fitting_cluster(device: str | None) -> ClusterSpec | None:
    """The file whose accelerator is `device`, as torch names it (None: the CPU); None where there is none."""
    name = "cpu" if device is None else device
    words = name.lower().replace("-", " ").split()
    return next((spec for spec in shipped_clusters() if spec.gpu.name.split("-")[0].lower() in words), None)
