"""Errors say field, value, rule and way out, and survive the way from a worker process to its parent."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest

from megatron_smartmoe.errors import CompatError, ConfigError, SmartMoEError


def test_the_message_is_field_value_rule_and_way_out() -> None:
    error = ConfigError("--nproc", 0, "must be at least 1", "Pass the number of ranks per node.")
    assert str(error) == "--nproc = 0: must be at least 1. Pass the number of ranks per node."
    assert (error.field, error.value, error.rule) == ("--nproc", 0, "must be at least 1")
    assert error.way_out == "Pass the number of ranks per node."


@pytest.mark.parametrize(
    ("value", "shown"), [("3e8", "'3e8'"), (3e8, "300000000.0"), (None, "None"), (["a"], "['a']"), ("", "''")]
)
def test_the_value_shows_its_type(value: object, shown: str) -> None:
    assert str(ConfigError("a.b", value, "is wrong", "Mend it.")) == f"a.b = {shown}: is wrong. Mend it."


@pytest.mark.parametrize("length", [200, 203, 10_000])
def test_a_long_value_is_cut(length: int) -> None:
    value = "a" + "b" * (length - 4) + "c"  # its repr has `length` characters
    error = ConfigError("a.b", value, "is wrong", "Mend it.")
    assert error.value == value
    shown = str(error).removeprefix("a.b = ").removesuffix(": is wrong. Mend it.")
    if length <= 200:
        assert shown == repr(value)
    else:
        assert shown.startswith("'abbb")
        assert shown.endswith("bbbc'")
        assert f" ... ({length - 200} characters) ... " in shown
        assert len(shown) < 240
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


def test_what_a_terminal_does_not_print_is_escaped() -> None:
    error = ConfigError("a\nb\ud800", "c\x1b[2J", "is wrong\x07", "Give\n  another\0.")
    assert str(error) == "a\\nb\\ud800 = 'c\\x1b[2J': is wrong\\x07. Give\n  another\\x00."
    assert len(str(ConfigError("k" * 10_000, None, "is wrong", "Mend it."))) < 300


def test_a_value_that_stands_for_a_billion_entries_is_not_written_out() -> None:
    value: object = ["x"] * 9
    for _ in range(9):
        value = [value] * 9
    assert len(str(ConfigError("a", {"b": value}, "is wrong", "Mend it."))) < 300
    assert str(ConfigError("a", 10**5000, "is wrong", "Mend it.")) == "a = a int: is wrong. Mend it."


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("value", [None, "text", 3, Path("runs/a"), {"prefix": ["a", 1]}])
def test_pickling_keeps_the_four_parts(value: object, protocol: int) -> None:
    error = ConfigError("data.prefix", value, "is wrong", "Mend it.")
    again = pickle.loads(pickle.dumps(error, protocol))
    assert type(again) is ConfigError
    assert vars(again) == vars(error)
    assert str(again) == str(error)


def test_copying_keeps_the_four_parts() -> None:
    error = ConfigError("a", [1], "is wrong", "Mend it.")
    again = copy.deepcopy(error)
    assert vars(again) == vars(error)
    assert again.value is not error.value


class _Narrow(ConfigError):
    """A subclass pickles as itself."""


def test_a_subclass_pickles_as_itself() -> None:
    assert type(pickle.loads(pickle.dumps(_Narrow("a", 1, "is wrong", "Mend it.")))) is _Narrow


@pytest.mark.parametrize("error", [ConfigError("a", 1, "is wrong", "Mend it."), CompatError("too old")])
def test_one_base_class_catches_all(error: Exception) -> None:
    assert isinstance(error, SmartMoEError)
    assert not isinstance(error, ValueError | RuntimeError)


def test_a_compat_error_pickles() -> None:
    assert str(pickle.loads(pickle.dumps(CompatError("too old")))) == "too old"


def test_a_config_error_says_where_the_value_was_set() -> None:
    error = ConfigError("--lr", 0, "must be positive", "Pass 1e-3.").set_by("a.yaml, flags.training.lr")
    assert str(error) == "--lr = 0 (a.yaml, flags.training.lr): must be positive. Pass 1e-3."
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
    assert error.set_by("command line") is error
    assert ConfigError("--lr", 0, "must be positive", "Pass 1e-3.").set_by(None).origin == ""
