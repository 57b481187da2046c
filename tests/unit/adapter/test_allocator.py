"""glibc's allocator on CPU ranks."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

from megatron_smartmoe.adapter.allocator import keep_pages_variables, settings

# Ten blocks of 48 MB, one after the other: 12,000 pages of 4 KB each time that the pages are new.
FAULTS = """
import os, resource
from megatron_smartmoe.adapter.allocator import keep_pages
if os.environ.pop("KEEP"):
    keep_pages(os.environ)
size = 48_000_000
b'x' * size
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    b'x' * size
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""

needs_glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the settings are those of glibc's malloc")


takes_high_threshold = bool(settings()) and settings()[0].value_bytes > 48_000_000


def faults(keep: str, **variables: str) -> int:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    done = subprocess.run(
        [sys.executable, "-c", FAULTS],
        env={**environment, **variables, "KEEP": keep},
        capture_output=True,
        text=True,
        check=True,
    )
    return int(done.stdout)


def test_both_variables() -> None:
    found = {setting.variable: setting.value_bytes for setting in settings(("glibc", "2.39"))}
    assert found == {"MALLOC_MMAP_THRESHOLD_": 2**32, "MALLOC_TRIM_THRESHOLD_": 2**34}


def test_an_old_glibc_gets_a_threshold_that_it_takes() -> None:
    assert [setting.value_bytes for setting in settings(("glibc", "2.34"))] == [32 << 20, 2**34]


def test_another_libc_is_left_alone() -> None:
    assert settings(("", "")) == ()


@needs_glibc
@pytest.mark.parametrize(
    ("users", "made"),
    [
        ({"MALLOC_MMAP_THRESHOLD_": "1000"}, ["MALLOC_TRIM_THRESHOLD_"]),
        ({"GLIBC_TUNABLES": "glibc.malloc.trim_threshold=5:glibc.malloc.hugetlb=1"}, ["MALLOC_MMAP_THRESHOLD_"]),
        ({"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}, ["MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"]),
    ],
)
def test_what_the_user_has_set_stays(users: dict[str, str], made: list[str]) -> None:
    assert list(keep_pages_variables(users)) == made


@pytest.mark.skipif(not takes_high_threshold, reason="48 MB are above the threshold of this malloc")
def test_freed_memory_keeps_its_pages() -> None:
    assert faults(keep="") > 100_000
    assert faults(keep="yes") < 1_000
    assert faults(keep="", **keep_pages_variables({})) < 1_000
