"""The run directory: everything that is needed to know what was run, and to run it again.

```
runs/quickstart-20260102-030405/
  config.yaml        name, ranks and flags as merged; --run-dir with this directory resumes with them
  command.sh         the exact command, ready to run
  plan.json          with --parallel auto: the chosen launch, the others, and why; a resumed run reuses it
  environment.json   git revision, versions, host, Slurm's variables, settings of NCCL and other libraries
  train.log          the output (node1.log, ... for further nodes; with a Slurm task per rank, Slurm writes it)
  arguments.txt      every argument of Megatron after validation
  launch.json        with --smartmoe: what `auto` was for the exchange of tokens, and the ranks of a node
  metrics.jsonl      a line per logged iteration
  summary.json       how it ended
  stacks-rank3.txt   stacks of a rank that held training up (docs/reliability.md)
  run.lock           who uses the directory now (empty: nobody)
  failed-node0.json  ranks that died, for the launchers of other nodes
```

Files are replaced as a whole, and links are replaced, not followed. Values that are secrets are not written: their
places name an environment variable (`secrets`).
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import platform
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from megatron_smartmoe.adapter import run_files
from megatron_smartmoe.adapter.launch import secrets
from megatron_smartmoe.adapter.launch.ending import forget
from megatron_smartmoe.errors import ConfigError
from megatron_smartmoe.spec.run import RunSpec
from megatron_smartmoe.spec.yaml_io import dump_yaml

CONFIG_FILE = "config.yaml"
_PACKAGES = ("megatron-smartmoe", "megatron-core", "torch", "transformer-engine", "apex", "numpy", "sentencepiece")
# Variables that set how libraries communicate, compute and allocate: without them a run is not the same.
_SETTINGS = ("NCCL_", "TORCH_", "PYTORCH_", "GLOO_", "UCX_", "FI_", "NVSHMEM_", "CUDA_", "NVTE_", "TRITON_", "OMP_")
_CHECKOUT = Path(__file__).resolve().parents[3]  # where the package lies in one; site-packages of an installation


def launcher_command() -> str:
    """How a user starts the launcher: the script of a checkout, the module of an installation."""
    script = "scripts/pretrain_gpt_moe.sh"
    return script if (_CHECKOUT / script).is_file() else "python -m megatron_smartmoe.adapter.launch"


def choose(asked: Path | None, name: str, environ: Mapping[str, str] = os.environ) -> Path:
    """The directory of --run-dir, else a new one under runs/, the same on every node of a Slurm job.

    Raises:
        ConfigError: the name would lead to another place than runs/.
    """
    if asked is not None:
        _check_path(asked)
        return asked
    _check_name(name)
    job = environ.get("SLURM_JOB_ID")
    if job:
        return Path("runs") / f"{name}-job{job}"
    path = Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    for number in itertools.count(2):
        if not os.path.lexists(path):
            return path
        path = Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}-{number}"
    raise AssertionError("not reached")


def reserve(asked: Path | None, name: str, environ: Mapping[str, str] = os.environ) -> Path:
    """As `choose`, and a default directory is made at once: of two launches in one second, each has its own.

    Raises:
        ConfigError: see `choose`; or runs/ cannot be written.
    """
    while True:
        path = choose(asked, name, environ)
        if asked is not None or environ.get("SLURM_JOB_ID"):  # its name is shared on purpose; `run_lock` guards it
            return path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.mkdir()
        except FileExistsError:
            if not path.parent.is_dir():
                raise _cannot(path, "File exists") from None
        except OSError as error:
            raise _cannot(path, error.strerror or "cannot be created") from None
        else:
            return path


def release(path: Path) -> None:
    """Remove a directory that was reserved, if nothing is in it, and its parent if that leaves it empty too."""
    for folder in (path, path.parent):
        with contextlib.suppress(OSError):
            folder.rmdir()


def _check_name(name: str) -> None:
    if not re.fullmatch(r"[^/\0-\x1f\x7f]{1,200}", name) or name.startswith(".") or len(os.fsencode(name)) > 200:
        rule = (
            "must be the name of a folder in runs/: at most 200 bytes, no slash, no control character, no dot in front"
        )
        raise ConfigError("name", name, rule, "For example name: my-run; --run-dir DIR puts a run anywhere.")


def _check_path(path: Path) -> None:
    if "\0" in str(path):
        raise ConfigError("--run-dir", str(path), "has a NUL character", "Pass a path without it.")


def described(path: Path) -> str:
    """The directory as a line names it: a link with the directory that it leads to."""
    return f"{path} (a link to {path.resolve()})" if path.is_symlink() else str(path)


def make(path: Path) -> None:
    """Make the directory if it is not there, and see that it can be written.

    Raises:
        ConfigError: it cannot.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):  # permissions do not tell: the file system may be read-only
            pass
    except FileExistsError:
        why = f"is a link to {os.readlink(path)}, which is not a directory" if path.is_symlink() else "File exists"
        raise _cannot(path, why) from None
    except OSError as error:
        raise _cannot(path, error.strerror or "cannot be written") from None


def _cannot(path: Path, why: str) -> ConfigError:
    return ConfigError("--run-dir", str(path), why, "Pass another directory.")


def create(path: Path, spec: RunSpec, command: str) -> None:
    """Write the directory's files; those of an existing directory that the launcher does not write stay.

    Args:
        path: the directory.
        spec: the merged configuration; secrets among its flags are not written.
        command: for command.sh, without secrets.

    Raises:
        ConfigError: the directory cannot be made or written.
    """
    make(path)
    content = {"name": spec.name, "nproc": spec.nproc, "data": spec.data, "flags": {}}
    content["flags"] = {"all": secrets.masked_flags(spec.flags)}
    try:
        forget(path)
        run_files.write_text(path / CONFIG_FILE, dump_yaml(content))
        script = f"#!/usr/bin/env bash\ncd {shlex.quote(str(Path.cwd()))}\n{command}\n"
        run_files.write_text(path / "command.sh", script, mode=0o777)
        run_files.write_text(path / "environment.json", json.dumps(_environment(), indent=2) + "\n")
    except OSError as error:
        raise _cannot(path, f"{error.strerror} ({error.filename})") from None


def _environment() -> dict[str, Any]:
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "git": _git("rev-parse", "HEAD"),
        "git_changes": _git("status", "--short"),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in _PACKAGES},
        "host": platform.node(),
        "argv": secrets.masked_words(sys.argv[1:]),
        "slurm": _variables("SLURM_"),
        "settings": _variables(*_SETTINGS),
    }


def _variables(*prefixes: str) -> dict[str, str]:
    """Variables of the environment whose names begin so, without secrets."""
    return secrets.masked_variables({n: v for n, v in sorted(os.environ.items()) if n.startswith(prefixes)})


def _git(*arguments: str) -> str | None:
    """The output of git in the project's checkout; None where it is not one.

    An installation may lie inside another project's checkout, whose revision would be a false answer.
    """
    if not (_CHECKOUT / ".git").exists():
        return None
    try:
        done = subprocess.run(["git", "-C", str(_CHECKOUT), *arguments], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
