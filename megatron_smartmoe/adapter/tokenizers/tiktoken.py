"""tiktoken vocabularies: Megatron's JSON list, and the lines of base64 and rank that everybody else writes.

Megatron's TikTokenizer reads the JSON list only and takes 131,072 entries whatever the file holds. Both are mended here
(`adapter/local/tiktoken.py` hands it to Megatron), and the ids stay Megatron's: special tokens first, the file's ranks
behind them.
"""

from __future__ import annotations

import base64
import binascii
import importlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_smartmoe.adapter import log_filters
from megatron_smartmoe.adapter.tokenizers.base import TIKTOKEN, SpecialToken, TokenizerFacts
from megatron_smartmoe.adapter.tokenizers.detect import is_tiktoken_line
from megatron_smartmoe.errors import ConfigError

MAX_ENTRIES = 2**17  # Megatron's default size of a vocabulary
_BYTES = 256


@dataclass(frozen=True, kw_only=True)
class TikTokenOptions:
    """Megatron's flags for this tokenizer.

    Args:
        vocab_size: entries to use, special tokens included; None for those of the file, at most MAX_ENTRIES.
        num_special: --tiktoken-num-special-tokens, ids that come before the file's.
        special: --tokenizer-special-tokens; None for Megatron's own.
        pattern: --tiktoken-pattern, how text is cut into words; None for Megatron's default, v2.
    """

    vocab_size: int | None = None
    num_special: int = 1000
    special: tuple[str, ...] | None = None
    pattern: str | None = None


@dataclass(frozen=True, kw_only=True)
class TikTokenTextTokenizer:
    """A tiktoken encoding: `TextTokenizer`, with the ids that Megatron's TikTokenizer gives.

    Args:
        encoding: a tiktoken.Encoding.
        facts: what it is.
    """

    encoding: Any
    facts: TokenizerFacts

    def encode(self, text: str, *, is_chat: bool = False) -> list[int]:
        """Ids of one document; special tokens in the text count as themselves, as in Megatron."""
        ids: list[int] = self.encoding.encode(text, allowed_special="all")
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids."""
        return str(self.encoding.decode(list(ids)))


def load_tiktoken(path: Path, options: TikTokenOptions, option: str = "--tokenizer-model") -> TikTokenTextTokenizer:
    """Build Megatron's tokenizer and take the encoding out of it.

    Raises:
        ConfigError: tiktoken is missing, the file is no vocabulary, or the options do not fit it.
    """
    facts = tiktoken_facts(path, options, option)
    from megatron_smartmoe.adapter import hooks
    from megatron_smartmoe.adapter.local.tiktoken import CompleteTikTokenizer

    hooks.complete_tokenizers()
    keywords: dict[str, Any] = {"special_tokens": None if options.special is None else list(options.special)}
    if options.pattern is not None:
        keywords["pattern"] = options.pattern
    built = CompleteTikTokenizer(
        str(path), num_special_tokens=options.num_special, vocab_size=options.vocab_size, **keywords
    )
    return TikTokenTextTokenizer(encoding=built.tokenizer, facts=facts)


def tiktoken_facts(path: Path, options: TikTokenOptions, option: str = "--tokenizer-model") -> TokenizerFacts:
    """What the tokenizer is, from its file and the flags.

    Raises:
        ConfigError: see `load_tiktoken`.
    """
    if importlib.util.find_spec("tiktoken") is None:
        way_out = "Install it: pip install tiktoken (the extra megatron-smartmoe[tiktoken])."
        raise ConfigError(option, str(path), "needs the package tiktoken, which is not installed", way_out)
    log_filters.install()  # warnings that TransformerEngine, apex or a GPU are missing mean nothing here
    from megatron.core.tokenizers.text.libraries.tiktoken_tokenizer import SPECIAL_TOKENS

    num_ranks = len(read_ranks(path, option))
    special = list(options.special if options.special is not None else SPECIAL_TOKENS)
    _check_special(special, SPECIAL_TOKENS, options)
    size = entries(num_ranks, options.num_special, options.vocab_size)
    if size > num_ranks + options.num_special:
        rule = f"is more than the {num_ranks:,} entries of {path} and {options.num_special} special tokens"
        raise ConfigError("--vocab-size", size, rule, f"Pass --vocab-size {num_ranks + options.num_special}.")
    if size < options.num_special + _BYTES:
        rule = f"leaves no room for the {_BYTES} bytes behind {options.num_special} special tokens"
        raise ConfigError("--vocab-size", size, rule, f"Pass --vocab-size {num_ranks + options.num_special}.")

    def token(name: str) -> SpecialToken:
        return SpecialToken(text=name, id=special.index(name))

    return TokenizerFacts(
        kind=TIKTOKEN,
        path=path,
        vocab_size=size,
        bos=token("<s>"),
        eod=token("</s>"),
        pad=token("<pad>"),
        note=f"special tokens have the ids below {options.num_special}, the file's entries follow",
    )


def entries(num_ranks: int, num_special: int, vocab_size: int | None) -> int:
    """Entries of the vocabulary: those asked for, else the file's and the special ones, at most MAX_ENTRIES."""
    return vocab_size or min(MAX_ENTRIES, num_ranks + num_special)


def read_ranks(path: Path, option: str = "--tokenizer-model") -> list[bytes]:
    """The tokens of a vocabulary, in the order of their ranks.

    Raises:
        ConfigError: it is no vocabulary, or a rank or a byte is missing.
    """
    data = path.read_bytes()
    ranks = _from_json(data) if data.lstrip().startswith(b"[") else _from_lines(data)
    rule = ""
    if ranks is None:
        rule = (
            "is not a tiktoken vocabulary (lines of base64 and a rank, or Megatron's JSON list of rank and token_bytes)"
        )
    elif sorted(ranks) != list(range(len(ranks))):
        rule = "has ranks that are not 0 to the number of entries, each once"
    elif absent := {bytes([value]) for value in range(_BYTES)} - set(ranks.values()):
        rule = f"lacks the byte 0x{min(absent)[0]:02x}: text that has it could not be encoded"
    if rule or ranks is None:
        raise ConfigError(option, str(path), rule, "Give a tiktoken vocabulary, such as cl100k_base.tiktoken.")
    return [ranks[rank] for rank in range(len(ranks))]


def _from_lines(data: bytes) -> dict[int, bytes] | None:
    ranks = {}
    for line in data.splitlines():
        if not line.strip():
            continue
        if not is_tiktoken_line(line):
            return None
        token, _, rank = line.strip().partition(b" ")
        ranks[int(rank)] = base64.b64decode(token)
    return ranks or None


def _from_json(data: bytes) -> dict[int, bytes] | None:
    try:
        items = json.loads(data)
        return {int(item["rank"]): base64.b64decode(item["token_bytes"], validate=True) for item in items} or None
    except (ValueError, TypeError, KeyError, RecursionError, binascii.Error):
        return None


def _check_special(special: list[str], needed: Sequence[str], options: TikTokenOptions) -> None:
    """Megatron's own rules, which it asserts."""
    shown = " ".join(special)
    if missing := [name for name in needed if name not in special]:
        way_out = f"Pass --tokenizer-special-tokens {' '.join(needed)}, and others behind them."
        raise ConfigError("--tokenizer-special-tokens", shown, f"lacks {' '.join(missing)}", way_out)
    if len(set(special)) < len(special):
        raise ConfigError("--tokenizer-special-tokens", shown, "names a token twice", "Remove one of them.")
    if options.num_special < len(special):
        rule = f"is less than the {len(special)} special tokens"
        way_out = f"Pass --tiktoken-num-special-tokens {len(special)}."
        raise ConfigError("--tiktoken-num-special-tokens", options.num_special, rule, way_out)
