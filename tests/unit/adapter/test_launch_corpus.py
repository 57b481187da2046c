"""The corpus that a configuration asks for: when it is read, how it is prepared, what is refused."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_smartmoe.adapter.launch import corpus
from megatron_smartmoe.errors import ConfigError
from megatron_smartmoe.spec.run import RunSpec

DATA = {"prefix": "data/x/corpus", "python-stdlib": True, "max-bytes": 8000, "input": ["a", "b"], "quiet": False}
PREPARE = [sys.executable, "-m", "megatron_smartmoe.adapter.corpus", "--output-prefix", "data/x/corpus"]
PREPARE += ["--python-stdlib", "--max-bytes", "8000", "--input", "a", "b"]
SPEC = RunSpec(name="a", data=DATA)


class Commands(list[list[str]]):
    """The commands that would have been run, and how they end."""

    status = 0

    def run(self, command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        self.append(command)
        return subprocess.CompletedProcess(command, self.status)


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> Commands:
    commands = Commands()
    monkeypatch.setattr(corpus.subprocess, "run", commands.run)
    return commands


def test_a_corpus_is_there_when_all_of_it_is(tmp_path: Path) -> None:
    spec = RunSpec(name="a", data={"prefix": str(tmp_path / "corpus")})
    for suffix in (".bin", ".json", ".idx"):
        assert not corpus.exists(spec)
        (tmp_path / f"corpus{suffix}").touch()
    assert corpus.exists(spec)


def test_no_corpus_is_no_work() -> None:
    spec = RunSpec(name="a")
    assert corpus.exists(spec)
    assert corpus.dataset_flags(spec) == {}


def test_the_command_that_prepares_it() -> None:
    assert corpus.preparation(SPEC) == PREPARE


def test_the_option_names_are_those_of_the_command() -> None:
    """Whatever a configuration may say, the command's parser reads."""
    from megatron_smartmoe.adapter.corpus.command import build_parser

    options = build_parser().parse_args(corpus.preparation(SPEC)[3:])
    assert (options.python_stdlib, options.max_bytes, options.inputs) == (True, 8000, ["a", "b"])
    assert str(options.output_prefix) == "data/x/corpus"


def test_it_is_prepared(commands: Commands, capfd: pytest.CaptureFixture[str]) -> None:
    corpus.prepare(SPEC)
    assert commands == [PREPARE]
    assert capfd.readouterr().out == "smartmoe: preparing the corpus data/x/corpus (only before the first run)\n"


def test_a_corpus_that_cannot_be_prepared(commands: Commands) -> None:
    commands.status = 3
    with pytest.raises(ConfigError) as caught:
        corpus.prepare(RunSpec(name="a", data={"prefix": "absent/x"}))
    assert str(caught.value) == (
        "data.prefix = 'absent/x': could not be prepared (exit status 3). See the error above."
    )


KNOWN = (
    "prefix, append-eod, chat-template, force, input, json-keys, max-bytes, no-append-eod, on-bad-line, python-stdlib, "
    "quiet, seed, tiktoken-num-special-tokens, tiktoken-pattern, tokenizer-hf-no-include-special-tokens, "
    "tokenizer-model, tokenizer-sample-bytes, tokenizer-special-tokens, tokenizer-type, vocab-size, workers"
)


@pytest.mark.parametrize(("key", "value"), [("pythonstdlib", True), ("output_prefix", "x"), ("Seed", None), (7, "x")])
def test_an_unknown_key_is_refused(commands: Commands, key: Any, value: Any) -> None:
    """Also one without a value; and nothing is run."""
    spec = RunSpec(name="a", data={"prefix": "x", key: value})
    for refuse in (corpus.preparation, corpus.prepare):
        with pytest.raises(ConfigError) as caught:
            refuse(spec)
        rule = "is not an option of scripts/prepare_data.py"
        assert str(caught.value) == f"data.{key} = {value!r}: {rule}. Known here: {KNOWN}."
    assert commands == []


@pytest.mark.parametrize("key", ["-h", "help", "output-prefix"])
def test_only_options_of_the_corpus_are_known(key: str) -> None:
    """`output-prefix` would prepare one corpus and read another; `help` would prepare none, in success."""
    with pytest.raises(ConfigError, match=f"^data.{key} = 'y': is not an option of scripts/prepare_data.py. "):
        corpus.preparation(RunSpec(name="a", data={"prefix": "x", key: "y"}))


def test_nothing_is_said_of_a_preparation_that_is_refused(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError):
        corpus.prepare(RunSpec(name="a", data={"prefix": "x", "typo": 1}))
    assert capfd.readouterr().out == ""


def test_the_flags_that_read_the_data() -> None:
    prefix = {"prefix": "data/x/corpus"}
    assert corpus.dataset_flags(RunSpec(name="a", data=prefix)) == {
        "data-path": "data/x/corpus",
        "tokenizer-type": "SentencePieceTokenizer",
        "tokenizer-model": "data/x/corpus.tokenizer.model",
    }
    own = corpus.dataset_flags(RunSpec(name="a", data=prefix | {"tokenizer-model": "mine.model"}))
    assert own["tokenizer-model"] == "mine.model"
    assert corpus.dataset_flags(RunSpec(name="a")) == {}


@pytest.mark.parametrize(
    "command_line",
    [
        ["--mock-data"],
        ["--lr", "1", "--data-path", "0.3", "a", "0.7", "b"],
        ["--data-path=other"],
        ["--train-data-path", "a", "--valid-data-path", "b"],
        ["--data-args-path", "list"],
        ["--per-split-data-args-path=list"],
    ],
)
def test_other_data_on_the_command_line_drops_the_corpus(command_line: list[str]) -> None:
    spec = RunSpec(name="a", nproc=2, data=DATA, flags={"lr": "1"})
    assert corpus.only_if_read(spec, command_line) == RunSpec(name="a", nproc=2, data=None, flags={"lr": "1"})


@pytest.mark.parametrize("command_line", [[], ["--lr", "1"], ["--save", "mock-data"], ["--data-cache-path", "x"]])
def test_other_flags_leave_the_corpus(command_line: list[str]) -> None:
    assert corpus.only_if_read(SPEC, command_line) is SPEC
    assert corpus.only_if_read(RunSpec(name="b"), command_line) == RunSpec(name="b")
