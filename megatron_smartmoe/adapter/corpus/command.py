"""Turn text into a dataset for Megatron: PREFIX.bin, PREFIX.idx, PREFIX.json and, if trained here, a tokenizer.

    python scripts/prepare_data.py --input corpus.jsonl --vocab-size 32000 --output-prefix data/corpus
    python scripts/prepare_data.py --input corpus.jsonl.zst --tokenizer-model models/qwen3 --output-prefix data/corpus
    python scripts/prepare_data.py --python-stdlib --max-bytes 8000000 --vocab-size 4096 --output-prefix data/python

The last line that it prints has the flags to train on it.
Trained tokenizers give back any text as it was, except for the character U+2581, which comes back as a space.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_smartmoe.adapter.corpus.prepare import prepare
from megatron_smartmoe.adapter.corpus.spec import TOKENIZER_TYPES, CorpusSpec, PreparedCorpus
from megatron_smartmoe.errors import SmartMoEError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run; returns the exit status: 0, 2 for a wrong request or input, 1 for a failing disk, 130 for Ctrl-C."""
    parser = build_parser()
    fields = vars(parser.parse_args(arguments))
    command = ("prepare_data.py", *(sys.argv[1:] if arguments is None else arguments))
    for name in ("inputs", "json_keys", "special_tokens"):
        fields[name] = None if fields[name] is None else tuple(fields[name])
    try:
        corpus = prepare(CorpusSpec(**fields, command=command))
    except SmartMoEError as error:
        print(f"prepare_data: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"prepare_data: {error}; nothing was written", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("prepare_data: interrupted; nothing was written", file=sys.stderr)
        return 130
    print(summary(corpus))
    return 0


def build_parser() -> argparse.ArgumentParser:
    """The flags; their names are those of Megatron's tools/preprocess_data.py where it has them."""
    parser = argparse.ArgumentParser(
        prog="prepare_data.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    text = parser.add_argument_group("text")
    text.add_argument(
        "--input",
        dest="inputs",
        nargs="+",
        default=[],
        metavar="PATH",
        help="files, directories or globs: JSON (.jsonl, .ndjson and .json: an object per line, or an array of them), "
        "parquet, and text, a document per file; each of them also as .gz, .zst, .xz or .bz2 but parquet",
    )
    text.add_argument(
        "--python-stdlib", action="store_true", help="use the text that every Python carries: about 10 MB, no download"
    )
    text.add_argument(
        "--json-keys",
        nargs="+",
        default=["text"],
        help="keys whose strings, joined by a newline, are a record's document; data.text is the key text inside data; "
        "a key may hold chat messages (default: text)",
    )
    text.add_argument(
        "--chat-template",
        metavar="FILE",
        help="Jinja template that makes text of chat messages: its file, or itself (default: the tokenizer's)",
    )
    text.add_argument("--max-bytes", type=int, help="keep the first documents that have at most this many bytes")
    text.add_argument(
        "--on-bad-line",
        choices=("refuse", "skip"),
        default="refuse",
        help="lines that cannot be used: stop and list them, or leave them out and count them (default: refuse)",
    )
    tokens = parser.add_argument_group("tokenizer (one of the first two)")
    tokens.add_argument(
        "--tokenizer-model",
        type=Path,
        metavar="PATH",
        help="a sentencepiece model, a folder with Hugging Face's tokenizer.json (or that file), or a tiktoken file",
    )
    tokens.add_argument(
        "--vocab-size",
        type=int,
        metavar="N",
        help="train a sentencepiece model with N entries on this text; of a tiktoken file: use N entries",
    )
    tokens.add_argument(
        "--tokenizer-type", choices=TOKENIZER_TYPES, help="of --tokenizer-model (default: told by its content)"
    )
    tokens.add_argument(
        "--tokenizer-special-tokens",
        dest="special_tokens",
        nargs="+",
        metavar="TOKEN",
        help="further special tokens of a Hugging Face or tiktoken tokenizer; pass them in training too",
    )
    tokens.add_argument(
        "--tokenizer-hf-no-include-special-tokens",
        dest="include_special_tokens",
        action="store_false",
        help="leave out what a Hugging Face tokenizer puts around a text, such as bos",
    )
    tokens.add_argument("--tiktoken-pattern", choices=("v1", "v2"), help="how tiktoken cuts words (default: v2)")
    tokens.add_argument(
        "--tiktoken-num-special-tokens",
        type=int,
        default=CorpusSpec.tiktoken_num_special_tokens,
        metavar="N",
        help="ids in front of a tiktoken file's (default: 1000)",
    )
    tokens.add_argument(
        "--tokenizer-sample-bytes",
        type=int,
        default=CorpusSpec.tokenizer_sample_bytes,
        metavar="N",
        help="train it on at most this many bytes, drawn with --seed (default: 32 MiB)",
    )
    tokens.add_argument(
        "--append-eod",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="end every document with Megatron's end-of-document id (default: yes)",
    )
    run = parser.add_argument_group("output and running")
    run.add_argument("--output-prefix", type=Path, required=True, metavar="PREFIX", help="for Megatron's --data-path")
    run.add_argument("--force", action="store_true", help="replace an existing dataset")
    run.add_argument("--workers", type=int, metavar="N", help="processes that tokenize (default: one per CPU)")
    run.add_argument(
        "--seed",
        type=int,
        default=0,
        help="draws the tokenizer's sample and orders --python-stdlib's documents (default: 0)",
    )
    run.add_argument("--quiet", action="store_true", help="no progress bar")
    return parser


def summary(corpus: PreparedCorpus) -> str:
    """What was made, and the flags to train on it."""
    left_out = f"{corpus.num_empty_documents} empty documents and {corpus.num_bad_lines} bad lines left out"
    flags = shlex.join(corpus.tokenizer_flags)
    return (
        f"{corpus.prefix}: {corpus.num_documents:,} documents, {corpus.text_bytes:,} bytes,"
        f" {corpus.num_tokens:,} tokens ({left_out})\n"
        f"vocabulary {corpus.vocab_size}, end of document {corpus.eod_id}, {_special(corpus)},"
        f" unigram entropy {corpus.unigram_entropy_nats:.4f} nats per token\n"
        f"--data-path {corpus.prefix} --tokenizer-type {corpus.tokenizer_type}"
        f" --tokenizer-model {corpus.tokenizer_model}{' ' * bool(flags)}{flags}"
    )


def _special(corpus: PreparedCorpus) -> str:
    return ", ".join(
        f"{name} {'none' if token is None else token}"
        for name, token in {"begin of text": corpus.bos_id, "padding": corpus.pad_id}.items()
    )
