"""Which shipped cluster file is for a GPU: its own, else the nearest.

A file says which devices it is for, by the whole names that the driver gives: an H100 PCIe is no H100 SXM, its links
are ten times slower. A GPU without a file gets the nearest one among those whose GPUs are joined as its own are, by
compute capability and then by memory. Names are compared without the maker's name, so that a file that `smartmoe
calibrate` has named after a device fits it too.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from megatron_smartmoe.spec.cluster import ClusterSpec, shipped_clusters

_MAKERS = {"nvidia", "tesla", "geforce"}
# GPUs that NVLink joins to all others of their node: H20, B200, GB300. Bridges ("NVL") join two to four cards only.
_ON_NVLINK = re.compile(r"sxm|hbm3|\bg?[bh]\d{2,3}\b", re.IGNORECASE)
_ON_PCIE = re.compile(r"pcie|nvl\b", re.IGNORECASE)
_LEAST_NVLINK_BYTES_S = 100e9  # one direction; PCIe 5.0 x16 has 64e9


@dataclass(frozen=True, kw_only=True)
class Device:
    """A GPU, as torch describes it.

    Attributes:
        name: the driver's name.
        capability: compute capability, such as (9, 0).
        memory_bytes: its memory.
    """

    name: str
    capability: tuple[int, int]
    memory_bytes: float


def fitting_cluster(device: str | None) -> ClusterSpec | None:
    """The shipped cluster for `device`, by its whole name (None: the CPU); None where it has none of its own."""
    if device is None:
        return next(spec for spec in shipped_clusters() if spec.name == "cpu")
    words = _words(device)
    return next((spec for spec in shipped_clusters() if words in map(_words, _names(spec))), None)


def cluster_for(device: Device) -> tuple[ClusterSpec, str]:
    """The cluster to price `device` with, and a line that says which one and why."""
    own = fitting_cluster(device.name)
    if own is not None:
        return own, f"prices of {device.name} come from cluster file {own.name}"
    with_nvlink = is_joined_by_nvlink(device.name)
    alike = [spec for spec in shipped_clusters() if spec.gpu.capability and _has_nvlink(spec) == with_nvlink]
    nearest = min(alike, key=lambda spec: _distance(spec, device))
    line = (
        f"no cluster file is shipped for {device.name} (sm_{device.capability[0]}{device.capability[1]}, "
        f"{device.memory_bytes / 1e9:.0f} GB): prices come from the nearest, {nearest.name} ({nearest.gpu.name}, "
        f"{'NVLink' if with_nvlink else 'PCIe'}), until training measures its own at its start. To have the same in "
        "every run: smartmoe calibrate --output FILE, then --smartmoe-cluster FILE"
    )
    return nearest, line


def is_joined_by_nvlink(name: str) -> bool:
    """Whether NVLink joins GPUs of this name to all others of their node; cards of unknown names are on PCIe."""
    return _ON_NVLINK.search(name) is not None and _ON_PCIE.search(name) is None


def _names(spec: ClusterSpec) -> tuple[str, ...]:
    return (spec.gpu.name, *spec.gpu.devices)


def _words(name: str) -> list[str]:
    """The words of a name, without the maker's: `NVIDIA H100 80GB HBM3` and `H100-80GB-HBM3` are the same."""
    return [word for word in re.split(r"[\s-]+", name.lower()) if word and word not in _MAKERS]


def _has_nvlink(spec: ClusterSpec) -> bool:
    return spec.intra_node.bandwidth_bytes_s >= _LEAST_NVLINK_BYTES_S


def _distance(spec: ClusterSpec, device: Device) -> tuple[float, float]:
    """How different the GPUs are: capability first (a major version outweighs all minor ones), then memory."""
    assert spec.gpu.capability is not None
    (major, minor), (own_major, own_minor) = spec.gpu.capability, device.capability
    return (
        abs(major - own_major) * 10 + abs(minor - own_minor),
        abs(math.log(spec.gpu.memory_bytes / device.memory_bytes)),
    )
