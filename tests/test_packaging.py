"""What installing this project asks of an environment: a fitting one is left as it is."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
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


@pytest.mark.slow
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


def test_the_container_recipe_is_clean_and_names_no_image() -> None:
    recipe = ROOT / "container" / "Dockerfile"
    hadolint = Path(sys.executable).parent / "hadolint"
    if not hadolint.exists():
        pytest.skip("hadolint is not installed; scripts/setup.sh --dev installs it")
    done = subprocess.run([hadolint, str(recipe)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")
    assert "\nARG BASE_IMAGE\nFROM ${BASE_IMAGE}\n" in recipe.read_text()


def test_hooks_and_workflow_run_what_is_there() -> None:
    """Pre-commit's commands are those of the test script, and the workflow runs the script."""
    script = (ROOT / "scripts" / "test.sh").read_text()
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    assert {hook["id"] for hook in hooks} == {"ruff", "ruff-format", "clang-format", "mypy", "lint-imports"}
    for hook in hooks:
        assert f"step {hook['entry'].removeprefix('.venv/bin/')}" in script
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "test.yml").read_text())["jobs"]
    commands = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
    assert [command for command in commands if "scripts/" in command] == ["scripts/test.sh --fast", "scripts/test.sh"]
    for form in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"):
        assert {"name", "description", "body"} <= set(yaml.safe_load(form.read_text()))
