"""The corpus under `data` in a run configuration: the flags that read it, and its preparation, once."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from megatron_smartmoe.adapter.corpus.command import build_parser
from megatron_smartmoe.adapter.corpus.spec import PreparedCorpus
from megatron_smartmoe.adapter.launch import flags as flag_lists
from megatron_smartmoe.adapter.tokenizers.base import HUGGING_FACE, SENTENCEPIECE, TIKTOKEN
from megatron_smartmoe.adapter.tokenizers.detect import detect, is_hub_name
from megatron_smartmoe.errors import ConfigError
from megatron_smartmoe.planner.flags import parse_tokens
from megatron_smartmoe.spec.run import FlagValue, RunSpec

# Options of the preparation that Megatron's tokenizer needs too, by its type; both spell them alike.
_TOKENIZER_OPTIONS = {
    SENTENCEPIECE: (),
    HUGGING_FACE: ("tokenizer-special-tokens", "tokenizer-hf-no-include-special-tokens"),
    TIKTOKEN: ("tokenizer-special-tokens", "vocab-size", "tiktoken-pattern", "tiktoken-num-special-tokens"),
}
_OTHER_DATA = ("data-path", "train-data-path", "data-args-path", "per-split-data-args-path", "mock-data")


def only_if_read(spec: RunSpec, command_line: Sequence[str]) -> RunSpec:
    """The configuration, without `data` when the command line names other data: unread data is not prepared."""
    given = parse_tokens(command_line)
    return replace(spec, data=None) if any(f"--{name}" in given for name in _OTHER_DATA) else spec


def dataset_flags(spec: RunSpec) -> dict[str, FlagValue]:
    """Megatron's flags that read the corpus."""
    if spec.data is None:
        return {}
    prefix = str(spec.data["prefix"])
    kind, model = _tokenizer(spec.data, prefix)
    options = {name: spec.data[name] for name in _TOKENIZER_OPTIONS.get(kind, ()) if name in spec.data}
    return {"data-path": prefix, "tokenizer-type": kind, "tokenizer-model": model, **options}


def _tokenizer(data: Mapping[str, FlagValue], prefix: str) -> tuple[str, str]:
    """Type and path of the tokenizer: the one that is given, else the one that the preparation trains."""
    given = data.get("tokenizer-model")
    if not given:
        return SENTENCEPIECE, f"{prefix}.tokenizer.model"
    path = Path(str(given))
    if not os.path.exists(path) and not is_hub_name(path):  # the preparation, or the check of the flags, refuses it
        return str(data.get("tokenizer-type") or SENTENCEPIECE), str(given)
    kind, place = detect(path, "data.tokenizer-model")
    return str(data.get("tokenizer-type") or kind), str(place)


def exists(spec: RunSpec) -> bool:
    """Whether the corpus exists, or none is configured."""
    return spec.data is None or PreparedCorpus.exists(spec.data["prefix"])


def check(spec: RunSpec) -> None:
    """Raises ConfigError for a key of `data` that is no option of scripts/prepare_data.py, or an absent tokenizer."""
    options = {option for option in build_parser()._option_string_actions if option.startswith("--")}
    known = sorted(option.removeprefix("--") for option in options - {"--help", "--output-prefix"})
    for name, value in (spec.data or {}).items():
        if name not in (*known, "prefix"):
            rule = "is not an option of scripts/prepare_data.py"
            raise ConfigError(f"data.{name}", value, rule, f"Known here: prefix, {', '.join(known)}.")
    if model := (spec.data or {}).get("tokenizer-model"):
        detect(Path(str(model)), "data.tokenizer-model")


def preparation(spec: RunSpec) -> list[str]:
    """The command that prepares the corpus.

    Raises:
        ConfigError: see `check`.
    """
    assert spec.data is not None
    check(spec)
    command = [sys.executable, "-m", "megatron_smartmoe.adapter.corpus", "--output-prefix", str(spec.data["prefix"])]
    for name, value in spec.data.items():
        if name != "prefix" and value not in (None, False):
            values = value if isinstance(value, list) else [value]
            command += flag_lists.tokens_of(name, True if value is True else [str(item) for item in values])
    return command


def prepare(spec: RunSpec) -> None:
    """Prepare the corpus. Nodes and runs that start at the same time wait for the first: the preparation holds a lock.

    Raises:
        ConfigError: the preparation failed; it printed the reason.
    """
    assert spec.data is not None
    command = preparation(spec)
    print(f"smartmoe: preparing the corpus {spec.data['prefix']} (only before the first run)", flush=True)
    status = subprocess.run(command, check=False).returncode
    if status:
        rule = f"could not be prepared (exit status {status})"
        raise ConfigError("data.prefix", spec.data["prefix"], rule, "See the error above.")
