"""Flags out of a configuration and a command line: who wins, and the way there and back."""

from __future__ import annotations

import subprocess

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_smartmoe.adapter.launch.flags import as_mapping, merge, render, tokens_of
from megatron_smartmoe.spec.run import FlagValue

KNOWN = {"--lr", "--save", "--swiglu", "--split", "--no-load-optim", "--data-path"}


@pytest.mark.parametrize(
    ("value", "tokens"),
    [
        (True, ["--x"]),
        ("1e-3", ["--x", "1e-3"]),
        ("", ["--x", ""]),
        (["0.3", "a", "0.7", "b"], ["--x", "0.3", "a", "0.7", "b"]),
    ],
)
def test_tokens_are_what_argparse_reads(value: object, tokens: list[str]) -> None:
    assert tokens_of("x", value) == tokens  # type: ignore[arg-type]


MERGES: dict[str, tuple[dict[str, FlagValue], list[str], list[str]]] = {
    "both": ({"lr": "1", "swiglu": True}, ["--save", "here"], ["--lr", "1", "--swiglu", "--save", "here"]),
    "the command line wins": ({"lr": "1", "split": "9,1"}, ["--lr", "2"], ["--split", "9,1", "--lr", "2"]),
    "with an equals sign too": ({"lr": "1"}, ["--lr=2"], ["--lr=2"]),
    "several values give way together": ({"data-path": ["a", "b"]}, ["--data-path", "c"], ["--data-path", "c"]),
    "--no-X takes X away": ({"swiglu": True, "lr": "1"}, ["--no-swiglu"], ["--lr", "1"]),
    "--no-X takes a value away": ({"save": "x"}, ["--no-save", "--lr", "1"], ["--lr", "1"]),
    "a --no-X of Megatron's stays": ({"load-optim": True}, ["--no-load-optim"], ["--load-optim", "--no-load-optim"]),
    "a --no-X of nothing is for Megatron to refuse": ({"lr": "1"}, ["--no-such"], ["--lr", "1", "--no-such"]),
    "negative numbers are values": ({"lr": "1"}, ["--split", "-1"], ["--lr", "1", "--split", "-1"]),
    "a flag given twice stays twice": ({"lr": "1"}, ["--lr", "2", "--lr", "3"], ["--lr", "2", "--lr", "3"]),
    "nothing": ({}, [], []),
}


@pytest.mark.parametrize("name", MERGES)
def test_merging(name: str) -> None:
    config, command_line, expected = MERGES[name]
    assert merge(config, command_line, KNOWN) == expected


def test_merging_changes_neither_input() -> None:
    config: dict[str, str | bool | list[str]] = {"lr": "1", "swiglu": True}
    command_line = ["--no-swiglu"]
    merge(config, command_line, KNOWN)
    assert (config, command_line) == ({"lr": "1", "swiglu": True}, ["--no-swiglu"])


@pytest.mark.parametrize(
    ("tokens", "mapping"),
    [
        (["--lr", "1", "--swiglu", "--betas", "0.9", "0.95"], {"lr": "1", "swiglu": True, "betas": ["0.9", "0.95"]}),
        (["--lr=1", "--a=b=c"], {"lr": "1", "a": "b=c"}),
        (["--lr", "1", "--save", "x", "--lr", "2"], {"save": "x", "lr": "2"}),
        (["--seed", "-1"], {"seed": "-1"}),
        (["--wandb-project="], {"wandb-project": ""}),
        ([], {}),
    ],
)
def test_tokens_read_back(tokens: list[str], mapping: dict[str, object]) -> None:
    assert as_mapping(tokens) == mapping


_NAMES = st.text("abz09", min_size=1, max_size=4)
_TEXTS = st.text("ab-= .0é", max_size=6).filter(lambda text: not text.startswith("--"))
_VALUES = st.one_of(st.just(True), _TEXTS, st.lists(_TEXTS, min_size=2, max_size=4))
_FLAGS = st.dictionaries(_NAMES, _VALUES, max_size=6)


@given(_FLAGS)
def test_there_and_back(flags: dict[str, str | bool | list[str]]) -> None:
    tokens = [token for name, value in flags.items() for token in tokens_of(name, value)]
    assert as_mapping(tokens) == flags


@given(_FLAGS, _FLAGS)
def test_merged_flags_say_what_both_say(
    config: dict[str, str | bool | list[str]], command_line: dict[str, str | bool | list[str]]
) -> None:
    tokens = [token for name, value in command_line.items() for token in tokens_of(name, value)]
    known = {f"--{name}" for name in [*config, *command_line]}
    assert as_mapping(merge(config, tokens, known)) == config | command_line


@settings(max_examples=30, deadline=None)
@given(st.lists(st.text("ab-='\"$`\\\n #*~é", min_size=1, max_size=8), min_size=1))
def test_a_shell_reads_any_command_back(words: list[str]) -> None:
    command = render(["printf", "%s\\0", *words], {"X": "$Y"})
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert done.stdout.split("\0") == [*words, ""]


def test_a_command_is_rendered_with_a_flag_a_line() -> None:
    text = render(["python", "-m", "x", "--betas", "0.9", "0.95", "--save", "a b", "--swiglu"], {"A": "1", "B": "2 3"})
    assert text == "A=1 B='2 3' python -m x \\\n  --betas 0.9 0.95 \\\n  --save 'a b' \\\n  --swiglu"


@pytest.mark.parametrize(
    ("config", "command_line", "expected"),
    [
        ({"data-path": "a", "split": "1,1,0"}, ["--mock-data"], ["--split", "1,1,0", "--mock-data"]),
        ({"lr-warmup-fraction": "0.1"}, ["--lr-warmup-iters", "2"], ["--lr-warmup-iters", "2"]),
        (
            {"train-data-path": "a", "valid-data-path": "b"},
            ["--train-data-path", "c"],
            ["--valid-data-path", "b", "--train-data-path", "c"],
        ),
    ],
)
def test_another_way_to_say_it_replaces_the_configurations(
    config: dict[str, str | bool | list[str]], command_line: list[str], expected: list[str]
) -> None:
    assert merge(config, command_line, KNOWN) == expected
