"""YAML 1.2 scalars and no repeated keys: the one reader of every configuration file of the project.

PyYAML follows YAML 1.1, where `3e8` is a string, `no` is False, `010` is 8 and a repeated key silently wins. Here a
number with an exponent is a number, integers are decimal, dates are texts, only `true` and `false` are booleans, and a
repeated key is refused with its line. Anchors and aliases work as long as what they stand for stays small: a file of
400 bytes can otherwise stand for a billion entries.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import yaml

from megatron_smartmoe.errors import ConfigError, printable
from megatron_smartmoe.spec.readers import files
from megatron_smartmoe.spec.readers.files import Named

_MOST_BYTES = 2**17  # the largest shipped file has 5,000
_MOST_ENTRIES = 10_000  # those that aliases stand for counted each time
_DEEPEST = 50

# A point or an exponent makes a float; 3e8 is one.
_FLOAT = re.compile(
    r"^[-+]?(\d[\d_]*\.[\d_]*([eE][-+]?\d+)?|\d[\d_]*[eE][-+]?\d+|\.\d[\d_]*([eE][-+]?\d+)?)$"
    r"|^[-+]?\.(inf|Inf|INF)$|^\.(nan|NaN|NAN)$"
)
_INT = re.compile(r"^[-+]?(0|[1-9][\d_]*)$")
_BOOL = re.compile(r"^(true|True|TRUE|false|False|FALSE)$")


# What a file may hold; an explicit tag of another kind (a date, a set, a Python object) is refused.
_TAGS = frozenset(f"tag:yaml.org,2002:{name}" for name in "map seq str int float bool null merge".split())


class _Loader(yaml.SafeLoader):
    """SafeLoader with YAML 1.2's booleans and floats, without repeated keys, and with bounds on what is composed."""

    def __init__(self, stream: Any) -> None:
        super().__init__(stream)
        self._depth = 0
        self._entries: dict[int, tuple[int, int]] = {}  # entries and levels that a node stands for, by its identity

    def fetch_flow_collection_start(self, TokenClass: Any) -> None:
        """Open a bracket, unless too many are open: PyYAML looks at all of them again for each token."""
        if self.flow_level >= _DEEPEST:
            raise yaml.MarkedYAMLError(problem=f"more than {_DEEPEST} levels", problem_mark=self.get_mark())
        super().fetch_flow_collection_start(TokenClass)

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Compose a node, refusing one that is nested too deeply or stands for too many entries."""
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        mark, is_alias = event.start_mark, isinstance(event, yaml.AliasEvent)
        self._depth += 1
        if self._depth > _DEEPEST:
            raise yaml.MarkedYAMLError(problem=f"more than {_DEEPEST} levels", problem_mark=mark)
        node = super().compose_node(parent, index)
        self._depth -= 1
        if node is None:
            return None
        if not is_alias:
            self._entries[id(node)] = self._measured(node)
        elif id(node) not in self._entries:
            raise yaml.MarkedYAMLError(problem="an alias that stands for what it is part of", problem_mark=mark)
        entries, levels = self._entries[id(node)]
        if entries > _MOST_ENTRIES or levels > _DEEPEST:
            problem = f"more than {_MOST_ENTRIES:,} entries or {_DEEPEST} levels, aliases counted each time"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=mark)
        return node

    def _measured(self, node: yaml.Node) -> tuple[int, int]:
        if isinstance(node, yaml.ScalarNode):
            return 1, 1
        inner = node.value if isinstance(node, yaml.SequenceNode) else [one for pair in node.value for one in pair]
        found = [self._entries[id(one)] for one in inner]
        return 1 + sum(entries for entries, _ in found), 1 + max((levels for _, levels in found), default=0)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """Build a value; whatever its text does not allow is an error with its line."""
        if node.tag not in _TAGS:
            problem = f"could not determine a constructor for the tag {node.tag!r}"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)
        try:
            return super().construct_object(node, deep=deep)
        except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError) as error:
            problem = printable(str(error)) if isinstance(error, ValueError) else f"not a value of {node.tag}"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark) from None

    def construct_yaml_float(self, node: yaml.ScalarNode) -> float:
        """Build a float, refusing one that is too large for it."""
        value = float(super().construct_yaml_float(node))
        if math.isinf(value) and "inf" not in node.value.lower():
            raise ValueError(f"{node.value[:40]} is too large for a number")
        return value

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Build a dict, refusing a key that the file gives twice and one that is no text."""
        if not isinstance(node, yaml.MappingNode):
            raise yaml.MarkedYAMLError(problem="expected a mapping", problem_mark=node.start_mark)
        seen: set[str] = set()
        for key_node, _ in node.value:
            key = str(key_node.value)
            if key in seen:
                line = key_node.start_mark.line + 1
                raise ConfigError(
                    f"{key_node.start_mark.name}:{line}", key, "is given twice", "Remove one of the two lines."
                )
            seen.add(key)
        content = super().construct_mapping(node, deep=deep)
        if any(not isinstance(key, str) for key in content):
            problem = "a key that is no text; write it in quotes"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)
        return content


_Loader.add_constructor("tag:yaml.org,2002:float", _Loader.construct_yaml_float)
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith((":bool", ":int", ":float", ":timestamp"))]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


class _Dumper(yaml.SafeDumper):
    """SafeDumper that quotes texts which `_Loader` would read as something else."""


_Dumper.yaml_implicit_resolvers = {first: list(found) for first, found in _Loader.yaml_implicit_resolvers.items()}
for _class in (_Loader, _Dumper):  # resolvers are tried in order: integers before floats
    _class.add_implicit_resolver("tag:yaml.org,2002:bool", _BOOL, list("tTfF"))
    _class.add_implicit_resolver("tag:yaml.org,2002:int", _INT, list("-+0123456789"))
    _class.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))


ShippedKind = Literal["clusters", "models", "runs"]


def shipped_directory(kind: ShippedKind) -> Path:
    """The directory of the shipped files of a kind: inside an installed package, `configs/` of a checkout otherwise."""
    package = Path(__file__).parents[1]
    root = package if (package / "configs").is_dir() else package.parent
    return root / "configs" / kind


def find_config(kind: ShippedKind, path: Path) -> Path:
    """The file that `path` names: an existing file, else the shipped one.

    A shipped file is named by its stem (`quickstart`), or as it lies in a checkout (`configs/runs/quickstart.yaml`), so
    that a command of the documentation works in any folder. An existing file always wins.

    Raises:
        ConfigError: a bare name that is neither a file nor a shipped one's.
    """
    if os.path.isfile(path):  # which, unlike Path.is_file, takes any text for a path
        return path
    bare = path.name == str(path) and path.suffix not in (".yaml", ".yml")
    if bare or path == Path("configs", kind, path.name):
        shipped = shipped_directory(kind) / (f"{path}.yaml" if bare else path.name)
        if os.path.isfile(shipped):
            return shipped
    if bare and not os.path.exists(path):
        known = ", ".join(sorted(file.stem for file in shipped_directory(kind).glob("*.yaml")))
        rule = f"is neither a file nor a name in configs/{kind}"
        raise ConfigError("configuration file", str(path), rule, f"Give a path, or one of: {known}.")
    return path


def load_yaml(path: Path) -> dict[str, Any]:
    """Read a mapping from a YAML file.

    Raises:
        ConfigError: the file is missing, is not YAML, is not a mapping, repeats a key, or stands for too much.
    """
    named = Named(
        path=path, field="configuration file", way_out="Give the path of a YAML file; examples are in configs/."
    )
    text = files.read_text(named, _MOST_BYTES)
    try:
        loader = _Loader(text)
        loader.name = str(path)
        content = loader.get_single_data()
    except yaml.MarkedYAMLError as error:
        lines = text.splitlines() or [""]
        number = min(error.problem_mark.line if error.problem_mark else 0, len(lines) - 1)
        rule = f"is not YAML: {printable(error.problem or 'damaged')}"
        raise ConfigError(f"{path}:{number + 1}", lines[number], rule, f"Correct line {number + 1}.") from None
    except yaml.reader.ReaderError as error:
        number = text.count("\n", 0, error.position) + 1
        rule = f"is not YAML: it has the character U+{ord(text[error.position]):04X}"
        raise ConfigError(f"{path}:{number}", text.split("\n")[number - 1], rule, f"Correct line {number}.") from None
    if not isinstance(content, dict):
        raise ConfigError("configuration file", str(path), "must be a mapping of keys to values", "See configs/runs/.")
    return content


@contextlib.contextmanager
def located(path: Path) -> Iterator[None]:
    """Around the checks of a file's content: their errors get the file, and the line of the key where it is there."""
    try:
        yield
    except ConfigError as error:
        line = _line_of(path, error.field)
        where = f"{path}:{line}" if line else f"{path}"
        raise ConfigError(f"{where}: {error.field}", error.value, error.rule, error.way_out) from None


def _line_of(path: Path, dotted: str) -> int | None:
    """The line of the key, or of the innermost section on the way to it."""
    try:
        node = _Loader(path.read_text(encoding="utf-8-sig")).get_single_node()
    except (OSError, ValueError, yaml.YAMLError):
        return None  # the file was changed meanwhile
    line, rest = None, dotted
    while rest and isinstance(node, yaml.MappingNode):
        keys = [(key, value) for key, value in node.value if rest == key.value or rest.startswith(f"{key.value}.")]
        if not keys:
            break
        line, rest, node = keys[0][0].start_mark.line + 1, rest[len(str(keys[0][0].value)) + 1 :], keys[0][1]
    return line


def dump_yaml(content: dict[str, Any]) -> str:
    """The text that `load_yaml` reads back as `content`, keys in their order."""
    return yaml.dump(content, Dumper=_Dumper, sort_keys=False)


def refuse_unknown_keys(where: str, content: Mapping[str, Any], known: tuple[str, ...]) -> None:
    """Raise ConfigError for the first key of `content` that is not in `known`; `where` is the dotted path so far."""
    for key in content:
        if key not in known:
            path = f"{where}.{key}" if where else str(key)
            raise ConfigError(path, content[key], "is not a known key", f"Known here: {', '.join(known)}.")
