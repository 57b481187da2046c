"""`smartmoe calibrate` as a command: options are checked before torch is started, and arrive as they were meant."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_smartmoe.calibrate.options import CalibrateOptions, add_arguments, as_argv
from megatron_smartmoe.cli.main import main


def options_of(*argv: str) -> CalibrateOptions:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return CalibrateOptions.of(parser.parse_args(argv))


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    commands: list[list[str]] = []

    def run(command: list[str], check: bool) -> SimpleNamespace:
        commands.append(command)
        return SimpleNamespace(returncode=3)

    monkeypatch.setattr(subprocess, "run", run)
    return commands


def test_it_starts_the_module_that_measures(started: list[list[str]], tmp_path: Path) -> None:
    output = str(tmp_path / "mine.yaml")
    assert main(["calibrate", "--nproc", "2", "--tokens", "64,8,8", "--output", output, "--sizes", "1e3,4e6"]) == 3
    (command,) = started
    assert command[:3] == [sys.executable, "-m", "megatron_smartmoe.adapter.launch.calibrate"]
    assert options_of(*command[3:]) == options_of(
        "--nproc", "2", "--tokens", "8,64", "--output", output, "--sizes", "1000,4000000"
    )


def test_the_command_line_survives_the_way() -> None:
    everything = ["--output", "a b.yaml", "--overwrite", "--name", "n", "--nproc", "3", "--device", "cpu"]
    everything += ["--compare", "c.yaml", "--hidden", "8", "--ffn", "16", "--experts", "2", "--tokens", "1,2"]
    everything += ["--sizes", "10,20", "--repeats", "4"]
    assert as_argv(options_of(*everything)) == everything
    assert as_argv(options_of()) == []


def test_defaults_depend_on_the_device() -> None:
    for kind in ("cuda", "cpu"):
        found = options_of("--hidden", "48").for_device(kind)
        assert found.hidden == 48
        assert None not in (found.ffn, found.experts, found.tokens, found.sizes)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--nproc", "0"], "--nproc = 0: must be at least 1. For example: --nproc 8."),
        (["--repeats", "-1"], "--repeats = -1: must be at least 1"),
        (
            ["--tokens", "8,8"],
            "--tokens = (8,): needs at least two different amounts. For example: ",
        ),
        (["--output", "HERE"], "exists already. Name another file, or add --overwrite."),
    ],
)
def test_wrong_input(
    options: list[str], message: str, started: list[list[str]], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "there.yaml").write_text("")
    assert main(["calibrate", *(str(tmp_path / "there.yaml") if each == "HERE" else each for each in options)]) == 2
    assert message in capsys.readouterr().err
    assert started == []


@pytest.mark.parametrize("text", ["8,x", "0,8", "", "nan"])
def test_amounts_are_positive_whole_numbers(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["calibrate", "--tokens", text])
    assert "is not a list of positive whole numbers, such as 8,64,512" in capsys.readouterr().err
