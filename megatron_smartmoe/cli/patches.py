"""`scripts/apply_patches.sh PATH`: put the calls of this project into a Megatron-LM tree, or take them out again.

A patch here is a description and not a diff: which file, in front of which statement, which lines. The place is found
by parsing, so no line of Megatron's is kept, and a tree with changes of its own takes the same patch. `patches/` has a
description for each release, with fingerprints of the functions that the project hooks; a tree that lacks one of them
is refused, whatever release it came from.

What is inserted is a block between two marks. Taking it out restores the file to the byte, and where the file was
edited elsewhere only the block goes.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_smartmoe.errors import EXIT_CONFIG_ERROR, CompatError, ConfigError, SmartMoEError
from megatron_smartmoe.spec.megatron_names import Tree, examine, likeness
from megatron_smartmoe.spec.yaml_io import load_yaml, refuse_unknown_keys

BEGIN = "# >>> smartmoe >>> (scripts/apply_patches.sh --reverse takes these lines out)"
END = "# <<< smartmoe <<<"
MOST_LINES = 40  # added to a tree
PATCHES = Path(__file__).parents[2] / "patches"


@dataclass(frozen=True, kw_only=True)
class Insertion:
    """Lines to insert into a file.

    Attributes:
        file: relative to the tree.
        lines: what to insert in front of the first import that is not of Python's standard library.
    """

    file: str
    lines: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Patch:
    """The description of a release's insertions.

    Attributes:
        release: its tag.
        insertions: the lines.
        fingerprints: of the functions that the project hooks, by full name.
    """

    release: str
    insertions: tuple[Insertion, ...]
    fingerprints: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class Change:
    """A file before and after.

    Attributes:
        path: the file.
        old, new: its content, with line ends as they are.
    """

    path: Path
    old: str
    new: str

    def diff(self) -> str:
        """The change as a unified diff, without the lines around it."""
        old, new = (text.splitlines(keepends=True) for text in (self.old, self.new))
        return "".join(difflib.unified_diff(old, new, f"a/{self.path.name}", f"b/{self.path.name}", n=0))


def load_patch(path: Path) -> Patch:
    """Read a description.

    Raises:
        ConfigError: it is none.
    """
    content = load_yaml(path)
    refuse_unknown_keys("", content, ("release", "insert", "fingerprints"))
    insertions = tuple(Insertion(file=each["file"], lines=tuple(each["lines"])) for each in content["insert"])
    added = sum(len(each.lines) + 3 for each in insertions)
    if added > MOST_LINES:
        raise ConfigError(f"{path}: insert", added, f"adds more than {MOST_LINES} lines", "Move code into a function.")
    return Patch(release=content["release"], insertions=insertions, fingerprints=content["fingerprints"])


def load_patches(folder: Path = PATCHES) -> dict[str, Patch]:
    """The descriptions of all releases, by release.

    Raises:
        ConfigError: there are none.
    """
    patches = [load_patch(path) for path in sorted(folder.glob("*.yaml"))]
    if not patches:
        raise ConfigError(
            "patches", str(folder), "has no description", "Run the script from a checkout of this project."
        )
    return {patch.release: patch for patch in patches}


def choose(tree: Tree, patches: Mapping[str, Patch]) -> tuple[Patch, str]:
    """The patch for a tree, and a line that says what the tree is like.

    Raises:
        CompatError: the tree lacks what the project hooks.
    """
    release, differing = likeness(tree, {name: patch.fingerprints for name, patch in patches.items()})
    if tree.problems:
        what = "; ".join(tree.problems)
        raise CompatError(
            f"{tree.root} = megatron-core {tree.version}, nearest to {release}: {what}. Nothing was changed. Use one "
            f"of {', '.join(patches)}, or give the fork these names back."
        )
    like = f"megatron-core {tree.version} in {tree.root}: all names are there, as in {release}"
    if differing:
        names = ", ".join(name.removeprefix("megatron.") for name in differing)
        like += f"; with other arguments, none of which is read: {names}"
    return patches[release], like


def applied(path: Path, lines: Sequence[str]) -> Change | None:
    """The change that inserts a block; None where it is there already.

    Raises:
        CompatError: there is no place for it, or another block.
    """
    old = _read(path)
    newline = "\r\n" if "\r\n" in old else "\n"
    block = _block(lines, newline)
    if block in old:
        return None
    if BEGIN in old or END in old:
        raise CompatError(
            f"{path} = has another smartmoe block: take it out with --reverse, or by hand, and try again."
        )
    number = _first_foreign_import(path, old)
    parts = old.splitlines(keepends=True)
    while number > 0 and parts[number - 1].startswith("#") and not parts[number - 1].startswith("#!"):
        number -= 1  # a comment stays with its statement
    return Change(path=path, old=old, new="".join([*parts[:number], block, *parts[number:]]))


def reversed_change(path: Path) -> Change | None:
    """The change that takes the block out; None where there is none.

    Raises:
        CompatError: one of its marks is missing.
    """
    old = _read(path)
    if BEGIN not in old and END not in old:
        return None
    newline = "\r\n" if "\r\n" in old else "\n"
    head, begin, rest = old.partition(BEGIN)
    _, end, tail = rest.partition(END + newline)
    if not begin or not end:
        raise CompatError(f"{path} = one mark of the smartmoe block without the other. Remove the lines by hand.")
    return Change(path=path, old=old, new=head + tail.removeprefix(newline))


def _block(lines: Sequence[str], newline: str) -> str:
    return "".join(line + newline for line in (BEGIN, *lines, END, ""))


def _read(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8")
    except FileNotFoundError:
        raise CompatError(
            f"{path} = not there. Name the training script of this tree with --script, relative to the tree."
        ) from None


def _first_foreign_import(path: Path, text: str) -> int:
    """The line, from 0, of the first import at module level that is not of the standard library."""
    try:
        body = ast.parse(text).body
    except SyntaxError as error:
        raise CompatError(f"{path} = cannot be parsed: {error.msg} in line {error.lineno}.") from None
    for node in body:
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or "."]
        else:
            continue
        if any(name.split(".")[0] not in sys.stdlib_module_names for name in names):
            return node.lineno - 1
    raise CompatError(f"{path} = imports nothing but the standard library at module level: not a training script.")


def run(root: Path, *, script: str | None, reverse: bool, check: bool) -> int:
    """Apply, check or reverse; prints what is done. Returns 0; with `check` 1 where the tree is not patched yet.

    Args:
        root: the tree.
        script: another file than the release's `pretrain_gpt.py`.
        reverse: take the block out.
        check: change nothing.

    Raises:
        SmartMoEError: the tree is refused; nothing was changed.
    """
    if reverse:
        files = (
            [script] if script else sorted({each.file for one in load_patches().values() for each in one.insertions})
        )
        changes = [reversed_change(root / file) for file in files]
    else:
        patch, like = choose(examine(root), load_patches())
        print(like)
        insertions = patch.insertions
        if script:
            insertions = (Insertion(file=script, lines=insertions[0].lines),)
        changes = [applied(root / each.file, each.lines) for each in insertions]
    wanted = [change for change in changes if change is not None]
    if not wanted:
        print("not patched: there is nothing to take out" if reverse else "patched already: nothing to do")
        return 0
    for change in wanted:
        print(change.diff(), end="")
        if not check:
            change.path.write_bytes(change.new.encode())
    names = ", ".join(change.path.name for change in wanted)
    verb = "would be" if check else "was"
    print(f"the block {verb} {'taken out of' if reverse else 'put into'} {names}")
    return 1 if check else 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0, 1 for --check where a change is due, 2 for a refusal."""
    parser = argparse.ArgumentParser(prog="scripts/apply_patches.sh", description=__doc__)
    parser.add_argument("path", type=Path, metavar="PATH", help="a checkout of Megatron-LM, or a fork of it")
    parser.add_argument(
        "--script", metavar="FILE", help="the training script, relative to PATH. Default: pretrain_gpt.py."
    )
    parser.add_argument("--check", action="store_true", help="change nothing: show what would be done")
    parser.add_argument("--reverse", action="store_true", help="take the lines out again")
    options = parser.parse_args(arguments)
    try:
        return run(options.path, script=options.script, reverse=options.reverse, check=options.check)
    except SmartMoEError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_CONFIG_ERROR


if __name__ == "__main__":
    sys.exit(main())
