"""What NVIDIA's driver says of this host, asked without torch, and why torch cannot use the GPUs that it has.

torch sees no GPU both where there is none and where it cannot use what is there: a driver that is older than the CUDA
it was built for, a build without CUDA, devices that are hidden. Training on the CPU is right in the first case only.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

_FIRST_DRIVERS = {11: 450, 12: 525, 13: 580}  # CUDA's major version: the first driver that runs programs built for it
_DEVICES, _KERNEL_MODULE = Path("/dev"), Path("/proc/driver/nvidia/version")


@dataclass(frozen=True, kw_only=True)
class Driver:
    """The driver and its GPUs.

    Attributes:
        num_gpus: GPUs of this host, usable or not; those that a container or Slurm does not give are not among them.
        version: of the driver, such as 570.86.15; None where it does not say.
        cuda: the newest CUDA whose programs it runs; None where it does not say.
        error: why it does not answer; None where it does, or where there is none.
    """

    num_gpus: int = 0
    version: str | None = None
    cuda: tuple[int, int] | None = None
    error: str | None = None

    def __str__(self) -> str:
        served = f", for CUDA {self.cuda[0]}.{self.cuda[1]}" if self.cuda else ""
        return f"driver {self.version or 'of unknown version'}{served}"


@dataclass(frozen=True, kw_only=True)
class TorchBuild:
    """The installed torch.

    Attributes:
        version: its version.
        cuda: the CUDA that it was built for; None without.
        why: what CUDA said when it was asked for its devices; None without CUDA.
    """

    version: str
    cuda: str | None
    why: str | None = None


def find_driver() -> Driver:
    """Ask NVML, the driver's own library; the device files say how many GPUs there are where it is missing."""
    num_files = sum(path.name.removeprefix("nvidia").isdigit() for path in _DEVICES.glob("nvidia[0-9]*"))
    try:
        library = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return Driver(num_gpus=num_files, version=_version_of_module())
    if status := library.nvmlInit_v2():
        return Driver(num_gpus=num_files, version=_version_of_module(), error=f"NVML says {status} (see nvidia-smi)")
    count, cuda, version = ctypes.c_uint(), ctypes.c_int(), ctypes.create_string_buffer(80)
    library.nvmlDeviceGetCount_v2(ctypes.byref(count))
    library.nvmlSystemGetCudaDriverVersion_v2(ctypes.byref(cuda))
    library.nvmlSystemGetDriverVersion(version, len(version))
    library.nvmlShutdown()
    served = (cuda.value // 1000, cuda.value % 1000 // 10) if cuda.value else None
    return Driver(num_gpus=count.value, version=version.value.decode() or None, cuda=served)


def _version_of_module() -> str | None:
    """The version of the kernel module: the word after its name in the first line."""
    try:
        words = _KERNEL_MODULE.read_text().splitlines()[0].split()
    except (OSError, IndexError):
        return None
    return next((word for word in words if word.replace(".", "").isdigit() and "." in word), None)


def why_unusable(torch: TorchBuild, driver: Driver, environ: Mapping[str, str] = os.environ) -> str:
    """Why this torch cannot use the GPUs that the driver has, and what to do about it."""
    served = ".".join(map(str, driver.cuda)) if driver.cuda else None
    if torch.cuda is None:
        return f"Install a build of torch {torch.version.partition('+')[0]} for CUDA {served or '13.0'} or older."
    if environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return f"Unset CUDA_VISIBLE_DEVICES, which is {environ['CUDA_VISIBLE_DEVICES']!r}."
    wanted = int(torch.cuda.split(".")[0])
    if driver.cuda and wanted > driver.cuda[0]:
        first = _FIRST_DRIVERS.get(wanted)
        update = f"update it to {first} or newer" if first else "update it"
        return f"The driver serves CUDA {served}: {update}, or install a build of torch for CUDA {driver.cuda[0]}."
    return f"CUDA says: {torch.why or 'nothing'}. Compare nvidia-smi, and access to /dev/nvidia*."
