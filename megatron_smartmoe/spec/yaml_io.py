"""YAML 1.2 scalars and no repeated keys: the one reader of every configuration file of the project.

PyYAML follows YAML 1.1, where `3e8` is a string, `no` is False, `010` is 8 and a repeated key silently wins. Here a
number with an exponent is a number, integers are decimal, dates are texts, only `true` and `false` are booleans, and a
repeated key is refused with its line.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import yaml

from megatron_smartmoe.errors import ConfigError

# A point or an exponent makes a float; 3e8 is one.
_FLOAT = re.compile(
    r"^[-+]?(\d[\d_]*\.[\d_]*([eE][-+]?\d+)?|\d[\d_]*[eE][-+]?\d+|\.\d[\d_]*([eE][-+]?\d+)?)$"
    r"|^[-+]?\.(inf|Inf|INF)$|^\.(nan|NaN|NAN)$"
)
_INT = re.compile(r"^[-+]?(0|[1-9][\d_]*)$")
_BOOL = re.compile(r"^(true|True|TRUE|false|False|FALSE)$")


class _Loader(yaml.SafeLoader):
    """SafeLoader with YAML 1.2's booleans and floats, and without repeated keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Build a dict, refusing a key that the file gives twice."""
        seen: set[str] = set()
        for key_node, _ in node.value:
            key = str(key_node.value)
            if key in seen:
                line = key_node.start_mark.line + 1
                raise ConfigError(
                    f"{key_node.start_mark.name}:{line}", key, "is given twice", "Remove one of the two lines."
                )
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


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
    if path.is_file():
        return path
    bare = path.name == str(path) and path.suffix not in (".yaml", ".yml")
    if bare or path == Path("configs", kind, path.name):
        shipped = shipped_directory(kind) / (f"{path}.yaml" if bare else path.name)
        if shipped.is_file():
            return shipped
    if bare and not path.exists():
        known = ", ".join(sorted(file.stem for file in shipped_directory(kind).glob("*.yaml")))
        rule = f"is neither a file nor a name in configs/{kind}"
        raise ConfigError("configuration file", str(path), rule, f"Give a path, or one of: {known}.")
    return path


def load_yaml(path: Path) -> dict[str, Any]:
    """Read a mapping from a YAML file.

    Raises:
        ConfigError: the file is missing, is not YAML, is not a mapping, or repeats a key.
    """
    if not path.is_file():
        rule = "is a directory" if path.is_dir() else "does not exist"
        raise ConfigError(
            "configuration file", str(path), rule, "Give the path of a YAML file; examples are in configs/."
        )
    try:
        with path.open(encoding="utf-8") as file:
            content = yaml.load(file, Loader=_Loader)
    except UnicodeDecodeError:
        raise ConfigError("configuration file", str(path), "is not UTF-8 text", "Save it as UTF-8.") from None
    except yaml.MarkedYAMLError as error:
        lines = path.read_text(encoding="utf-8").splitlines() or [""]
        number = min(error.problem_mark.line if error.problem_mark else 0, len(lines) - 1)
        rule = f"is not YAML: {error.problem}"
        raise ConfigError(f"{path}:{number + 1}", lines[number], rule, f"Correct line {number + 1}.") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a tag's constructor refuses its text
        rule = f"is not YAML: {' '.join(str(error).split())}"
        raise ConfigError("configuration file", str(path), rule, "Correct the text that it names.") from None
    if not isinstance(content, dict):
        raise ConfigError("configuration file", str(path), "must be a mapping of keys to values", "See configs/runs/.")
    return content


def dump_yaml(content: dict[str, Any]) -> str:
    """The text that `load_yaml` reads back as `content`, keys in their order."""
    return yaml.dump(content, Dumper=_Dumper, sort_keys=False)


def refuse_unknown_keys(where: str, content: Mapping[str, Any], known: tuple[str, ...]) -> None:
    """Raise ConfigError for the first key of `content` that is not in `known`; `where` is the dotted path so far."""
    for key in content:
        if key not in known:
            path = f"{where}.{key}" if where else str(key)
            raise ConfigError(path, content[key], "is not a known key", f"Known here: {', '.join(known)}.")
