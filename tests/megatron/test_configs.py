"""Every shipped run configuration of one machine is parsed, by the launcher and by Megatron, without starting a rank.

Those of a cluster are checked by test_cluster_configs.py.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_smartmoe.adapter.launch.flags import as_mapping
from megatron_smartmoe.spec.run import load_run_spec
from tests.megatron.test_cluster_configs import nodes_of
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.dist

ROOT = Path(__file__).parents[2]
CONFIGS = [path for path in sorted((ROOT / "configs" / "runs").glob("*.yaml")) if not nodes_of(path)]
ENTRY = "megatron_smartmoe.adapter.pretrain"


@pytest.fixture(scope="module", params=CONFIGS, ids=lambda path: path.stem)
def config(request: pytest.FixtureRequest) -> Path:
    path: Path = request.param
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, config: Path) -> Path:
    """An empty working directory, so that whatever is created shows."""
    return tmp_path_factory.mktemp(config.stem)


@pytest.fixture(scope="module")
def printed(config: Path, folder: Path) -> str:
    """The output of a dry run."""
    return _dry_run(config, folder)


def _dry_run(config: Path, folder: Path, *flags: str) -> str:
    command = [sys.executable, "-m", "megatron_smartmoe.adapter.launch", "--config", str(config), "--dry-run", *flags]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


@pytest.fixture(scope="module")
def flags(printed: str) -> list[str]:
    """The flags of the printed command, as the ranks get them."""
    command = printed.rsplit("\n\n", 1)[-1]
    words = [word for line in command.splitlines() for word in _words(line)]
    return words[words.index(ENTRY) + 1 :]


def _words(line: str) -> list[str]:
    import shlex

    return shlex.split(line.removesuffix("\\"))


def test_there_are_configurations() -> None:
    assert "quickstart" in {path.stem for path in CONFIGS}


def test_a_dry_run_creates_nothing(printed: str, folder: Path) -> None:
    assert list(folder.iterdir()) == []


def test_a_dry_run_prints_a_command_that_a_shell_reads(printed: str) -> None:
    subprocess.run(["bash", "-n"], input=printed, text=True, check=True)
    assert f"--module {ENTRY} \\\n" in printed


def test_the_printed_command_holds_the_configuration(config: Path, flags: list[str]) -> None:
    spec, said = load_run_spec(config), as_mapping(flags)
    directory = str(said["smartmoe-run-dir"])
    assert directory.startswith(f"runs/{spec.name}-")
    for name, value in spec.flags.items():
        assert said[name] == (value.replace("{run_dir}", directory) if isinstance(value, str) else value)


def test_data_of_the_configuration_is_what_the_command_reads(config: Path, printed: str, flags: list[str]) -> None:
    data = load_run_spec(config).data
    if data is None:
        assert "--module" in printed
        return
    assert "# first, once:\n" in printed
    assert f"--output-prefix {data['prefix']}" in printed
    assert as_mapping(flags)["data-path"] == data["prefix"]


def test_mock_data_on_the_command_line_drops_the_data(config: Path, folder: Path) -> None:
    """Neither prepared nor read; Megatron would refuse both at once."""
    printed = _dry_run(config, folder, "--mock-data", "--tokenizer-type", "NullTokenizer", "--vocab-size", "2048")
    assert "# first" not in printed
    assert "--data-path" not in printed
    assert "--tokenizer-model" not in printed
    assert "  --mock-data \\\n" in printed


def _judge(argv: list[str], world_size: int) -> dict[str, Any]:
    from megatron_smartmoe.adapter.flags.megatron_checks import megatron_verdict
    from megatron_smartmoe.adapter.pretrain import check_flags, with_defaults

    os.environ["WORLD_SIZE"] = str(world_size)
    args = check_flags(with_defaults(argv, cpu=True, say=False), cpu=True, data_exists=False)
    megatron_verdict(args)
    return {name: value for name, value in vars(args).items() if isinstance(value, int | float | str)}


def test_megatron_accepts_the_printed_flags(config: Path, flags: list[str], tmp_path: Path) -> None:
    """Its own parser and its own validation, in a rank: every flag arrives with its value."""
    spec = load_run_spec(config)
    args = run_ranks(_judge, 1, flags, spec.nproc or 1, log_dir=tmp_path)[0]
    assert args["world_size"] == (spec.nproc or 1)
    for name, value in as_mapping(flags).items():
        arrived = args.get(name.replace("-", "_"))
        if isinstance(value, str) and arrived is not None:
            assert arrived in (value, True) or float(arrived) == float(value)
