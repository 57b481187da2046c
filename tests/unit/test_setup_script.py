"""scripts/setup.sh finds a Python 3.12, or says in one message what to do."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SYSTEM_PATH = "/usr/bin:/bin"


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout with the script and nothing to install."""
    (tmp_path / "scripts").mkdir()
    shutil.copy(ROOT / "scripts" / "setup.sh", tmp_path / "scripts")
    return tmp_path


def run_setup(checkout: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run it with nothing of this process's environment."""
    environment = {"HOME": str(checkout / "home"), "PATH": SYSTEM_PATH, **environment}
    command = ["bash", str(checkout / "scripts" / "setup.sh")]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)


def has_system_python312() -> bool:
    """Whether the system's own directories have one, so that none is hidden."""
    check = "import sys; sys.exit(sys.version_info[:2] != (3, 12))"
    found = [shutil.which(name, path=SYSTEM_PATH) for name in ("python3.12", "python3")]
    return any(subprocess.run([python, "-c", check], check=False).returncode == 0 for python in found if python)


def test_no_python_is_one_clear_error(checkout: Path) -> None:
    if has_system_python312():
        pytest.skip("the system's own Python is 3.12")
    done = run_setup(checkout)
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        "error: Python 3.12 = not found: it is neither python3.12 on PATH, nor in pyenv, nor known to uv.",
        "       Install it (pyenv install 3.12, or uv python install 3.12), or set SMARTMOE_PYTHON to one.",
    ]
    assert not (checkout / ".venv").exists()


def test_a_wrong_smartmoe_python_is_refused(checkout: Path) -> None:
    done = run_setup(checkout, SMARTMOE_PYTHON="/bin/false")
    assert done.returncode == 1
    assert done.stderr == (
        "error: SMARTMOE_PYTHON = /bin/false: is not a Python 3.12. "
        "Set it to one, for example /usr/bin/python3.12, or unset it.\n"
    )


def test_pyenv_is_found_without_its_shims_on_path(checkout: Path) -> None:
    binaries = checkout / "home" / ".pyenv" / "versions" / "3.12.99" / "bin"
    binaries.mkdir(parents=True)
    os.symlink(os.path.realpath(sys.executable), binaries / "python")
    done = run_setup(checkout)
    assert "setup: making .venv with" in done.stdout
    assert (checkout / ".venv" / "bin" / "python").exists()


def test_uv_is_asked_last(checkout: Path) -> None:
    if has_system_python312():
        pytest.skip("the system's own Python is 3.12")
    tools = checkout / "tools"
    tools.mkdir()
    (tools / "uv").write_text(
        f'#!/bin/sh\n[ "$*" = "python find 3.12" ] && echo "{os.path.realpath(sys.executable)}"\n'
    )
    (tools / "uv").chmod(0o755)
    done = run_setup(checkout, PATH=f"{tools}:{SYSTEM_PATH}")
    assert f"setup: making .venv with {os.path.realpath(sys.executable)}" in done.stdout
