"""A request for data preparation, and its result."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

from megatron_smartmoe.adapter.tokenizers.base import HUGGING_FACE, SENTENCEPIECE, TIKTOKEN
from megatron_smartmoe.adapter.tokenizers.detect import is_hub_name
from megatron_smartmoe.errors import ConfigError
from megatron_smartmoe.spec.readers import values
from megatron_smartmoe.spec.readers.files import Named
from megatron_smartmoe.spec.readers.json_text import read_json

META_FORMAT = "megatron_smartmoe corpus"
META_VERSION = 1
DEFAULT_TIKTOKEN_SPECIALS = 1000  # as in Megatron
TOKENIZER_TYPES = (SENTENCEPIECE, HUGGING_FACE, TIKTOKEN)


@dataclass(frozen=True, kw_only=True)
class CorpusSpec:
    """One request, checked by `check`. Exactly one of `tokenizer_model` and `vocab_size` is set.

    Args:
        output_prefix: path without suffix, the later value of Megatron's `--data-path`.
        inputs: files, directories (walked, hidden names left out) or globs, each file read once. See `formats.py`:
            JSON files hold records, as do parquet tables; any other file is one document.
        python_stdlib: add the text that every Python carries, see `sources.stdlib_spans`.
        tokenizer_model: a tokenizer to use: a sentencepiece model, a folder or file of Hugging Face, a tiktoken file.
        tokenizer_type: which of TOKENIZER_TYPES it is; None to tell by its content.
        vocab_size: entries of the tokenizer to train on this corpus; of a tiktoken file, the entries to use.
        include_special_tokens: of a Hugging Face tokenizer, put around a text what it puts around it (such as bos).
        special_tokens: further special tokens, as Megatron's --tokenizer-special-tokens.
        tiktoken_pattern, tiktoken_num_special_tokens: Megatron's flags of these names.
        chat_template: Jinja, or a file of it, for records that hold messages; None for the tokenizer's own.
        json_keys: keys of a record, dotted where they are nested; their strings, joined by a newline, are its document.
        append_eod: end every document with the id that Megatron uses as `eod`.
        max_bytes: keep the first documents, in order, that have at most this many bytes of UTF-8 together.
        seed: orders the standard library's documents, and picks what the tokenizer is trained on.
        tokenizer_sample_bytes: bytes of the corpus that the tokenizer is trained on, at most.
        workers: processes that tokenize; None for one per CPU. Has no influence on the result.
        on_bad_line: "refuse" stops and lists the lines that cannot be used, "skip" leaves them out and counts them.
        force: replace an existing dataset.
        quiet: no progress bar.
        command: the command line, kept in the metadata.
    """

    output_prefix: Path
    inputs: tuple[str, ...] = ()
    python_stdlib: bool = False
    tokenizer_model: Path | None = None
    tokenizer_type: str | None = None
    vocab_size: int | None = None
    include_special_tokens: bool = True
    special_tokens: tuple[str, ...] | None = None
    tiktoken_pattern: str | None = None
    tiktoken_num_special_tokens: int = DEFAULT_TIKTOKEN_SPECIALS
    chat_template: str | None = None
    json_keys: tuple[str, ...] = ("text",)
    append_eod: bool = True
    max_bytes: int | None = None
    seed: int = 0
    tokenizer_sample_bytes: int = 32 * 2**20
    workers: int | None = None
    on_bad_line: Literal["refuse", "skip"] = "refuse"
    force: bool = False
    quiet: bool = False
    command: tuple[str, ...] = ()

    def check(self) -> None:
        """Raise ConfigError for what is wrong in the request itself, before any input is read."""
        if not self.inputs and not self.python_stdlib:
            raise ConfigError("--input", "", "there is no text to prepare", "Give --input FILE... or --python-stdlib.")
        self._check_tokenizer()
        for field, value in (
            ("--vocab-size", self.vocab_size),
            ("--max-bytes", self.max_bytes),
            ("--tokenizer-sample-bytes", self.tokenizer_sample_bytes),
            ("--workers", self.workers),
        ):
            if value is not None and value < 1:
                raise ConfigError(field, value, "has to be at least 1", "Give 1 or more, or leave the flag out.")
        if not self.json_keys:
            raise ConfigError("--json-keys", "", "at least one key is needed", "Give --json-keys text.")
        if self.output_prefix.is_dir() or not self.output_prefix.name:
            raise ConfigError(
                "--output-prefix", str(self.output_prefix), "is a directory", "Give a name in it, such as data/corpus."
            )

    def _check_tokenizer(self) -> None:
        """The tokenizer's options against each other."""
        both = self.tokenizer_model is not None and self.vocab_size is not None and self.tokenizer_type != TIKTOKEN
        if both or (self.tokenizer_model is None and self.vocab_size is None):
            raise ConfigError(
                "--tokenizer-model, --vocab-size",
                "both" if both else "neither",
                "exactly one of the two says which tokenizer to use",
                "Give --tokenizer-model PATH to use one, or --vocab-size N to train one here.",
            )
        if self.tokenizer_model is None and self.tokenizer_type not in (None, SENTENCEPIECE):
            rule = "is not trained here, and --tokenizer-model names none"
            way_out = f"Give --tokenizer-model PATH, or leave the flag out to train a {SENTENCEPIECE}."
            raise ConfigError("--tokenizer-type", self.tokenizer_type, rule, way_out)

    def request(self) -> dict[str, Any]:
        """Everything that decides the bytes of the result (JSON values only), so that two requests can be compared."""
        specials = self.tiktoken_num_special_tokens
        given = {
            "tokenizer_type": self.tokenizer_type,
            "include_special_tokens": None if self.include_special_tokens else False,
            "special_tokens": None if self.special_tokens is None else list(self.special_tokens),
            "tiktoken_pattern": self.tiktoken_pattern,
            "tiktoken_num_special_tokens": None if specials == DEFAULT_TIKTOKEN_SPECIALS else specials,
            "chat_template": self.chat_template,
        }
        return {name: value for name, value in given.items() if value is not None} | {
            "inputs": [str(Path(item).absolute()) for item in self.inputs],
            "python_stdlib": self.python_stdlib,
            "tokenizer_model": None if self.tokenizer_model is None else str(self.tokenizer_model.absolute()),
            "vocab_size": self.vocab_size,
            "json_keys": list(self.json_keys),
            "append_eod": self.append_eod,
            "max_bytes": self.max_bytes,
            "seed": self.seed,
            "tokenizer_sample_bytes": self.tokenizer_sample_bytes,
            "on_bad_line": self.on_bad_line,
        }


@dataclass(frozen=True, kw_only=True)
class PreparedCorpus:
    """A dataset on disk: `PREFIX.bin`, `PREFIX.idx`, `PREFIX.json` and a tokenizer.

    Args:
        prefix: for `--data-path`.
        tokenizer_model: for `--tokenizer-model`.
        tokenizer_type: for `--tokenizer-type`.
        tokenizer_flags: further flags that Megatron's tokenizer needs to be the same.
        vocab_size: entries of the tokenizer, before Megatron pads it.
        eod_id: the end-of-document id, Megatron's `tokenizer.eod`.
        bos_id, pad_id: ids of the tokenizer's other special tokens; None where it has none, or the file is older.
        append_eod: whether every document ends with it.
        num_documents, num_tokens: what the dataset holds, eod included.
        text_bytes: UTF-8 bytes of these documents.
        unigram_entropy_nats: entropy of the token distribution, nats per token: the loss of a model that predicts each
            token by its frequency alone.
        num_empty_documents, num_bad_lines: how many were left out.
        bad_lines: the first bad lines, as `file:line: reason`.
        input_sha256: hash over the hashes of the documents, in order.
        request: `CorpusSpec.request()` of the request that made it.
        command: the command line that made it.
        num_inner_eod: how often the end-of-document id is inside a document.
        max_token_id: the largest id in it; None in older files.
        bin_bytes, idx_bytes: sizes of `PREFIX.bin` and `PREFIX.idx`; None in older files.
    """

    prefix: Path
    tokenizer_model: Path
    vocab_size: int
    eod_id: int
    append_eod: bool
    num_documents: int
    num_tokens: int
    text_bytes: int
    unigram_entropy_nats: float
    num_empty_documents: int
    num_bad_lines: int
    bad_lines: tuple[str, ...]
    input_sha256: str
    request: Mapping[str, Any]
    command: tuple[str, ...]
    tokenizer_type: str = SENTENCEPIECE
    tokenizer_flags: tuple[str, ...] = ()
    bos_id: int | None = None
    pad_id: int | None = None
    num_inner_eod: int = 0
    max_token_id: int | None = None
    bin_bytes: int | None = None
    idx_bytes: int | None = None

    @staticmethod
    def exists(prefix: str | Path) -> bool:
        """Whether a whole dataset is there; the `.idx` is put in place last, so it answers for all."""
        return os.path.isfile(meta_path(prefix)) and os.path.isfile(f"{prefix}.idx")

    @classmethod
    def is_noted(cls, prefix: str | Path) -> bool:
        """Whether the metadata beside a dataset are there and can be read; datasets of other tools have none."""
        meta = read_meta(meta_path(prefix)) if cls.exists(prefix) else None
        return meta is not None and meta.get("version") == META_VERSION

    @classmethod
    def load(cls, prefix: str | Path) -> Self:
        """Read `PREFIX.json`. Raises ConfigError when there is no whole dataset at this prefix."""
        path = meta_path(prefix)
        if not cls.exists(prefix):
            raise ConfigError(
                "--data-path",
                str(prefix),
                "no prepared corpus is here (needs .json and .idx)",
                f"Make it with scripts/prepare_data.py --output-prefix {prefix}.",
            )
        meta = read_meta(path)
        if meta is None or type(meta.get("version")) is not int or meta["version"] != META_VERSION:
            raise ConfigError(
                "--data-path",
                str(path),
                f"is not the metadata of a prepared corpus, version {META_VERSION}",
                "Prepare the corpus again with --force.",
            )
        content = {name: meta[name] for name in cls.__dataclass_fields__ if name in meta}
        tokenizer, again = meta.get("tokenizer_model"), "Restore the file, or prepare the corpus with --force."
        if not isinstance(tokenizer, str) or not tokenizer.isprintable():
            raise ConfigError(f"{path}: tokenizer_model", tokenizer, "must be the path of a file", again)
        model, beside = Path(tokenizer), path.parent / tokenizer
        given = {**content, "prefix": Path(prefix)}
        given["tokenizer_model"] = model if is_hub_name(model) and not os.path.exists(beside) else beside
        try:
            return values.build(cls, given, "", again)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error.field}", error.value, error.rule, again) from None

    def to_json(self) -> str:
        """The text of `PREFIX.json`. The tokenizer's path is relative to it, so that the directory can be moved."""
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "prefix"}
        tokenizer = self.tokenizer_model
        if not is_hub_name(tokenizer):
            try:
                tokenizer = tokenizer.absolute().relative_to(self.prefix.absolute().parent, walk_up=True)
            except ValueError:
                tokenizer = tokenizer.absolute()
        head = {"format": META_FORMAT, "version": META_VERSION, "tokenizer_type": self.tokenizer_type}
        return json.dumps(head | fields | {"tokenizer_model": str(tokenizer)}, indent=2, ensure_ascii=False) + "\n"


def meta_path(prefix: str | Path) -> Path:
    """Path of a prefix's metadata."""
    return Path(f"{prefix}.json")


def read_meta(path: Path) -> dict[str, Any] | None:
    """The metadata in `path`, or None when the file is something else (perhaps the user's own data)."""
    try:
        meta = read_json(Named(path=path, field="--data-path", way_out="Prepare the corpus again with --force."))
    except ConfigError:
        return None
    return meta if isinstance(meta, dict) and meta.get("format") == META_FORMAT else None
