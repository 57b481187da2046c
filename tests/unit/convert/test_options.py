from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from megatron_smartmoe.convert.launches import launch_of
from megatron_smartmoe.convert.options import ConvertOptions, add_arguments, as_argv
from megatron_smartmoe.convert.source import recognise
from megatron_smartmoe.errors import ConfigError


def parsed(*argv: str) -> ConvertOptions:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return ConvertOptions.of(parser.parse_args(argv))


@pytest.mark.parametrize(
    "argv",
    [
        ["a", "b", "--to", "hf"],
        ["a", "b", "--to", "megatron", "--for", "te", "--dtype", "bf16", "--from", "hf", "--workers", "2"],
        ["a", "b", "--to", "megatron", "--verify"],
        ["a", "b", "--to", "megatron", "--verify", "1", "EP4xPP2", "--ignore-config-key", "x"],
        ["a", "b", "--to", "megatron", "--experts", "8", "--topk", "4", "--granularity", "2", "--expert-noise", "0.1"],
        ["a", "b", "--to", "megatron", "--ep", "4", "--no-optim"],
        ["a", "b", "--to", "hf", "--hf-config", "c"],
        ["a", "b", "--to", "torch", "--tp", "2", "--pp", "4", "--ep", "8"],
    ],
)
def test_the_started_process_gets_the_same_options(argv: list[str]) -> None:
    assert parsed(*as_argv(parsed(*argv))) == parsed(*argv)


@pytest.mark.parametrize(
    ("argv", "rule"),
    [
        (["a", "a/b", "--to", "hf"], "is SOURCE or lies in it"),
        (["a", "b", "--to", "megatron", "--tp", "2"], "needs --to torch"),
        (["a", "b", "--to", "torch", "--pp", "0"], "must be at least 1"),
        (["a", "b", "--to", "hf", "--for", "te"], "has no meaning with --to hf"),
        (["a", "b", "--to", "hf", "--ep", "2"], "has no meaning with --to hf"),
        (["a", "b", "--to", "torch", "--hf-config", "c"], "needs --to hf"),
        (["a", "b", "--to", "megatron", "--expert-noise", "0.1"], "needs --experts"),
        (["a", "b", "--to", "megatron", "--seed", "7"], "needs --experts"),
        (["a", "b", "--to", "hf", "--workers", "0"], "must be at least 1"),
        (["a", "b", "--to", "megatron", "--topk", "2"], "needs --experts"),
        (["a", "b", "--to", "megatron", "--ep", "0"], "must be at least 1"),
        (["a", "b", "--to", "megatron", "--verify", "DP2"], "sizes of TP, PP and EP"),
        (["a", "b", "--to", "megatron", "--verify", "EP2xEP2"], "sizes of TP, PP and EP"),
        (["a", "b", "--to", "megatron", "--verify", "TP2xEP3"], "must divide the other"),
    ],
)
def test_wrong_options(argv: list[str], rule: str) -> None:
    with pytest.raises(ConfigError, match=rule):
        parsed(*argv)


def test_launches() -> None:
    launch = launch_of("EP4xPP2")
    assert launch.num_ranks == 8
    assert " ".join(launch.flags) == "--expert-model-parallel-size 4 --pipeline-model-parallel-size 2"
    assert launch_of("TP2xEP4").num_ranks == 4


def test_a_folder_that_is_nothing(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is no directory"):
        recognise(tmp_path / "missing")
    with pytest.raises(ConfigError, match="is neither a Hugging Face model"):
        recognise(tmp_path)
    with pytest.raises(ConfigError, match=r"has no config\.json"):
        recognise(tmp_path, "hf")
