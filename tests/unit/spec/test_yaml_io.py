"""YAML as people mean it: numbers, booleans, repeated keys, and what is said of files that are not YAML."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from megatron_smartmoe.errors import ConfigError
from megatron_smartmoe.spec.yaml_io import (
    dump_yaml,
    find_config,
    load_yaml,
    located,
    refuse_unknown_keys,
    shipped_directory,
)


@pytest.fixture
def load(tmp_path: Path) -> Any:
    def load_text(text: str) -> dict[str, Any]:
        path = tmp_path / "file.yaml"
        path.write_text(text, encoding="utf-8")
        return load_yaml(path)

    return load_text


@pytest.fixture
def error_of(load: Any, tmp_path: Path) -> Any:
    """The message for a text, with the file's path taken out."""

    def message(text: str) -> str:
        with pytest.raises(ConfigError) as caught:
            load(text)
        return str(caught.value).replace(str(tmp_path), "")

    return message


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3e8", 3e8),
        ("1e-3", 1e-3),
        ("-2E+4", -2e4),
        ("1.5e3", 1500.0),
        ("1_000.5", 1000.5),
        (".5", 0.5),
        ("-.5e2", -50.0),
        ("5.", 5.0),
        ("0.1", 0.1),
        (".inf", math.inf),
        ("-.inf", -math.inf),
    ],
)
def test_a_number_with_point_or_exponent_is_a_float(load: Any, text: str, value: float) -> None:
    loaded = load(f"key: {text}")["key"]
    assert loaded == value
    assert isinstance(loaded, float)


def test_not_a_number(load: Any) -> None:
    assert math.isnan(load("key: .nan")["key"])


@pytest.mark.parametrize(("text", "value"), [("0", 0), ("42", 42), ("-7", -7), ("+7", 7), ("8_000_000", 8_000_000)])
def test_a_whole_number_stays_one(load: Any, text: str, value: int) -> None:
    loaded = load(f"key: {text}")["key"]
    assert loaded == value
    assert isinstance(loaded, int)


@pytest.mark.parametrize(("text", "value"), [("true", True), ("True", True), ("FALSE", False), ("false", False)])
def test_only_true_and_false_are_booleans(load: Any, text: str, value: bool) -> None:
    assert load(f"key: {text}")["key"] is value


@pytest.mark.parametrize("text", ["no", "No", "NO", "yes", "on", "off", "y", "n", "tRUE"])
def test_other_words_stay_text(load: Any, text: str) -> None:
    assert load(f"key: {text}") == {"key": text}


@pytest.mark.parametrize("text", ["1.2.3", "e8", "3e", "1e5x", "-e5", ".", "95,5,0", "10k", "--flag", "0.9 0.95"])
def test_what_only_looks_like_a_number_stays_text(load: Any, text: str) -> None:
    assert load(f"key: {text}") == {"key": text}


@pytest.mark.parametrize("text", ["'3e8'", '"3e8"'])
def test_quotes_make_text(load: Any, text: str) -> None:
    assert load(f"key: {text}") == {"key": "3e8"}


@given(st.floats(allow_nan=False))
def test_every_float_that_python_prints_is_read_back(value: float) -> None:
    text = repr(value).replace("inf", ".inf")
    assert yaml.load(f"[{text}]", Loader=_loader()) == [value]


@given(st.integers(min_value=-(10**30), max_value=10**30))
def test_every_integer_is_read_back(value: int) -> None:
    (loaded,) = yaml.load(f"[{value}]", Loader=_loader())
    assert loaded == value
    assert type(loaded) is int


def _loader() -> Any:
    from megatron_smartmoe.spec import yaml_io

    return yaml_io._Loader


def test_the_rules_are_not_for_other_users_of_yaml() -> None:
    """The loader is a class of its own: PyYAML itself is left as it was."""
    assert yaml.safe_load("[3e8, no]") == ["3e8", False]


@pytest.mark.parametrize("text", ["010", "-010", "00", "0x1f", "0b11", "0o17", "1:30", "1:30:00", "1:30.5", "-1:30"])
def test_integers_are_decimal_and_have_no_leading_zero(load: Any, text: str) -> None:
    """What YAML 1.1 reads as octal, hexadecimal, binary or base 60 is text."""
    assert load(f"key: {text}") == {"key": text}


def test_nesting_lists_and_anchors_work(load: Any) -> None:
    text = "base: &base {a: 1e3, b: no}\nderived:\n  <<: *base\n  b: [yes, 2]\n"
    assert load(text) == {"base": {"a": 1000.0, "b": "no"}, "derived": {"a": 1000.0, "b": ["yes", 2]}}


def test_a_repeated_key_is_refused_with_its_line(error_of: Any) -> None:
    assert error_of("a: 1\nb: 2\na: 3\n") == "/file.yaml:3 = 'a': is given twice. Remove one of the two lines."


def test_a_repeated_key_is_found_at_any_depth(error_of: Any) -> None:
    text = "flags:\n  model:\n    lr: 1\n\n    lr: 2\n"
    assert error_of(text) == "/file.yaml:5 = 'lr': is given twice. Remove one of the two lines."


def test_a_repeated_key_is_found_in_a_list(error_of: Any) -> None:
    assert error_of("a: [{b: 1, b: 2}]\n") == "/file.yaml:1 = 'b': is given twice. Remove one of the two lines."


def test_the_same_key_in_two_groups_is_two_keys(load: Any) -> None:
    assert load("a: {x: 1}\nb: {x: 2}\n") == {"a": {"x": 1}, "b": {"x": 2}}


def test_a_missing_file(tmp_path: Path) -> None:
    path = tmp_path / "absent.yaml"
    with pytest.raises(ConfigError) as caught:
        load_yaml(path)
    assert str(caught.value) == (
        f"configuration file = '{path}': does not exist. Give the path of a YAML file; examples are in configs/."
    )


def test_a_file_that_is_not_yaml(error_of: Any) -> None:
    assert error_of("a: 1\nb: [1, 2\n") == (
        "/file.yaml:2 = 'b: [1, 2': is not YAML: expected ',' or ']', but got '<stream end>'. Correct line 2."
    )


REFUSED = {
    "a: !!python/object/apply:os.getcwd []": "/file.yaml:1 = 'a: !!python/object/apply:os.getcwd []': is not YAML: "
    "could not determine a constructor for the tag 'tag:yaml.org,2002:python/object/apply:os.getcwd'. Correct line 1.",
    "\n? [a]\n: b\n": "/file.yaml:2 = '? [a]': is not YAML: found unhashable key. Correct line 2.",
    "a: 1\nb: c: d\n": "/file.yaml:2 = 'b: c: d': is not YAML: mapping values are not allowed here. Correct line 2.",
    "a: 1\n---\nb: 2\n": "/file.yaml:2 = '---': is not YAML: but found another document. Correct line 2.",
    "a: \x07": "/file.yaml:1 = 'a: \\x07': is not YAML: it has the character U+0007. Correct line 1.",
    "b: 1\na: {1: 2}": "/file.yaml:2 = 'a: {1: 2}': is not YAML: a key that is no text; write it in quotes. "
    "Correct line 2.",
    "a: 1\nb: !!bool maybe": "/file.yaml:2 = 'b: !!bool maybe': is not YAML: not a value of tag:yaml.org,2002:bool. "
    "Correct line 2.",
    "a: !!map [1]": "/file.yaml:1 = 'a: !!map [1]': is not YAML: expected a mapping. Correct line 1.",
    "a: 1e999": "/file.yaml:1 = 'a: 1e999': is not YAML: 1e999 is too large for a number. Correct line 1.",
    "a: &a [*a]": "/file.yaml:1 = 'a: &a [*a]': is not YAML: an alias that stands for what it is part of. "
    "Correct line 1.",
}


@pytest.mark.parametrize("text", REFUSED)
def test_what_yaml_itself_refuses_is_said_in_one_line(error_of: Any, text: str) -> None:
    assert error_of(text) == REFUSED[text]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a: !!int x", "invalid literal for int() with base 10: 'x'"),
        ("a: !!float x", "could not convert string to float: 'x'"),
    ],
)
def test_a_value_that_its_tag_refuses(error_of: Any, text: str, says: str) -> None:
    assert error_of(text) == f"/file.yaml:1 = {text!r}: is not YAML: {says}. Correct line 1."


BOMB = "z0: &z0 [x, x, x, x, x, x, x, x, x]\n"
BOMB += "\n".join(f"z{n}: &z{n} [{f'*z{n - 1}, ' * 8}*z{n - 1}]" for n in range(1, 9))


@pytest.mark.parametrize(
    "text", [BOMB, "[" * 3000, "{a: " * 2000, "? " * 2000, "\n".join(" " * at + "a:" for at in range(300))]
)
def test_what_would_take_for_ever_is_refused(error_of: Any, text: str) -> None:
    assert " levels" in error_of(text)


def test_what_is_too_large_is_refused(error_of: Any) -> None:
    assert error_of("a: " + "x" * 2**17).startswith("configuration file = '/file.yaml': is larger than 0.125 MiB. Give")


def test_an_error_of_the_content_names_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "file.yaml"
    path.write_text("a: 1\nb:\n  c: 2\n")
    for field, where in (("b.c", ":3"), ("b.d", ":2"), ("e", "")):
        with pytest.raises(ConfigError) as caught, located(path):
            raise ConfigError(field, 2, "is wrong", "Mend it.")
        assert str(caught.value) == f"{path}{where}: {field} = 2: is wrong. Mend it."


@pytest.mark.parametrize("text", ["2026-01-02", "2026-02-30", "2026-01-02 03:04:05"])
def test_a_date_is_text(load: Any, text: str) -> None:
    assert load(f"key: {text}") == {"key": text}


@pytest.mark.parametrize("text", ["", "# nothing\n", "- a\n- b\n", "word", "3"])
def test_a_file_that_is_not_a_mapping(error_of: Any, text: str) -> None:
    assert error_of(text) == (
        "configuration file = '/file.yaml': must be a mapping of keys to values. See configs/runs/."
    )


def test_a_file_that_is_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "latin.yaml"
    path.write_bytes(b"name: caf\xe9\n")
    with pytest.raises(ConfigError) as caught:
        load_yaml(path)
    assert str(caught.value) == (
        f"{path}:1 = 'name: caf\\\\xe9': is not UTF-8 text: byte 0xe9. Save the file as UTF-8, or correct line 1."
    )


def test_a_directory_is_called_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_yaml(tmp_path)
    assert str(caught.value) == (
        f"configuration file = '{tmp_path}': is a directory. Give the path of a YAML file; examples are in configs/."
    )


LOOKS_LIKE_SOMETHING = st.one_of(
    st.sampled_from(["no", "true", "~", "null", "", "1_0", "0x1f", "010", "1:30", "2026-01-02", "a: b", "# a", "12e4"]),
    st.text("0123456789eE+-_.:xb", max_size=6),
)
TEXTS = st.text(st.characters(exclude_categories=["Cs"]))
SCALARS = st.one_of(LOOKS_LIKE_SOMETHING, TEXTS, st.booleans(), st.integers(), st.floats(allow_nan=False))
CONTENT = st.dictionaries(LOOKS_LIKE_SOMETHING, st.one_of(SCALARS, st.none(), st.lists(SCALARS, max_size=3)))


@given(CONTENT)
def test_what_is_written_is_read_back(content: dict[str, Any]) -> None:
    """Texts stay texts and numbers numbers, whatever they look like; keys keep their order."""
    read = yaml.load(dump_yaml(content), Loader=_loader())
    assert repr(read) == repr(content)


def test_what_is_written_is_for_people() -> None:
    content = {"name": "quick", "flags": {"lr": "3e-05", "warmup": "1:30", "betas": [0.9, 2], "swiglu": True}}
    assert dump_yaml(content) == (
        "name: quick\nflags:\n  lr: '3e-05'\n  warmup: 1:30\n  betas:\n  - 0.9\n  - 2\n  swiglu: true\n"
    )


def test_unknown_keys_are_refused_with_their_path() -> None:
    with pytest.raises(ConfigError) as caught:
        refuse_unknown_keys("nodes.gpu", {"name": "H200", "memmory": 141}, ("name", "memory"))
    assert str(caught.value) == "nodes.gpu.memmory = 141: is not a known key. Known here: name, memory."


def test_unknown_keys_at_the_top_have_no_path() -> None:
    with pytest.raises(ConfigError, match=r"^flag = None: is not a known key\. Known here: name\.$"):
        refuse_unknown_keys("", {"flag": None}, ("name",))


def test_known_keys_pass() -> None:
    refuse_unknown_keys("", {"name": 1}, ("name", "nproc"))


def test_a_shipped_file_is_found_by_its_name_and_by_its_place_in_a_checkout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shipped = shipped_directory("runs") / "quickstart.yaml"
    assert find_config("runs", Path("quickstart")) == shipped
    assert find_config("runs", Path("configs/runs/quickstart.yaml")) == shipped
    assert find_config("clusters", Path("a100-sxm4-80gb")) == shipped_directory("clusters") / "a100-sxm4-80gb.yaml"


def test_an_existing_file_wins_over_a_shipped_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("quickstart").write_text("name: mine\n")
    assert find_config("runs", Path("quickstart")) == Path("quickstart")


def test_an_unknown_name_lists_the_shipped_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as caught:
        find_config("clusters", Path("h100"))
    assert str(caught.value) == (
        "configuration file = 'h100': is neither a file nor a name in configs/clusters. "
        "Give a path, or one of: a100-pcie-40gb, a100-pcie-80gb, a100-sxm4-80gb, a800-sxm4-80gb, b200-sxm, b300-sxm, "
        "cpu, gb200-nvl72, gh200, h100-pcie, h100-sxm, h20-sxm, h200-sxm, h800-sxm, l40s, rtx-4090, rtx-6000-ada, "
        "rtx-pro-6000, v100-pcie."
    )


def test_a_path_that_does_not_exist_stays_a_path() -> None:
    """So that the error of reading it names it as it was given."""
    assert find_config("runs", Path("nowhere/quickstart.yaml")) == Path("nowhere/quickstart.yaml")
