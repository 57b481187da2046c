"""`smartmoe doctor`: whether training will work on this machine, and what to do where it will not.

Looks at Python, torch, GPU and driver, the compiled kernels, the compiler, Megatron and the names that the project
hooks, the collectives, packages that are half installed, Slurm, write access, memory and the clock. What needs torch or
Megatron is tried in processes of their own. A row per check says what was found, what it means, and the way out. Exit
status: 0 where training will work (warnings included), 2 where it will not.

With --megatron PATH it looks at a checkout of Megatron-LM, or a fork of it, instead: which names that the project hooks
are there, and which are not.
"""

from __future__ import annotations

import argparse
import json
import textwrap
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_smartmoe.cli.doctor_checks import CHECKS, Finding, examine
from megatron_smartmoe.errors import EXIT_CONFIG_ERROR, ConfigError
from megatron_smartmoe.spec.megatron_names import examine as examine_names

_SIGNS = {"ok": "ok", "warning": "WARNING", "error": "ERROR", "not applicable": "not applicable"}
_WIDTH = 110


def add_parser(tools: Any) -> None:
    """Add the subcommand to the parser of the tools."""
    parser = tools.add_parser("doctor", help="check whether training will work on this machine", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print the findings as JSON, for programs")
    parser.add_argument("--only", metavar="NAMES", help=f"these checks alone, separated by commas: {', '.join(CHECKS)}")
    parser.add_argument(
        "--megatron", metavar="PATH", type=Path, help="examine this Megatron-LM tree alone, by parsing it"
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Examine the machine and print the findings; returns 2 where there is an error among them.

    Raises:
        ConfigError: --only names no check.
    """
    if options.megatron is not None:
        return examine_tree(options.megatron, as_json=options.json)
    names = list(CHECKS) if options.only is None else options.only.split(",")
    for name in names:
        if name not in CHECKS:
            raise ConfigError("--only", name, "is no check", f"Known: {', '.join(CHECKS)}.")
    findings = []
    for name in names:
        finding = examine(name)
        findings.append(finding)
        if not options.json:
            print(as_text(finding), flush=True)
    errors = [finding.check for finding in findings if finding.state == "error"]
    if options.json:
        print(json.dumps({"works": not errors, "findings": [asdict(finding) for finding in findings]}, indent=1))
    else:
        print(f"Training will not work here: see {', '.join(errors)}." if errors else "Training will work here.")
    return EXIT_CONFIG_ERROR if errors else 0


def examine_tree(root: Path, *, as_json: bool) -> int:
    """Print which names the tree has, and return 2 where one is missing.

    Raises:
        CompatError: it is no Megatron-LM tree.
    """
    tree = examine_names(root)
    if as_json:
        names = {each.wanted.full: each.place for each in tree.found}
        content = {"works": not tree.problems, "version": tree.version, "names": names, "problems": tree.problems}
        print(json.dumps(content, indent=1))
        return EXIT_CONFIG_ERROR if tree.problems else 0
    width = max(len(each.wanted.full) for each in tree.found)
    for each in tree.found:
        sign = "ERROR" if each.problem else "ok"
        absent = f"not there, and only needed for {each.wanted.use}"
        print(f"{sign:6} {each.wanted.full:{width}}  {each.problem or each.place or absent}")
    print(f"megatron-core {tree.version} in {root}: ", end="")
    if tree.problems:
        print(f"{len(tree.problems)} of {len(tree.found)} names are not as the project needs them.")
        print("-> Give them back in the fork, or use a release that has them (docs/releases.md).")
        return EXIT_CONFIG_ERROR
    print(f"all {len(tree.found)} names are as the project needs them; ", end="")
    print(f"scripts/apply_patches.sh {root} puts the project in.")
    return 0


def as_text(finding: Finding) -> str:
    """A row of the table; what a finding that is not ok means, and the way out, on lines of their own."""
    rows = [f"{finding.check:<22} {_SIGNS[finding.state]:<15} {finding.found}"]
    if finding.state in ("warning", "error"):
        for text in (finding.means, f"-> {finding.way_out}"):
            rows += textwrap.wrap(text, _WIDTH, initial_indent=" " * 38, subsequent_indent=" " * 38)
    return "\n".join(rows)
