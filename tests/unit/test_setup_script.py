"""scripts/setup.sh finds a Python 3.12, or says in one message what to do."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SYSTEM_PATH = "/usr/bin:/bin"

pytestmark = pytest.mark.slow  # makes environments


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
    # pip, which takes seconds to install, is not needed here
    real = f'exec "{os.path.realpath(sys.executable)}" "$@"'
    quick = 'if [ "$1 $2" = "-m venv" ]; then set -- "$@" --without-pip; fi'
    (tools / "python").write_text(f"#!/bin/sh\n{quick}\n{real}\n")
    (tools / "python").chmod(0o755)
    (tools / "uv").write_text(f'#!/bin/sh\n[ "$*" = "python find 3.12" ] && echo "{tools}/python"\n')
    (tools / "uv").chmod(0o755)
    done = run_setup(checkout, PATH=f"{tools}:{SYSTEM_PATH}")
    assert f"setup: making .venv with {tools}/python" in done.stdout


# --- on top of an environment that is there, and with another torch


def test_the_packages_of_an_active_environment_are_used(checkout: Path) -> None:
    """Without pyproject.toml the installation ends behind the venv, which is all that is looked at here."""
    done = run_setup(checkout, SMARTMOE_SITE="1", SMARTMOE_PYTHON=sys.executable)
    version = importlib.metadata.version("torch")
    assert f"setup: making .venv on top of {sys.executable}, with its torch {version}\n" in done.stdout
    assert f"setup: installing what is missing beside torch {version} into .venv" in done.stdout
    assert (checkout / ".venv" / "torch.txt").read_text() == f"torch==={version}\n"
    look = "import importlib.util as u; print(u.find_spec('torch').origin)"
    found = subprocess.run([checkout / ".venv/bin/python", "-c", look], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == importlib.util.find_spec("torch").origin  # type: ignore[union-attr]
    again = run_setup(checkout)  # the scripts that call this one need not be told
    assert "making .venv" not in again.stdout
    assert f"setup: installing what is missing beside torch {version} into .venv" in again.stdout


def test_an_environment_without_torch_is_refused(checkout: Path, tmp_path: Path) -> None:
    python = tmp_path / "empty" / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "empty")], check=True)
    done = run_setup(checkout, SMARTMOE_SITE="1", SMARTMOE_PYTHON=str(python))
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        f"error: torch = None: {python} cannot import it (ModuleNotFoundError: No module named 'torch').",
        "       Activate the environment that has it, set SMARTMOE_PYTHON to its Python, or unset SMARTMOE_SITE for a "
        "torch in .venv.",
    ]
    assert not (checkout / ".venv").exists()


def test_an_environment_with_an_old_torch_is_refused(checkout: Path, tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "old")], check=True)
    (tmp_path / "old" / "lib" / "python3.12" / "site-packages" / "torch.py").write_text("__version__ = '2.9.1+cu126'\n")
    python = tmp_path / "old" / "bin" / "python"
    done = run_setup(checkout, SMARTMOE_SITE="1", SMARTMOE_PYTHON=str(python))
    assert done.stderr.splitlines()[0] == f"error: torch = 2.9.1+cu126: of {python}, and 2.10 or newer is needed."


def test_another_torch_comes_from_where_the_user_says(checkout: Path) -> None:
    done = run_setup(
        checkout,
        SMARTMOE_PYTHON=os.path.realpath(sys.executable),
        SMARTMOE_TORCH="torch==2.10.0",
        SMARTMOE_TORCH_INDEX=f"file://{checkout}/absent",
    )
    assert "setup: installing torch==2.10.0 into .venv" in done.stdout
    assert done.returncode == 1
    assert (
        f"install --disable-pip-version-check --index-url file://{checkout}/absent torch==2.10.0' failed" in done.stderr
    )
    assert (checkout / ".venv" / ".smartmoe-settings").read_text() == f"\ntorch==2.10.0\nfile://{checkout}/absent\n"


def test_two_torches_are_one_too_many(checkout: Path) -> None:
    done = run_setup(checkout, SMARTMOE_SITE="1", SMARTMOE_TORCH="torch==2.10.0")
    assert done.stderr == (
        "error: SMARTMOE_SITE = 1: uses the torch that is there, and SMARTMOE_TORCH asks for another. "
        "Unset one of the two.\n"
    )
