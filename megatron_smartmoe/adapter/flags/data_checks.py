"""Start-up checks of data and tokenizer, each and against each other, from sizes, headers and a sample of the ids."""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Iterator
from pathlib import Path

from megatron_smartmoe.adapter.corpus.indexed_files import DamagedDatasetError, Index, check_files, largest_token
from megatron_smartmoe.adapter.corpus.spec import PreparedCorpus
from megatron_smartmoe.adapter.flags.parser import attribute
from megatron_smartmoe.adapter.tokenizers.base import NULL, TokenizerFacts
from megatron_smartmoe.adapter.tokenizers.load import facts_of
from megatron_smartmoe.errors import ConfigError

_DATA_FLAGS = ("--data-path", "--train-data-path", "--valid-data-path", "--test-data-path")
MAKE_ONE = "make the dataset with scripts/prepare_data.py"


def check_data(args: argparse.Namespace) -> None:
    """Check that there are data and a tokenizer, that all files are whole, and that the tokenizer has all their ids.

    Raises:
        ConfigError: the first thing that is wrong.
    """
    prefixes = list(data_prefixes(args))
    if not prefixes and not args.mock_data:
        way_out = "Make one with scripts/prepare_data.py and pass --data-path PREFIX, or pass --mock-data."
        raise ConfigError("--data-path", None, "is required", way_out)
    for flag, prefix in prefixes:
        _check_exists(flag, prefix)
    if args.tokenizer_type is None:
        way_out = (
            "Pass --tokenizer-type SentencePieceTokenizer --tokenizer-model FILE, or NullTokenizer with --mock-data."
        )
        raise ConfigError("--tokenizer-type", None, "is required", way_out)
    local = [(flag, prefix, _whole(flag, prefix)) for flag, prefix in prefixes if "://" not in prefix]
    facts = facts_of(args)
    if facts is not None and args.rank == 0:  # ids are read from the data: once is enough
        for flag, prefix, index in local:
            _check_ids(flag, prefix, index, facts)
            _check_same_tokenizer(flag, prefix, facts)


def data_prefixes(args: argparse.Namespace) -> Iterator[tuple[str, str]]:
    """(flag, prefix) of every dataset that the flags name, without weights.

    Raises:
        ConfigError: a file that lists datasets cannot be read.
    """
    for flag in _DATA_FLAGS:
        yield from _without_weights(flag, getattr(args, attribute(flag)) or ())
    if args.data_args_path is not None:
        yield from _without_weights("--data-args-path", _text("--data-args-path", args.data_args_path).split())
    if args.per_split_data_args_path is not None:
        flag = "--per-split-data-args-path"
        try:
            splits = json.loads(_text(flag, args.per_split_data_args_path))
            lists = [_words(item) for item in splits.values() if item is not None]
        except (ValueError, AttributeError, TypeError, RecursionError) as error:
            rule = 'must be JSON, such as {"train": ["0.3", "a"], "valid": [], "test": []}'
            raise ConfigError(flag, args.per_split_data_args_path, f"{rule} ({error})", "Correct the file.") from error
        for item in lists:
            yield from _without_weights(flag, item)


def _words(item: object) -> list[str]:
    if not isinstance(item, str | list):
        raise TypeError(f"a list is needed, this is a {type(item).__name__}")
    return item.split() if isinstance(item, str) else [str(part) for part in item]


def _without_weights(flag: str, items: list[str] | tuple[str, ...]) -> Iterator[tuple[str, str]]:
    for item in items:
        try:
            float(item)
        except ValueError:
            yield flag, item


def _text(flag: str, name: str) -> str:
    try:
        return Path(name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(flag, name, f"cannot be read ({error})", "Give a file of weights and prefixes.") from error


def _check_exists(flag: str, prefix: str) -> None:
    for suffix in (".bin", ".idx"):
        if "://" not in prefix and not Path(prefix + suffix).is_file():
            if Path(prefix).is_file() and prefix.endswith((".bin", ".idx")):
                rule, way_out = "is a file, and the prefix of both files is needed", f"Pass {flag} {prefix[:-4]}."
            else:
                rule = f"there is no file {prefix + suffix}"
                way_out = f"Check the prefix (without .bin), or {MAKE_ONE}."
            raise ConfigError(flag, prefix, rule, way_out)


def _whole(flag: str, prefix: str) -> Index:
    try:
        return check_files(prefix)
    except DamagedDatasetError as error:
        rule = f"{error}: the dataset is cut off or damaged"
        raise ConfigError(flag, prefix, rule, f"Copy it again, or {MAKE_ONE} --force.") from error


def _check_ids(flag: str, prefix: str, index: Index, facts: TokenizerFacts) -> None:
    largest = largest_token(prefix, index)
    if largest is None or largest < facts.vocab_size:
        return
    rule = f"has token ids up to {largest:,}, and the tokenizer ({facts.kind}) has {facts.vocab_size:,} entries"
    if facts.kind == NULL:
        raise ConfigError(flag, prefix, rule, _made_with(prefix) or f"Pass --vocab-size {largest + 1} or more.")
    raise ConfigError(flag, prefix, rule, _made_with(prefix) or "Pass the tokenizer that made the dataset.")


def _check_same_tokenizer(flag: str, prefix: str, facts: TokenizerFacts) -> None:
    """The id that ends documents in the data must be the tokenizer's, where data preparation noted it."""
    if facts.kind == NULL or facts.eod is None or not PreparedCorpus.is_noted(prefix):
        return
    corpus = PreparedCorpus.load(prefix)
    if corpus.eod_id != facts.eod.id:
        rule = f"was prepared with end of document {corpus.eod_id}, and this tokenizer's is {facts.eod}"
        raise ConfigError(flag, prefix, rule, _made_with(prefix))


def _made_with(prefix: str) -> str:
    """The flags of the tokenizer that the data were made with, as a way out; empty where nothing noted them."""
    if not PreparedCorpus.is_noted(prefix):
        return ""
    corpus = PreparedCorpus.load(prefix)
    flags = " ".join([f"--tokenizer-type {corpus.tokenizer_type} --tokenizer-model {corpus.tokenizer_model}"])
    more = f" {shlex.join(corpus.tokenizer_flags)}" if corpus.tokenizer_flags else ""
    return f"Pass the tokenizer that made it: {flags}{more}."
