"""Run configurations: what a file says, and what is said of a wrong one."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_smartmoe.errors import ConfigError
from megatron_smartmoe.spec.run import RunSpec, load_run_spec

Load = Callable[[str], RunSpec]
VALUES = "must be a number, a text, true, false or a list. See configs/runs/quickstart.yaml."


@pytest.fixture
def load(tmp_path: Path) -> Load:
    def load_text(text: str) -> RunSpec:
        path = tmp_path / "mine.yaml"
        path.write_text(text, encoding="utf-8")
        return load_run_spec(path)

    return load_text


def test_the_example_of_the_docstring(load: Load) -> None:
    text = """
name: quickstart
nproc: 4
data:
  prefix: data/python/corpus
  python-stdlib: true
flags:
  model:
    num-layers: 4
    swiglu: true
    add-bias: false
    qkv-bias:
    data-path: [0.3, a, 0.7, b]
  training:
    lr: 3e-4
    save: "{run_dir}/checkpoints"
"""
    assert load(text) == RunSpec(
        name="quickstart",
        nproc=4,
        data={"prefix": "data/python/corpus", "python-stdlib": True},
        flags={
            "num-layers": "4",
            "swiglu": True,
            "data-path": ["0.3", "a", "0.7", "b"],
            "lr": "0.0003",
            "save": "{run_dir}/checkpoints",
        },
    )


def test_gpus_have_flags_of_their_own(load: Load) -> None:
    entries = "[{nproc: 2, bf16: true, fp16: false}, {nproc: 8, ep: 4}]"
    spec = load(f"nproc: 4\nflags: {{a: {{fp16: true, ep: 2, lr: 1}}}}\ngpus: {entries}\n")
    two = spec.on_gpus(7)
    assert (two.nproc, two.flags, two.gpus) == (2, {"ep": "2", "lr": "1", "bf16": True}, {})
    assert two.origins["bf16"] == "mine, gpus.2.bf16"
    eight = spec.on_gpus(16)
    assert (eight.nproc, eight.flags) == (8, {"fp16": True, "ep": "4", "lr": "1"})
    with pytest.raises(ConfigError, match="gpus = 1: there are entries for 2, 8 GPUs, and none for so few"):
        spec.on_gpus(1)
    assert load("nproc: 4\nflags:\n").on_gpus(8) == load("nproc: 4\nflags:\n")


@pytest.mark.parametrize(
    ("gpus", "says"),
    [
        ("{nproc: 8}", "gpus = {'nproc': 8}: must be a list of mappings of flags to values"),
        ("[8]", "gpus = [8]: must be a list of mappings of flags to values"),
        ("[{bf16: true}]", "gpus = {'bf16': True}: each needs nproc, a number of ranks per node of its own"),
        ("[{nproc: 8}, {nproc: 8}]", "gpus = {'nproc': 8}: each needs nproc, a number of ranks per node of its own"),
        ("[{nproc: 8, --bf16: true}]", "gpus.8.--bf16 = True: is a flag with its dashes"),
    ],
)
def test_wrong_gpus(load: Load, gpus: str, says: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(says)):
        load(f"flags:\ngpus: {gpus}\n")


def test_everything_is_optional(load: Load) -> None:
    assert load("flags:\n") == RunSpec(name="mine", nproc=None, data=None, flags={})


def test_the_name_is_text(load: Load) -> None:
    assert load("name: 7").name == "7"


def test_an_empty_name_is_the_name_of_the_file(load: Load) -> None:
    assert load("name:\n").name == "mine"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("4", "4"),
        ("-1", "-1"),
        ("0.1", "0.1"),
        ("1e-3", "0.001"),
        ("3e-05", "3e-05"),
        ("1e22", "1e+22"),
        ("no", "no"),
        ("010", "010"),
        ("1:30:00", "1:30:00"),
        ("3e8", "300000000"),
        ("2026-01-02", "2026-01-02"),
        ("-2.0", "-2"),
        ("9007199254740994.0", "9007199254740994.0"),
        (".inf", "inf"),
        ("'3e8'", "3e8"),
        ("'true'", "true"),
        ("95,5,0", "95,5,0"),
        ("''", ""),
        ("true", True),
        ("[1, 2.5, no]", ["1", "2.5", "no"]),
    ],
)
def test_values_become_what_argparse_reads(load: Load, text: str, value: object) -> None:
    assert load(f"flags:\n  a:\n    x: {text}\n").flags == {"x": value}


@pytest.mark.parametrize(("text", "value"), [("010", 10), ("3e8", 300_000_000), ("8_000", 8000)])
def test_a_whole_number_suits_a_flag_for_whole_numbers(load: Load, text: str, value: int) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--train-samples", type=int)
    text = str(load(f"flags: {{a: {{train-samples: {text}}}}}").flags["train-samples"])
    assert parser.parse_args(["--train-samples", text]).train_samples == value


@pytest.mark.parametrize("text", ["false", "null", "", "~"])
def test_false_and_nothing_leave_a_flag_out(load: Load, text: str) -> None:
    assert load(f"flags:\n  a:\n    x: {text}\n").flags == {}


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_no_digit_of_a_float_is_lost(value: float) -> None:
    from megatron_smartmoe.spec.run import _as_text

    text = _as_text("flags.a.x", "x", value)
    assert isinstance(text, str)
    assert float(text) == value


ERRORS = {
    "nprocs: 4": "nprocs = 4: is not a known key. Known here: name, nproc, data, flags, gpus.",
    **{
        f"nproc: {text}": f"nproc = {value}: must be a positive whole number of ranks per node. For example: nproc: 4."
        for text, value in {"0": "0", "-1": "-1", "true": "True", "2.0": "2.0", "four": "'four'", "[4]": "[4]"}.items()
    },
    "data: corpus": "data = 'corpus': must be a mapping with `prefix`. For example: data: {prefix: data/my/corpus}.",
    "data: {input: a}": "data = {'input': 'a'}: must be a mapping with `prefix`. "
    "For example: data: {prefix: data/my/corpus}.",
    **{
        f"data: {{prefix: {text}}}": f"data.prefix = {value}: must be the path of a dataset, without .bin. "
        "For example: data: {prefix: data/my/corpus}."
        for text, value in {"null": "None", "7": "7", "[a]": "['a']", "''": "''"}.items()
    },
    "flags: [lr]": "flags = ['lr']: must be groups of flags. For example: flags: {model: {num-layers: 4}}.",
    "flags: {lr: 1}": "flags.lr = 1: must be a group: a mapping of flags to values. Write flags: {lr: {...}}.",
    "flags: {a: {lr: 1}, b: {lr: 2}}": "flags.b.lr = 2: is given in another group too. "
    "Remove lr from one of the groups.",
    "flags: {a: {swiglu: false}, b: {swiglu: true}}": "flags.b.swiglu = True: is given in another group too. "
    "Remove swiglu from one of the groups.",
    "flags: {a: {swiglu: true}, b: {swiglu: }}": "flags.b.swiglu = None: is given in another group too. "
    "Remove swiglu from one of the groups.",
    "flags: false": "flags = False: must be groups of flags. For example: flags: {model: {num-layers: 4}}.",
    "flags: {a: }": "flags.a = None: must be a group: a mapping of flags to values. Write flags: {a: {...}}.",
    "flags: {a: {--lr: 1}}": "flags.a.--lr = 1: is a flag with its dashes. Write lr.",
    "flags: {a: {lr: {b: 1}}}": "flags.a.lr = {'b': 1}: " + VALUES,
    "name: [a]": "name = ['a']: must be a text on one line. For example: name: mine.",
    "flags: {a: {lr: .nan}}": "flags.a.lr = nan: is not a number. Write a number.",
    **{
        f"flags: {{a: {{lr: {text}}}}}": f"flags.a.lr = {value}: {VALUES}"
        for text, value in {
            "[1, null]": "[1, None]",
            "[true]": "[True]",
            "[[1]]": "[[1]]",
            "[{a: 1}]": "[{'a': 1}]",
        }.items()
    },
}


@pytest.mark.parametrize("text", ERRORS)
def test_each_error_says_field_value_rule_and_way_out(load: Load, text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(text)
    where, _, message = str(caught.value).partition(":1: ")
    assert where.endswith("mine.yaml")
    assert message == ERRORS[text]


def test_a_spec_does_not_change() -> None:
    spec: Any = RunSpec(name="a")
    with pytest.raises(AttributeError):
        spec.name = "b"
