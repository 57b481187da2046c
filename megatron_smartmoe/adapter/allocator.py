"""glibc's allocator on CPU ranks: pages that a tensor gives back stay with the process.

By default glibc gives every block above a threshold (128 KiB at first, 32 MiB at most) back to the kernel when it is
freed, and takes new pages, filled with zeros, for the next one. A training step allocates the same large tensors again
and again, so most of the time of a permutation goes into page faults. Two of glibc's variables end that; the price is
that a rank's memory stays at its peak instead of falling between steps.

They are set where a rank is started by the launcher, so its helpers have them too, and by `mallopt` in a rank that
torchrun started without it: glibc reads its environment before the first line of Python. What the user has set stays.
"""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One of malloc's settings.

    Attributes:
        variable: its environment variable.
        tunable: its name in GLIBC_TUNABLES.
        value_bytes: what a rank sets it to.
        parameter: its number in malloc.h.
    """

    variable: str
    tunable: str
    value_bytes: int
    parameter: int


_LARGEST_INT = 2**31 - 1  # mallopt takes an int
_HIGH_THRESHOLD = (2, 36)  # the oldest glibc that is known to take a threshold above half of a heap, 32 MiB
_MAX_OLD_THRESHOLD_BYTES = 32 << 20


def settings(libc: tuple[str, str] | None = None) -> tuple[Setting, ...]:
    """The settings of this system's malloc; none where it is not glibc's.

    An older glibc refuses a threshold above 32 MiB, and stays at 128 KiB once the other setting is made: there it is
    32 MiB, and only larger tensors take new pages.
    """
    name, version = libc or platform.libc_ver()
    if name != "glibc":
        return ()
    is_high = tuple(int(part) for part in version.split(".")[:2]) >= _HIGH_THRESHOLD
    return (
        Setting(
            variable="MALLOC_MMAP_THRESHOLD_",
            tunable="glibc.malloc.mmap_threshold",
            value_bytes=4 << 30 if is_high else _MAX_OLD_THRESHOLD_BYTES,
            parameter=-3,
        ),
        Setting(
            variable="MALLOC_TRIM_THRESHOLD_",
            tunable="glibc.malloc.trim_threshold",
            value_bytes=16 << 30,
            parameter=-1,
        ),
    )


def keep_pages_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """Variables for a CPU rank that is started with `environment`, without those that the user has set."""
    return {setting.variable: str(setting.value_bytes) for setting in _left_open(environment)}


def keep_pages(environment: Mapping[str, str]) -> None:
    """Make the settings in this process, which was started with `environment`, where that does not make them."""
    for setting in _left_open(environment):
        ctypes.CDLL(None).mallopt(setting.parameter, min(setting.value_bytes, _LARGEST_INT))


def _left_open(environment: Mapping[str, str]) -> list[Setting]:
    tunables = environment.get("GLIBC_TUNABLES", "")
    return [each for each in settings() if each.variable not in environment and f"{each.tunable}=" not in tunables]
