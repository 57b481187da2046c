"""What installing this project asks of an environment: a fitting one is left as it is."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
RANGES = {req.name.lower(): req for req in map(Requirement, PROJECT["dependencies"])}


def pins() -> dict[str, str]:
    """requirements.txt: package to version."""
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    return {name.lower(): version for name, version in (ln.split("==") for ln in lines if ln and ln[0] != "#")}


def test_every_pin_is_in_its_range() -> None:
    assert set(RANGES) <= set(pins())
    for name, requirement in RANGES.items():
        assert requirement.specifier.contains(pins()[name]), requirement


@pytest.mark.parametrize(
    ("package", "version", "fits"),
    [
        ("torch", "2.9.1", False),
        ("torch", "2.10.0", True),
        ("torch", "2.10.0a0+b4e4ee8.nv25.12", True),  # a vendor's build
        ("torch", "2.12.0+cu130", True),
        ("megatron-core", "0.18.2", False),
        ("megatron-core", "0.19.0", True),
        ("megatron-core", "0.20.0", True),
    ],
)
def test_versions_that_fit(package: str, version: str, fits: bool) -> None:
    assert RANGES[package].specifier.contains(version, prereleases=True) is fits  # as pip judges what is installed


def test_installing_into_a_fitting_environment_changes_nothing_else() -> None:
    """Asked of pip's own resolver, without an index: it would install this project alone."""
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--quiet", "--report", "-", "--no-index"]
    command += ["--no-build-isolation", "--disable-pip-version-check", str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    installed = [item["metadata"]["name"] for item in json.loads(done.stdout)["install"]]
    assert installed == [PROJECT["name"]]


def test_the_readme_names_the_pinned_megatron() -> None:
    assert f"megatron-core {pins()['megatron-core']}" in re.sub(r"\s+", " ", (ROOT / "README.md").read_text())
