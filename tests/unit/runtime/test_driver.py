"""What the driver says: NVML where it answers, else the device files. The library here is a stand-in."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import pytest

from megatron_smartmoe.runtime import driver
from megatron_smartmoe.runtime.driver import Driver, TorchBuild, find_driver, why_unusable

MODULE = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5 22:23:56 UTC 2024\nGCC version: 12\n"


class Nvml:
    """NVML of a host with eight GPUs."""

    def __init__(self, status: int = 0) -> None:
        self.nvmlInit_v2 = self.nvmlShutdown = lambda: status

    def nvmlDeviceGetCount_v2(self, count: Any) -> int:
        count._obj.value = 8
        return 0

    def nvmlSystemGetCudaDriverVersion_v2(self, version: Any) -> int:
        version._obj.value = 12040
        return 0

    def nvmlSystemGetDriverVersion(self, text: Any, length: int) -> int:
        assert length == 80
        text.value = b"550.54.15"
        return 0


@pytest.fixture(autouse=True)
def host(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A host without NVML, with these device files."""

    def load(name: str) -> None:
        raise OSError(name)

    monkeypatch.setattr(ctypes, "CDLL", load)
    monkeypatch.setattr(driver, "_DEVICES", tmp_path)
    monkeypatch.setattr(driver, "_KERNEL_MODULE", tmp_path / "version")
    return tmp_path


def add_devices(host: Path) -> None:
    for name in ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm"):
        (host / name).touch()
    (host / "version").write_text(MODULE)


def test_a_host_without_a_driver() -> None:
    assert find_driver() == Driver(num_gpus=0)


def test_nvml_answers(host: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add_devices(host)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: Nvml())
    assert find_driver() == Driver(num_gpus=8, version="550.54.15", cuda=(12, 4))


def test_device_files_where_nvml_is_missing(host: Path) -> None:
    add_devices(host)
    assert find_driver() == Driver(num_gpus=2, version="550.54.15")
    assert str(find_driver()) == "driver 550.54.15"


def test_nvml_that_does_not_answer(host: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: Nvml(status=9))
    assert find_driver() == Driver(error="NVML says 9 (see nvidia-smi)")  # an image with the library, on a CPU node
    add_devices(host)
    assert find_driver().num_gpus == 2


@pytest.mark.parametrize(
    ("cuda", "served", "hidden", "text"),
    [
        ("13.0", (12, 8), None, "The driver serves CUDA 12.8: update it to 580 or newer, or install a build of torch"),
        ("12.8", (12, 2), None, "CUDA says: no device. Compare nvidia-smi, and access to /dev/nvidia*."),
        (None, (12, 2), None, "Install a build of torch 2.11.0 for CUDA 12.2 or older."),
        ("13.0", (13, 0), "-1", "Unset CUDA_VISIBLE_DEVICES, which is '-1'."),
        ("13.0", None, None, "CUDA says: no device."),
    ],
)
def test_ways_out(cuda: str | None, served: tuple[int, int] | None, hidden: str | None, text: str) -> None:
    build = TorchBuild(version="2.11.0+x", cuda=cuda, why="no device")
    environ = {} if hidden is None else {"CUDA_VISIBLE_DEVICES": hidden}
    assert why_unusable(build, Driver(num_gpus=1, cuda=served), environ).startswith(text)
