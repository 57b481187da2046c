"""The cluster file of a GPU: by its whole name, else the nearest by how it is joined, capability and memory."""

from __future__ import annotations

import pytest

from megatron_smartmoe.spec.cluster import shipped_clusters
from megatron_smartmoe.spec.devices import Device, cluster_for, fitting_cluster, is_joined_by_nvlink

# the driver's names
OWN_FILE = {
    "NVIDIA H100 80GB HBM3": "2x8-h100-sxm",
    "NVIDIA H100 PCIe": "2x8-h100-pcie",
    "NVIDIA H200": "2x8-h200-sxm",
    "NVIDIA H800": "2x8-h800-sxm",
    "NVIDIA H20": "2x8-h20-sxm",
    "NVIDIA A800-SXM4-80GB": "2x8-a800-sxm4-80gb",
    "NVIDIA A100-SXM4-80GB": "2x8-a100-sxm4-80gb",
    "NVIDIA A100-PCIE-40GB": "2x8-a100-pcie-40gb",
    "NVIDIA A100 80GB PCIe": "2x8-a100-pcie-80gb",
    "NVIDIA GH200 480GB": "2x4-gh200",
    "NVIDIA GB200": "2x72-gb200-nvl72",
    "NVIDIA B200": "2x8-b200-sxm",
    "NVIDIA B300 SXM6 AC": "2x8-b300-sxm",
    "NVIDIA L40S": "2x8-l40s",
    "NVIDIA GeForce RTX 4090": "1x8-rtx-4090",
    "NVIDIA RTX 6000 Ada Generation": "1x8-rtx-6000-ada",
    "NVIDIA RTX PRO 6000 Blackwell Server Edition": "1x8-rtx-pro-6000",
    "NVIDIA RTX PRO 6000 Blackwell Workstation Edition": "1x8-rtx-pro-6000",
    "Tesla V100-PCIE-32GB": "2x8-v100-pcie",
}
NEAREST = {  # name, capability, GB
    ("NVIDIA A100-SXM4-40GB", (8, 0), 40): "2x8-a100-sxm4-80gb",
    ("NVIDIA H100 NVL", (9, 0), 94): "2x8-h100-pcie",
    ("NVIDIA H200 NVL", (9, 0), 141): "2x8-h100-pcie",
    ("NVIDIA H20-3e", (9, 0), 141): "2x8-h200-sxm",
    ("NVIDIA GH200 144G HBM3e", (9, 0), 144): "2x8-h200-sxm",
    ("NVIDIA GB300", (10, 3), 288): "2x8-b300-sxm",
    ("NVIDIA A40", (8, 6), 48): "2x8-l40s",
    ("NVIDIA GeForce RTX 3090", (8, 6), 24): "1x8-rtx-4090",
    ("NVIDIA GeForce RTX 5090", (12, 0), 32): "1x8-rtx-pro-6000",
    ("NVIDIA Something Else", (15, 0), 500): "1x8-rtx-pro-6000",
}


@pytest.mark.parametrize("name", OWN_FILE)
def test_a_file_of_its_own(name: str) -> None:
    cluster, line = cluster_for(Device(name=name, capability=(1, 0), memory_bytes=1e9))
    assert cluster.name == OWN_FILE[name]
    assert line == f"prices of {name} come from cluster file {cluster.name}"
    calibrated = name.removeprefix("NVIDIA ").replace(" ", "-")  # as smartmoe calibrate writes it
    assert fitting_cluster(calibrated) == cluster


def test_no_two_files_are_for_one_gpu_and_each_but_the_cpus_has_devices() -> None:
    names = [name for spec in shipped_clusters() for name in spec.gpu.devices]
    assert len(names) == len(set(names))
    assert [spec.name for spec in shipped_clusters() if not spec.gpu.devices or spec.gpu.capability is None] == ["cpu"]


@pytest.mark.parametrize("device", NEAREST, ids=lambda device: str(device[0]))
def test_the_nearest_file(device: tuple[str, tuple[int, int], int]) -> None:
    name, capability, size_gb = device
    cluster, line = cluster_for(Device(name=name, capability=capability, memory_bytes=size_gb * 1e9))
    assert cluster.name == NEAREST[device]
    assert f"no cluster file is shipped for {name} (sm_{capability[0]}{capability[1]}, {size_gb} GB)" in line
    assert fitting_cluster(name) is None


def test_cards_get_no_prices_of_modules() -> None:
    """NVLink is ten times as fast as PCIe."""
    for spec in shipped_clusters():
        for name in spec.gpu.devices:
            fast = spec.intra_node.bandwidth_bytes_s > 100e9
            assert is_joined_by_nvlink(name) == fast, name


def test_the_cpu_has_its_file() -> None:
    found = fitting_cluster(None)
    assert found is not None
    assert found.name == "cpu"
