"""The run directory: everything that is needed to know what was run, and to run it again.

```
runs/quickstart-20260102-030405/
  config.yaml        name, ranks and flags as merged; --run-dir with this directory resumes with them
  command.sh         the exact command, ready to run
  plan.json          with --parallel auto: the chosen launch, the others, and why; a resumed run reuses it
  environment.json   git revision, versions, host, Slurm's variables
  train.log          the output (node1.log, ... for further nodes; with a Slurm task per rank, Slurm writes it)
  arguments.txt      every argument of Megatron after validation
  metrics.jsonl      a line per logged iteration
  summary.json       how it ended
  stacks-rank3.txt   stacks of a rank that held training up (docs/reliability.md)
```
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from megatron_smartmoe.errors import ConfigError
from megatron_smartmoe.spec.run import RunSpec
from megatron_smartmoe.spec.yaml_io import dump_yaml

_PACKAGES = ("megatron-smartmoe", "megatron-core", "torch", "transformer-engine", "apex", "numpy", "sentencepiece")
_CHECKOUT = Path(__file__).resolve().parents[3]  # where the package lies in one; site-packages of an installation


def launcher_command() -> str:
    """How a user starts the launcher: the script of a checkout, the module of an installation."""
    script = "scripts/pretrain_gpt_moe.sh"
    return script if (_CHECKOUT / script).is_file() else "python -m megatron_smartmoe.adapter.launch"


def choose(asked: Path | None, name: str, environ: Mapping[str, str] = os.environ) -> Path:
    """The directory of --run-dir, else a new one under runs/, the same on every node of a Slurm job."""
    if asked is not None:
        return asked
    job = environ.get("SLURM_JOB_ID")
    return Path("runs") / (f"{name}-job{job}" if job else f"{name}-{time.strftime('%Y%m%d-%H%M%S')}")


def create(path: Path, spec: RunSpec, command: str) -> None:
    """Write the directory's files; those of an existing directory that the launcher does not write stay.

    Raises:
        ConfigError: the path cannot be a directory.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            "--run-dir", str(path), error.strerror or "cannot be created", "Pass another directory."
        ) from None
    content = {"name": spec.name, "nproc": spec.nproc, "data": spec.data, "flags": {"all": spec.flags}}
    (path / "config.yaml").write_text(dump_yaml(content), encoding="utf-8")
    script = path / "command.sh"
    script.write_text(f"#!/usr/bin/env bash\ncd {shlex.quote(str(Path.cwd()))}\n{command}\n", encoding="utf-8")
    script.chmod(0o755)
    text = json.dumps(_environment(), indent=2) + "\n"
    (path / "environment.json").write_text(text, encoding="utf-8")


def _environment() -> dict[str, Any]:
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "git": _git("rev-parse", "HEAD"),
        "git_changes": _git("status", "--short"),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in _PACKAGES},
        "host": platform.node(),
        "argv": sys.argv[1:],
        "slurm": {name: value for name, value in sorted(os.environ.items()) if name.startswith("SLURM_")},
    }


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
