"""The tokenizer that a path and some options name, as data preparation and the checks before a run use it."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from megatron_smartmoe.adapter.tokenizers.base import (
    GPT2,
    HUGGING_FACE,
    NULL,
    SENTENCEPIECE,
    TIKTOKEN,
    TextTokenizer,
    TokenizerFacts,
)
from megatron_smartmoe.adapter.tokenizers.detect import HUGGING_FACE_FILE, detect
from megatron_smartmoe.adapter.tokenizers.huggingface import (
    load_gpt2,
    load_huggingface,
    needs_transformers,
    transformers_is_installed,
)
from megatron_smartmoe.adapter.tokenizers.sentencepiece import load_sentencepiece
from megatron_smartmoe.adapter.tokenizers.tiktoken import TikTokenOptions, load_tiktoken, read_ranks, tiktoken_facts
from megatron_smartmoe.errors import ConfigError

_BERT_KINDS = ("BertWordPieceLowerCase", "BertWordPieceCase")
_SENTENCEPIECE_KINDS = (SENTENCEPIECE, "GPTSentencePieceTokenizer", "Llama2Tokenizer")


@dataclass(frozen=True, kw_only=True)
class TokenizerOptions:
    """Megatron's flags about tokenizers.

    Args:
        kind: --tokenizer-type; None to tell by the content of the path.
        special_tokens: --tokenizer-special-tokens.
        include_special_tokens: not --tokenizer-hf-no-include-special-tokens.
        tiktoken: of tiktoken vocabularies.
    """

    kind: str | None = None
    special_tokens: Sequence[str] = ()
    include_special_tokens: bool = True
    tiktoken: TikTokenOptions = field(default_factory=TikTokenOptions)

    def refuse_unused(self, kind: str) -> None:
        """Raise ConfigError for a flag that a tokenizer of this kind has no use for."""
        pattern, num_special = self.tiktoken.pattern, self.tiktoken.num_special
        uses = (
            ("--tokenizer-special-tokens", " ".join(self.special_tokens), "", (HUGGING_FACE, TIKTOKEN)),
            ("--tokenizer-hf-no-include-special-tokens", not self.include_special_tokens, False, (HUGGING_FACE,)),
            ("--tiktoken-pattern", pattern, None, (TIKTOKEN,)),
            ("--tiktoken-num-special-tokens", num_special, TikTokenOptions.num_special, (TIKTOKEN,)),
        )
        for flag, value, default, kinds in uses:
            if value != default and kind not in kinds:
                raise ConfigError(flag, value, f"has no effect on a {kind}", "Remove it.")


def load_tokenizer(path: Path, options: TokenizerOptions) -> TextTokenizer:
    """Load a tokenizer.

    Raises:
        ConfigError: it is not there, cannot be read, is of another kind than the options say, or needs a package.
    """
    kind, place = _kind_and_place(path, options.kind)
    options.refuse_unused(kind)
    if kind == HUGGING_FACE:
        return load_huggingface(
            place, additional=options.special_tokens, include_special_tokens=options.include_special_tokens
        )
    if kind == TIKTOKEN:
        return load_tiktoken(place, options.tiktoken)
    return load_sentencepiece(place.read_bytes(), place)


def facts_of(args: Namespace) -> TokenizerFacts | None:
    """What the tokenizer that Megatron will build is; None for kinds that only Megatron can tell.

    Args:
        args: Megatron's arguments, parsed.

    Raises:
        ConfigError: see `load_tokenizer`.
    """
    kind, model = args.tokenizer_type, args.tokenizer_model
    if kind == NULL:
        return _null_facts(args)
    if kind in (GPT2, *_BERT_KINDS):
        return _gpt2_facts(args)
    if kind not in (*_SENTENCEPIECE_KINDS, HUGGING_FACE, TIKTOKEN) or args.metadata_path is not None:
        return None
    if model is None:
        way_out = "Pass --tokenizer-model PATH, the tokenizer that made the dataset."
        raise ConfigError("--tokenizer-model", None, f"is required by --tokenizer-type {kind}", way_out)
    path = Path(model)
    if kind in _SENTENCEPIECE_KINDS:
        if not path.is_file():
            way_out = "Pass the .model file that made the dataset."
            raise ConfigError("--tokenizer-model", model, "is not a file", way_out)
        _kind_and_place(path, SENTENCEPIECE)
        legacy = args.tokenizer_sentencepiece_legacy  # adds tokens that only Megatron counts
        facts = load_sentencepiece(path.read_bytes(), path).facts
        return None if legacy and args.special_tokens else facts
    if kind == TIKTOKEN:
        _, place = _kind_and_place(path, TIKTOKEN)
        if place != path:
            rule = "is a folder"
            raise ConfigError("--tokenizer-model", model, rule, f"Pass --tokenizer-model {place}.")
        return tiktoken_facts(path, tiktoken_options(args))
    return _huggingface_facts(args, path)


def tiktoken_options(args: Namespace) -> TikTokenOptions:
    """Megatron's flags for tiktoken."""
    return TikTokenOptions(
        vocab_size=args.vocab_size,
        num_special=args.tiktoken_num_special_tokens,
        special=None if args.special_tokens is None else tuple(args.special_tokens),
        pattern=args.tiktoken_pattern,
    )


def _huggingface_facts(args: Namespace, path: Path) -> TokenizerFacts | None:
    from megatron_smartmoe.adapter.local.huggingface import is_read_here

    own = {"use_fast": not args.tokenizer_hf_no_use_fast, "trust_remote_code": args.trust_remote_code}
    if not is_read_here(path, vocab_file=args.vocab_file, **own):
        if not transformers_is_installed():
            _kind_and_place(path, None if path.exists() else HUGGING_FACE)
            raise needs_transformers(path, "--tokenizer-model")
        return None
    _kind_and_place(path, HUGGING_FACE)
    return load_huggingface(path, additional=args.special_tokens or ()).facts


def _gpt2_facts(args: Namespace) -> TokenizerFacts | None:
    """GPT-2's two files are read here; without them Megatron downloads the files and lets transformers read them."""
    if args.tokenizer_type == GPT2 and args.vocab_file is not None and args.merge_file is not None:
        facts = load_gpt2(args.vocab_file, args.merge_file, args.special_tokens or ()).facts
        return replace(facts, kind=GPT2)
    if not transformers_is_installed():
        rule = "needs the package transformers, which is not installed"
        way_out = "Install it: pip install transformers (the extra megatron-smartmoe[transformers])."
        if args.tokenizer_type == GPT2:
            rule = f"needs --vocab-file and --merge-file, or {rule.removeprefix('needs ')}"
            way_out = f"Pass --vocab-file vocab.json --merge-file merges.txt, or {way_out[0].lower()}{way_out[1:]}"
        raise ConfigError("--tokenizer-type", args.tokenizer_type, rule, way_out)
    return None


def _null_facts(args: Namespace) -> TokenizerFacts:
    """The null tokenizer is numbers; whether its eod is one of them or one more depends on Megatron's release."""
    from megatron.core.tokenizers.text.libraries.null_tokenizer import NullTokenizer

    if args.vocab_size is None:
        raise ConfigError("--vocab-size", None, "is required by --tokenizer-type NullTokenizer", "Pass --vocab-size N.")
    return TokenizerFacts(kind=NULL, path=None, vocab_size=int(NullTokenizer(args.vocab_size).vocab_size))


def _kind_and_place(path: Path, asked: str | None) -> tuple[str, Path]:
    """The kind of a tokenizer and where it is read from.

    Raises:
        ConfigError: it is of another kind than asked for.
    """
    kind, place = detect(path)
    if asked == HUGGING_FACE and path.is_dir() and not (path / HUGGING_FACE_FILE).is_file():
        return HUGGING_FACE, path  # transformers reads more kinds of folders
    if asked is not None and kind != asked:
        _check_is_tokenizer(kind, place)
        rule = f"is a tokenizer of --tokenizer-type {kind}, not of {asked}"
        raise ConfigError("--tokenizer-model", str(path), rule, f"Pass --tokenizer-type {kind}.")
    return kind, place


def _check_is_tokenizer(kind: str, place: Path) -> None:
    """Raise ConfigError when a path that looks like a kind of tokenizer is none: then no other flag helps."""
    if kind == SENTENCEPIECE:
        load_sentencepiece(place.read_bytes(), place)
    elif kind == TIKTOKEN:
        read_ranks(place)
    elif place.exists():
        load_huggingface(place)
