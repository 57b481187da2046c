"""The door of the rehearsal: a run in, a report out, or the one line that says what is wrong with it.

The work is done in forks of this process where the CPU facade is loaded (they start in milliseconds and have torch and
Megatron imported); elsewhere in a process of its own that sees no GPU. A run that passed is remembered by its flags,
the files that they name and the versions of the software, so that the same line costs nothing the next time.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pickle
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from megatron_smartmoe.adapter import cpu
from megatron_smartmoe.adapter.rehearsal.request import DataReport, Report, Request, StageReport, Verdict
from megatron_smartmoe.adapter.run_files import write_text
from megatron_smartmoe.checkpoint.directory import TRACKER
from megatron_smartmoe.errors import ConfigError

ALREADY = "SMARTMOE_REHEARSED"  # in the environment of ranks: the digest of the flags that were rehearsed for them
_PACKAGES = ("torch", "megatron-core", "transformer-engine", "apex", "numpy", "sentencepiece", "tokenizers")
_PACKAGE = Path(__file__).parents[2]


def rehearse(request: Request) -> Report:
    """Rehearse a run, unless the same one has passed before.

    Raises:
        ConfigError: what would stop the ranks.
    """
    remembered = _folder() / f"{_key(request)}.json"
    if (report := _read(remembered)) is not None:
        return report
    verdict = _verdict(request)
    if verdict.error is not None:
        raise _with_details(verdict.error, verdict.details)
    report = verdict.report
    if verdict.details:
        name = _write_details(verdict.details)
        return dataclasses.replace(report, notes=tuple(note.replace(_DETAILS, str(name)) for note in report.notes))
    write_text(remembered, json.dumps(dataclasses.asdict(report)))
    return report


_DETAILS = "{details}"  # as in `blame.DETAILS`, which imports Megatron


def digest_of(tokens: list[str] | tuple[str, ...]) -> str:
    """What identifies the flags of ranks."""
    return hashlib.sha256("\0".join(tokens).encode()).hexdigest()[:32]


def _verdict(request: Request) -> Verdict:
    if cpu.is_installed():
        from megatron_smartmoe.adapter.rehearsal.judge import judge

        return judge(request)
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "megatron_smartmoe.adapter.rehearsal"]
    done = subprocess.run(command, input=pickle.dumps(request), env=environment, capture_output=True, check=False)
    try:
        verdict: Verdict = pickle.loads(done.stdout)
    except (pickle.UnpicklingError, EOFError):
        note = f"The rehearsal ended with status {done.returncode}: nothing was rehearsed; details: {_DETAILS}."
        return Verdict(report=Report(notes=(note,)), details=done.stderr.decode(errors="replace"))
    return verdict


def _with_details(error: ConfigError, details: str) -> ConfigError:
    """The error with the name of the file that holds the details."""
    if _DETAILS not in error.way_out:
        return error
    way_out = error.way_out.replace(_DETAILS, str(_write_details(details)))
    return ConfigError(error.field, error.value, error.rule, way_out, error.origin)


def _write_details(details: str) -> Path:
    path = _folder() / f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.txt"
    path.write_text(details, encoding="utf-8")
    return path


def _folder() -> Path:
    """Where details and reports are kept: the user's cache, else a folder for temporary files."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    for folder in (Path(base) / "megatron_smartmoe", Path(tempfile.gettempdir()) / f"megatron_smartmoe-{os.getuid()}"):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError:
            continue
        if os.access(folder, os.W_OK):
            return folder
    return Path(tempfile.mkdtemp(prefix="megatron_smartmoe-"))


def _key(request: Request) -> str:
    """What a report depends on."""
    content = {
        **dataclasses.asdict(request),
        "origins": None,
        "files": sorted(_files(request)),
        "versions": [_version(name) for name in _PACKAGES],
        "project": max(path.stat().st_mtime_ns for path in _PACKAGE.rglob("*.py")),
        "python": sys.version,
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:32]


def _files(request: Request) -> Iterator[tuple[str, int, int]]:
    """Files that the flags name, with size and time of change: datasets, tokenizers, checkpoints."""
    for token in request.tokens:
        for suffix in ("", ".bin", ".idx", f"/{TRACKER}"):
            path = Path(token + suffix)
            try:
                found = path.stat()
            except (OSError, ValueError):
                continue
            yield str(path), found.st_size, found.st_mtime_ns


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _read(path: Path) -> Report | None:
    """A remembered report; None where there is none that can be read."""
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return Report(
            stages=tuple(StageReport(**{**each, "stages": tuple(each["stages"])}) for each in content["stages"]),
            data=tuple(DataReport(**each) for each in content["data"]),
            memory=tuple((str(what), float(size)) for what, size in content["memory"]),
            notes=tuple(content["notes"]),
        )
    except (OSError, ValueError, TypeError, KeyError):
        return None
