"""docs/compatibility.md says what the start-up checks say, and has a place for every option of the installed parser."""

from __future__ import annotations

import ast
import importlib
from collections import Counter
from pathlib import Path

import pytest

from scripts.compatibility.groups import SUBJECTS, WHOLE_GROUPS
from scripts.compatibility.page import PATH, judge, option_names, page
from scripts.compatibility.rows import SECTIONS, Row
from tests.support.ranks import run_ranks
from tests.support.training import TINY_MODEL, TINY_TRAINING

pytestmark = [pytest.mark.dist, pytest.mark.fast]

ROOT = Path(__file__).parents[2]
ROWS = [row for rows in SECTIONS.values() for row in rows]


def _page_and_places() -> tuple[str, dict[str, int]]:
    """In a rank: the page as it should be, and in how many places each option of the parser is."""
    from megatron_smartmoe.adapter.flags.parser import build_parser

    parser = build_parser()
    in_rows = {parser._option_string_actions[option].dest for row in ROWS for option in _options(row)}
    named = Counter(name for _, names in SUBJECTS.values() for name in names.split())
    places = Counter(dict.fromkeys(in_rows, 1)) + named
    for group in parser._action_groups:
        for name in {action.dest for action in group._group_actions}:
            places[name] += group.title in WHOLE_GROUPS and name not in in_rows
    return page(judge, option_names()), dict(places)


def _options(row: Row) -> list[str]:
    return [word for word in row.flags.split() if word.startswith("--")]


@pytest.fixture(scope="module")
def page_and_places(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, int]]:
    found: tuple[str, dict[str, int]] = run_ranks(_page_and_places, 1, log_dir=tmp_path_factory.mktemp("page"))[0]
    return found


def test_the_page_is_what_the_checks_say(page_and_places: tuple[str, dict[str, int]]) -> None:
    command = ".venv/bin/python -m scripts.compatibility.page"
    assert PATH.read_text(encoding="utf-8") == page_and_places[0], f"write it again: {command}"


def test_every_option_has_one_place(page_and_places: tuple[str, dict[str, int]]) -> None:
    """A new option of Megatron's is no option that cannot matter until somebody has looked."""
    places = page_and_places[1]
    assert {name: count for name, count in places.items() if count != 1} == {}


@pytest.mark.parametrize("row", ROWS, ids=[row.flags for row in ROWS])
def test_the_tests_that_are_named_have_the_option(row: Row) -> None:
    for test in row.tests.values():
        file, _, name = test.partition("::")
        function, _, parameter = name.removesuffix("]").partition("[")
        source = (ROOT / file).read_text(encoding="utf-8")
        functions = {node.name for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)}
        assert function in functions
        flags = " ".join([_mix(file, parameter, source), *TINY_MODEL, *TINY_TRAINING])
        assert [option for option in _options(row) if option not in flags] == [], test


def _mix(file: str, name: str, source: str) -> str:
    """The mix of flags of this name in a test's module; without one, its source and all texts that it names."""
    names = vars(importlib.import_module(file.removesuffix(".py").replace("/", "."))).values()
    mixes = [value[name] for value in names if isinstance(value, dict) and isinstance(value.get(name), tuple)]
    return str(mixes[0]) if mixes else " ".join([source, *(value for value in names if isinstance(value, str))])
