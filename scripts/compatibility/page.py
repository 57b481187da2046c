"""docs/compatibility.md: `.venv/bin/python -m scripts.compatibility.page` writes it again.

Each pair of an option and a part of the project goes through the start-up checks. What they refuse is refused, with
their reason; what they accept is trained by the test that the table names, or it says why no test does.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

from scripts.compatibility.groups import SUBJECTS, WHOLE_GROUPS
from scripts.compatibility.rows import PARTS, SECTIONS, Row

PATH = Path(__file__).parents[2] / "docs" / "compatibility.md"
# A model and a launch that every option may be added to.
_BASE = (
    "--num-layers 4 --hidden-size 64 --num-attention-heads 4 --ffn-hidden-size 128 --seq-length 64 "
    "--max-position-embeddings 64 --num-experts 8 --moe-ffn-hidden-size 96 --swiglu --disable-bias-linear "
    "--micro-batch-size 1 --global-batch-size 8 --expert-model-parallel-size 2 --moe-token-dispatcher-type alltoall"
)
_HEAD = """# What goes with what

Made from the start-up checks and the tests by `.venv/bin/python -m scripts.compatibility.page`; do not edit.

Can an option of Megatron's be combined with experts that move (*homes*, `--smartmoe`), with *replicas*
(`--smartmoe-spare-slots 1`), with all-to-alls in *chunks* (`--smartmoe-overlap-degree 2`), with a *pool* of settings
(`--smartmoe-pool auto`), and with all-to-alls in *two hops* (`--smartmoe-dispatch hierarchical`)?

- **trained**: a test trains the pair and compares the losses; the link is the test's file, its name is in the tooltip.
- **accepted**: the start-up checks let it pass, and no test trains the pair; the number gives the reason.
- **refused**: the start-up checks refuse it by name; the number gives their reason.
"""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A pair of an option and a part.

    Attributes:
        kind: trained, accepted or refused.
        why: the test's name, or the reason.
    """

    kind: str
    why: str


Judge = Callable[[str], str | None]  # a command line to the rule that refuses it, or None


def judge(command_line: str) -> str | None:
    """The rule by which the checks of the project's own flags refuse a command line, with the option; None if none."""
    from megatron_smartmoe.adapter.flags import smartmoe_checks
    from megatron_smartmoe.adapter.flags.parser import parse
    from megatron_smartmoe.errors import ConfigError

    args = parse(f"{_BASE} {command_line}".split())
    with mock.patch.object(smartmoe_checks, "has_transformer_engine", return_value=True):
        try:
            smartmoe_checks.check_smartmoe(args, cpu=False)
        except ConfigError as error:
            return f"`{error.field}` {error.rule}"
    return None


def cells_of(row: Row, judge: Judge) -> dict[str, Cell]:
    """The cells of a row, by part."""
    cells = {}
    for part, flags in PARTS.items():
        rule = judge(f"{flags} {row.needs} {row.flags}")
        if rule is not None:
            cells[part] = Cell(kind="refused", why=rule)
        elif part in row.tests:
            cells[part] = Cell(kind="trained", why=row.tests[part])
        else:
            cells[part] = Cell(kind="accepted", why=row.otherwise)
    return cells


def page(judge: Judge, options: Mapping[str, str]) -> str:
    """The whole page.

    Args:
        judge: see `judge`.
        options: option of each name among parsed arguments, of the groups' options.
    """
    reasons: dict[str, int] = {}
    lines = [_HEAD]
    for title, rows in SECTIONS.items():
        lines += [f"## {title}", "", f"| option | {' | '.join(PARTS)} |", "|---" * (len(PARTS) + 1) + "|"]
        for row in rows:
            cells = [_text(cell, reasons) for cell in cells_of(row, judge).values()]
            flags = row.flags.replace("|", "\\|")  # a table's own sign, even in code
            lines.append(f"| `{flags}` | {' | '.join(cells)} |")
        lines.append("")
    lines += ["## Reasons", "", *(f"{number}. {reason}" for reason, number in reasons.items()), ""]
    lines += [*_without_influence(options)]
    return "\n".join(lines)


def _text(cell: Cell, reasons: dict[str, int]) -> str:
    if cell.kind == "trained":
        file, _, name = cell.why.partition("::")
        return f'[trained](../{file} "{name}")'
    return f"{cell.kind} ({reasons.setdefault(cell.why, len(reasons) + 1)})"


def _without_influence(options: Mapping[str, str]) -> Iterator[str]:
    yield "## Options that cannot matter"
    yield ""
    yield "By group of Megatron's parser, without those in the tables above:"
    yield ""
    yield from (f"- *{title}*: {why}" for title, why in WHOLE_GROUPS.items())
    yield ""
    yield "Of its other groups, by subject:"
    yield ""
    for subject, (why, names) in SUBJECTS.items():
        found = ", ".join(f"`{options[name]}`" for name in names.split())
        yield f"- *{subject}*: {why}. {found}"
    yield ""


def option_names() -> dict[str, str]:
    """The first spelling of each option of the installed parser, by its name among the parsed arguments."""
    from megatron_smartmoe.adapter.flags.parser import build_parser

    actions: list[argparse.Action] = build_parser()._actions
    return {action.dest: action.option_strings[0] for action in actions if action.option_strings}


def main() -> None:
    """Write the page."""
    PATH.write_text(page(judge, option_names()), encoding="utf-8")
    print(f"written: {PATH}")


if __name__ == "__main__":
    main()
