#!/usr/bin/env python3
"""docs/flags.md, from the parsers: `.venv/bin/python -m scripts.flags_page` writes it again."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

PATH = Path(__file__).parents[1] / "docs" / "flags.md"
_HEAD = """# Flags

Made from the parsers by `.venv/bin/python -m scripts.flags_page`; do not edit. Every flag of Megatron works beside them
(`scripts/pretrain_gpt_moe.sh --help-megatron`); which of Megatron's go together with what is in
[compatibility.md](compatibility.md).
"""


def page() -> str:
    """The whole page: training, the launcher, the tools."""
    from megatron_smartmoe.adapter.flags.smartmoe_arguments import add_smartmoe_arguments
    from megatron_smartmoe.adapter.launch.launcher import build_parser as launcher_parser
    from megatron_smartmoe.cli.main import build_parser as tools_parser

    lines = [_HEAD]
    lines += ["## Training", "", "On the command line of a training, or under `flags` of a run's configuration.", ""]
    lines += [*_table(add_smartmoe_arguments(argparse.ArgumentParser(add_help=False))), ""]
    lines += [
        "## The launcher",
        "",
        "Of `scripts/pretrain_gpt_moe.sh`, before or between the flags of the training.",
        "",
    ]
    lines += [*_table(launcher_parser()), ""]
    tools = tools_parser()
    (choices,) = (action for action in tools._actions if isinstance(action, argparse._SubParsersAction))
    summaries = {action.dest: action.help for action in choices._choices_actions}
    for name, parser in choices.choices.items():
        summary = _sentence(summaries[name])
        lines += [f"## smartmoe {name}", "", f"{summary[:1].upper()}{summary[1:]}", "", *_tool(name, parser)]
    return "\n".join(lines)


def _tool(name: str, parser: argparse.ArgumentParser) -> Iterator[str]:
    """A tool's flags, and those of its own tools."""
    below = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    for choices in below:
        for inner, inner_parser in choices.choices.items():
            yield from (f"### smartmoe {name} {inner}", "", *_table(inner_parser), "")
    if not below:
        yield from (*_table(parser), "")


def _table(parser: argparse.ArgumentParser) -> Iterator[str]:
    yield "| flag | |"
    yield "|---|---|"
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction | argparse._HelpAction) or action.help is argparse.SUPPRESS:
            continue
        names = action.option_strings or [str(action.metavar or action.dest)]
        value = _value(action) if action.option_strings else ""
        text = (action.help or "") % {"default": action.default, "prog": parser.prog}
        yield f"| `{names[-1]}{value}` | {_sentence(text)} |"


def _value(action: argparse.Action) -> str:
    """What follows the flag's name on the command line."""
    if action.nargs == 0:
        return ""
    metavar = action.metavar or (list(action.choices) if action.choices else action.dest.upper())
    text = "\\|".join(map(str, metavar)) if isinstance(metavar, list) else str(metavar)
    return f" {text}"


def _sentence(text: str | None) -> str:
    """In a cell of a table: one line that ends with a full stop."""
    line = " ".join((text or "").split()).replace("|", "\\|").replace("<", "&lt;")
    return f"{line}{'' if line.endswith('.') or not line else '.'}"


def main() -> None:
    """Write the page."""
    PATH.write_text(page(), encoding="utf-8")
    print(f"written: {PATH}")


if __name__ == "__main__":
    main()
