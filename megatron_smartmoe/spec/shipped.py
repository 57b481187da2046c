"""The cluster files of this repository, and which of them is for a device."""

from __future__ import annotations

from pathlib import Path

from megatron_smartmoe.spec.cluster import ClusterSpec, load_cluster_spec

CLUSTERS = Path(__file__).parents[2] / "configs" / "clusters"


def shipped_clusters() -> list[ClusterSpec]:
    """All of them, in the order of their file names; none in an installation without the repository."""
    return [load_cluster_spec(path) for path in sorted(CLUSTERS.glob("*.yaml"))]


def fitting_cluster(device: str | None) -> ClusterSpec | None:
    """The file whose accelerator is `device`, as torch names it (None: the CPU); None where there is none."""
    name = "cpu" if device is None else device
    words = name.lower().replace("-", " ").split()
    return next((spec for spec in shipped_clusters() if spec.gpu.name.split("-")[0].lower() in words), None)
