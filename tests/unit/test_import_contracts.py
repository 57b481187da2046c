"""The import contracts of pyproject.toml: they hold, and they fail where a module breaks them."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from importlinter.cli import EXIT_STATUS_ERROR, EXIT_STATUS_SUCCESS, lint_imports

ROOT = Path(__file__).parents[2]
PACKAGE = "megatron_smartmoe"
NO_SIMULATOR = "what trains imports neither the simulator nor a peer's rule"


@pytest.fixture
def copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The package and its contracts in another place, from which the linter reads them."""
    shutil.copytree(ROOT / PACKAGE, tmp_path / PACKAGE, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    loaded = {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] == PACKAGE}
    yield tmp_path / PACKAGE
    for name in [name for name in sys.modules if name.split(".")[0] == PACKAGE]:
        del sys.modules[name]
    sys.modules.update(loaded)


def broken_contracts(capsys: pytest.CaptureFixture[str]) -> tuple[int, list[str]]:
    """The linter's exit status, and the names of the contracts that are broken."""
    status = lint_imports(config_filename="pyproject.toml", no_cache=True)
    lines = capsys.readouterr().out.splitlines()
    return status, [line.removesuffix(" BROKEN") for line in lines if line.endswith(" BROKEN")]


def test_the_package_keeps_its_contracts(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert broken_contracts(capsys) == (EXIT_STATUS_SUCCESS, [])


@pytest.mark.parametrize("module", ["placement/policy.py", "runtime/controller.py", "adapter/loops/homes.py"])
@pytest.mark.parametrize("imported", ["simulate.run", "simulate.baselines.eplb"])
def test_what_trains_must_not_import_the_simulator(
    copied: Path, capsys: pytest.CaptureFixture[str], module: str, imported: str
) -> None:
    with (copied / module).open("a", encoding="utf-8") as file:
        file.write(f"\nimport {PACKAGE}.{imported}\n")
    status, broken = broken_contracts(capsys)
    assert status == EXIT_STATUS_ERROR
    assert NO_SIMULATOR in broken
