"""RunSpec: a run, read from its configuration file (configs/runs/*.yaml).

```yaml
name: quickstart             # names the run directory
nproc: 4                     # ranks per node; --nproc on the command line overrides it
data:                        # optional: a corpus that is prepared on the first run (see scripts/prepare_data.py)
  prefix: data/python/corpus
  python-stdlib: true
flags:                       # any Megatron flag, without its dashes, in groups of your choice
  model:
    num-layers: 4
    swiglu: true             # true: the flag alone; false: left out; a list: several values
gpus:                        # optional: ranks per node where they have GPUs, and flags that differ there
  - {nproc: 1, bf16: true, expert-model-parallel-size: 1}
  - {nproc: 8, bf16: true}
```

The groups under `flags` are for the reader; their names have no effect. `{run_dir}` in a value becomes the run
directory. Flags are not checked here but by Megatron's own parser. On GPUs `nproc` is not read where there are `gpus`:
of its entries the largest is used that the node has GPUs for, or ranks, where the command line has --nproc.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from megatron_smartmoe.errors import ConfigError
from megatron_smartmoe.spec.yaml_io import find_config, load_yaml, located, refuse_unknown_keys

FlagValue = str | bool | list[str]
MOST_RANKS = 4096  # of one node


@dataclass(frozen=True, kw_only=True)
class RunSpec:
    """One run's configuration.

    Attributes:
        name: names the run directory.
        nproc: ranks per node; with None the launcher starts one per GPU or core.
        data: options of scripts/prepare_data.py without their dashes, with `prefix`; None: the data exists already.
        flags: Megatron flag (without dashes) to its value as text, True for a flag that stands alone.
        origins: flag (without dashes) to where it was set, for errors: the file and its key, or a plan.
        gpus: ranks per node to flags that replace those above where the ranks have GPUs; None removes a flag.
    """

    name: str
    nproc: int | None = None
    data: dict[str, Any] | None = None
    flags: dict[str, FlagValue] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict, compare=False)
    gpus: dict[int, dict[str, FlagValue | None]] = field(default_factory=dict)

    def on_gpus(self, most: int) -> RunSpec:
        """The configuration on GPUs, with its largest entry of at most `most` ranks per node; the same without entries.

        Raises:
            ConfigError: every entry has more ranks.
        """
        if not self.gpus:
            return self
        fitting = [nproc for nproc in self.gpus if nproc <= most]
        if not fitting:
            rule = f"there are entries for {', '.join(map(str, self.gpus))} GPUs, and none for so few"
            raise ConfigError("gpus", most, rule, "Add one, or pass --smartmoe-device cpu.")
        nproc = max(fitting)
        flags = {**self.flags, **self.gpus[nproc]}
        return replace(
            self,
            nproc=nproc,
            flags={name: value for name, value in flags.items() if value is not None},
            origins={**self.origins, **{name: f"{self.name}, gpus.{nproc}.{name}" for name in self.gpus[nproc]}},
            gpus={},
        )


def load_run_spec(path: Path) -> RunSpec:
    """Read and check a run configuration file, which may be the name of a shipped one (see `find_config`).

    Raises:
        ConfigError: unknown key, wrong type, or a flag given in two groups.
    """
    path = find_config("runs", path)
    content = load_yaml(path)
    with located(path):
        refuse_unknown_keys("", content, ("name", "nproc", "data", "flags", "gpus"))
        nproc = content.get("nproc")
        if nproc is not None and not _is_number_of_ranks(nproc):
            rule = "must be a positive whole number of ranks per node"
            raise ConfigError("nproc", nproc, rule, "For example: nproc: 4.")
        groups = {} if content.get("flags") is None else content["flags"]
        flags = _flags(groups)
        return RunSpec(
            name=_name(content.get("name"), path),
            nproc=nproc,
            data=_data(content.get("data")),
            flags=flags,
            origins={"data": f"{path}, data"}
            | {str(name): f"{path}, flags.{group}.{name}" for group, names in groups.items() for name in names},
            gpus=_gpus(content.get("gpus")),
        )


def _is_number_of_ranks(value: object) -> bool:
    return type(value) is int and 1 <= value <= MOST_RANKS


def _gpus(content: Any) -> dict[int, dict[str, FlagValue | None]]:
    if content is None:
        return {}
    way_out = "For example: gpus: [{nproc: 8, bf16: true}]."
    if not isinstance(content, list) or not all(isinstance(entry, dict) for entry in content):
        raise ConfigError("gpus", content, "must be a list of mappings of flags to values", way_out)
    found: dict[int, dict[str, FlagValue | None]] = {}
    for entry in content:
        nproc = entry.get("nproc")
        if not _is_number_of_ranks(nproc) or nproc in found:
            raise ConfigError("gpus", entry, "each needs nproc, a number of ranks per node of its own", way_out)
        flags = {str(name): value for name, value in entry.items() if name != "nproc"}
        found[nproc] = {name: _as_text(f"gpus.{nproc}.{name}", name, value) for name, value in flags.items()}
    return found


def _name(name: Any, path: Path) -> str:
    if name is None or name == "":
        return path.stem
    if isinstance(name, bool) or not isinstance(name, str | int | float) or not str(name).isprintable():
        raise ConfigError("name", name, "must be a text on one line", f"For example: name: {path.stem}.")
    return str(name)


def _data(content: Any) -> dict[str, Any] | None:
    if content is None:
        return None
    way_out = "For example: data: {prefix: data/my/corpus}."
    if not isinstance(content, dict) or "prefix" not in content:
        raise ConfigError("data", content, "must be a mapping with `prefix`", way_out)
    if not isinstance(content["prefix"], str) or not content["prefix"] or not content["prefix"].isprintable():
        raise ConfigError("data.prefix", content["prefix"], "must be the path of a dataset, without .bin", way_out)
    for name, value in content.items():
        _as_text(f"data.{name}", name, value)
    return content


def _flags(content: Any) -> dict[str, FlagValue]:
    if not isinstance(content, dict):
        raise ConfigError("flags", content, "must be groups of flags", "For example: flags: {model: {num-layers: 4}}.")
    flags: dict[str, FlagValue | None] = {}
    for group, members in content.items():
        if not isinstance(members, dict):
            rule = "must be a group: a mapping of flags to values"
            raise ConfigError(f"flags.{group}", members, rule, f"Write flags: {{{group}: {{...}}}}.")
        for name, value in members.items():
            where = f"flags.{group}.{name}"
            if str(name) in flags:
                raise ConfigError(
                    where, value, "is given in another group too", f"Remove {name} from one of the groups."
                )
            flags[str(name)] = _as_text(where, str(name), value)
    return {name: value for name, value in flags.items() if value is not None}


def _as_text(where: str, name: str, value: Any) -> FlagValue | None:
    """A flag's value as argparse reads it; None when the flag is left out."""
    if name.startswith("-"):
        raise ConfigError(where, value, "is a flag with its dashes", f"Write {name.lstrip('-')}.")
    if value is None or value is False:
        return None
    if value is True:
        return True
    items = value if isinstance(value, list) else [value]
    if any(isinstance(item, float) and math.isnan(item) for item in items):
        raise ConfigError(where, value, "is not a number", "Write a number.")
    if any(isinstance(item, str) and "\0" in item for item in items):
        raise ConfigError(where, value, "holds a NUL character", "Remove it.")
    if all(isinstance(item, str | int | float) and not isinstance(item, bool) for item in items):
        texts = [_scalar_text(item) for item in items]
        return texts if isinstance(value, list) else texts[0]
    raise ConfigError(
        where, value, "must be a number, a text, true, false or a list", "See configs/runs/quickstart.yaml."
    )


def _scalar_text(value: object) -> str:
    """A number as both an integer flag and a float flag read it: 3e8 is 300000000."""
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        return str(int(value))
    return str(value)
