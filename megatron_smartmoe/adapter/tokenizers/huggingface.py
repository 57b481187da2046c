"""Hugging Face tokenizers through the package `tokenizers`, without `transformers`.

`tokenizer.json` holds everything that turns text into ids; what transformers adds is in the files beside it: which
tokens are bos, eos and pad, and the chat template. Those are read here with transformers' meaning (release 5), so that
both give the same ids. Tokenizers without a `tokenizer.json` need transformers.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from megatron_smartmoe.adapter.tokenizers.base import HUGGING_FACE, SpecialToken, TokenizerFacts
from megatron_smartmoe.adapter.tokenizers.chat import ChatTemplate
from megatron_smartmoe.adapter.tokenizers.detect import HUGGING_FACE_FILE
from megatron_smartmoe.errors import ConfigError, one_line

# In transformers' order: tokens that are missing from the vocabulary get their ids in it.
_SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_GPT2_EOD = "<|endoftext|>"
# Where no file says which token ends a text: one of these, if just one of them is a special token.
_USUAL_EOD = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[EOS]")


@dataclass(frozen=True, kw_only=True)
class HuggingFaceTextTokenizer:
    """A Hugging Face tokenizer: `TextTokenizer`.

    Args:
        tokenizer: text to ids; truncates and pads nothing.
        path: its folder or file.
        special: bos_token, eos_token and so on, as far as there are any.
        before, after: ids that are put around every text that no chat template wrote.
        chat: its chat template.
        note: see TokenizerFacts.
    """

    tokenizer: Tokenizer
    path: Path
    special: Mapping[str, str]
    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()
    chat: ChatTemplate | None = None
    note: str = ""

    @property
    def facts(self) -> TokenizerFacts:
        """Its ids. As in Megatron, sep stands in for a missing eos, and cls for bos."""
        return TokenizerFacts(
            kind=HUGGING_FACE,
            path=self.path,
            vocab_size=self.tokenizer.get_vocab_size(with_added_tokens=True),
            bos=self.token("bos_token") or self.token("cls_token"),
            eod=self.token("eos_token") or self.token("sep_token"),
            pad=self.token("pad_token"),
            note=self.note,
        )

    def token(self, name: str) -> SpecialToken | None:
        """A special token by transformers' name, such as `eos_token`."""
        text = self.special.get(name)
        number = None if text is None else self.tokenizer.token_to_id(text)
        return None if text is None or number is None else SpecialToken(text=text, id=number)

    def encode(self, text: str, *, is_chat: bool = False) -> list[int]:
        """Ids of one document; special tokens in the text count as themselves, as everywhere in Hugging Face."""
        (encoded,) = self.tokenizer.encode_batch_fast([text], add_special_tokens=False)  # without characters' places
        ids: list[int] = encoded.ids
        return ids if is_chat else [*self.before, *ids, *self.after]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, special tokens included."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=False))


@dataclass(frozen=True, kw_only=True)
class _Config:
    """What the files beside tokenizer.json say."""

    values: Mapping[str, Any] = field(default_factory=dict)
    special: Mapping[str, str] = field(default_factory=dict)
    template: str | None = None


def load_huggingface(
    path: Path,
    *,
    additional: Sequence[str] = (),
    include_special_tokens: bool = True,
    option: str = "--tokenizer-model",
) -> HuggingFaceTextTokenizer:
    """Load a tokenizer from a folder with tokenizer.json, or from that file.

    Args:
        path: the folder or file; where it has no tokenizer.json, transformers reads it.
        additional: special tokens to add (Megatron's --tokenizer-special-tokens).
        include_special_tokens: put around a text what the tokenizer puts around it.
        option: the flag that named the path.

    Raises:
        ConfigError: it cannot be read, or names no token that ends a text.
    """
    file = path / HUGGING_FACE_FILE if path.is_dir() else path
    if not file.is_file():
        return _from_transformers(path, additional, include_special_tokens, option)
    config = _read_config(file.parent, option)
    try:
        tokenizer = Tokenizer.from_str(file.read_text(encoding="utf-8"))
    except Exception as error:  # the package raises nothing more specific
        rule = f"is not a Hugging Face tokenizer ({one_line(error)})"
        raise ConfigError(option, str(file), rule, "Give the tokenizer.json that is beside the model.") from error
    return _complete(tokenizer, path, config, additional, include_special_tokens, option)


def load_gpt2(vocab_file: str, merge_file: str, additional: Sequence[str] = ()) -> HuggingFaceTextTokenizer:
    """GPT-2's tokenizer from its two files, as Megatron's tools have prepared data with it for years.

    Args:
        vocab_file: vocab.json (Megatron's --vocab-file).
        merge_file: merges.txt (Megatron's --merge-file).
        additional: special tokens to add.

    Raises:
        ConfigError: a file cannot be read, or the vocabulary lacks `<|endoftext|>`.
    """
    for option, name in (("--vocab-file", vocab_file), ("--merge-file", merge_file)):
        if not Path(name).is_file():
            raise ConfigError(
                option, name, "is not a file", f"Pass the {option.split('-')[2]} file of GPT-2's tokenizer."
            )
    try:
        tokenizer = Tokenizer(models.BPE.from_file(vocab_file, merge_file))
    except Exception as error:  # the package raises nothing more specific
        rule = f"is not the vocabulary of a BPE tokenizer, with {merge_file} ({one_line(error)})"
        raise ConfigError("--vocab-file", vocab_file, rule, "Pass GPT-2's vocab.json and merges.txt.") from error
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if tokenizer.token_to_id(_GPT2_EOD) is None:
        rule = f"has no {_GPT2_EOD}, with which GPT-2's tokenizer ends documents"
        raise ConfigError("--vocab-file", vocab_file, rule, "Pass GPT-2's vocab.json.")
    special = dict.fromkeys(("bos_token", "eos_token", "unk_token"), _GPT2_EOD)
    tokenizer.add_special_tokens([AddedToken(_GPT2_EOD, special=True, normalized=False)])
    return _complete(tokenizer, Path(vocab_file), _Config(special=special), additional, True, "--vocab-file")


def transformers_is_installed() -> bool:
    """Whether the package transformers is there."""
    return importlib.util.find_spec("transformers") is not None


def needs_transformers(path: Path, option: str) -> ConfigError:
    """The error for a tokenizer that only transformers can read."""
    rule = f"has no {HUGGING_FACE_FILE}, and the package transformers, which reads other tokenizers, is not installed"
    way_out = "Give a folder with tokenizer.json, or install it: pip install transformers."
    if path.is_dir() and (path / "tokenizer.model").is_file():
        way_out = f"Pass --tokenizer-type SentencePieceTokenizer --tokenizer-model {path / 'tokenizer.model'}, "
        way_out += "or install it: pip install transformers (the extra megatron-smartmoe[transformers])."
    return ConfigError(option, str(path), rule, way_out)


def _from_transformers(
    path: Path, additional: Sequence[str], include_special_tokens: bool, option: str
) -> HuggingFaceTextTokenizer:
    """A tokenizer that transformers converts."""
    if not transformers_is_installed():
        raise needs_transformers(path, option)
    auto: Any = importlib.import_module("transformers").AutoTokenizer
    try:
        loaded = auto.from_pretrained(str(path))
        backend: Tokenizer = loaded.backend_tokenizer
    except Exception as error:  # whatever reading, converting or downloading raises
        rule = f"cannot be read by transformers ({type(error).__name__}: {one_line(error)})"
        raise ConfigError(option, str(path), rule, "Give a folder with tokenizer.json.") from error
    special = {name: str(getattr(loaded, name)) for name in _SPECIAL_NAMES if getattr(loaded, name, None) is not None}
    config = _Config(special=special, template=loaded.chat_template)
    return _complete(backend, path, config, additional, include_special_tokens, option)


def _complete(
    tokenizer: Tokenizer,
    path: Path,
    config: _Config,
    additional: Sequence[str],
    include_special_tokens: bool,
    option: str,
) -> HuggingFaceTextTokenizer:
    """A tokenizer with what its files say of it."""
    tokenizer.no_truncation()  # a limit in the file is that of some model's input
    tokenizer.no_padding()
    # Step 1: the vocabulary, with tokens that only the configuration names
    _add_missing(tokenizer, config, additional, path, option)
    # Step 2: which tokens are special
    special, notes = dict(config.special), []
    if "eos_token" not in special and "sep_token" not in special:
        special["eos_token"] = _usual_eod(tokenizer, path, option)
        notes.append("eod by its usual name: no file beside tokenizer.json says which token ends a text")
    # Step 3: what is put around a text
    before, after = _around(tokenizer) if include_special_tokens else ((), ())
    if include_special_tokens:
        notes += _disagreements(tokenizer, config, special)
    chat = None
    if config.template is not None:
        chat = ChatTemplate(source=config.template, tokens=tuple(sorted(special.items())))
    return HuggingFaceTextTokenizer(
        tokenizer=tokenizer, path=path, special=special, before=before, after=after, chat=chat, note="; ".join(notes)
    )


def _around(tokenizer: Tokenizer) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The ids that the post-processor puts before and after a text."""
    bare = tokenizer.encode("a", add_special_tokens=False).ids
    ids = tokenizer.encode("a", add_special_tokens=True).ids
    for start in range(len(ids) - len(bare) + 1):
        if ids[start : start + len(bare)] == bare:
            return tuple(ids[:start]), tuple(ids[start + len(bare) :])
    return (), ()


def _disagreements(tokenizer: Tokenizer, config: _Config, special: Mapping[str, str]) -> list[str]:
    """Where tokenizer_config.json says something else about bos and eos than tokenizer.json does.

    The file decides, as in transformers 5; releases before it let the configuration of some models decide.
    """
    notes = []
    before, after = _around(tokenizer)
    for name, ids, where in (("bos_token", before, "before"), ("eos_token", after, "after")):
        said, token = config.values.get(f"add_{name}"), tokenizer.token_to_id(special.get(name, ""))
        if token is not None and isinstance(said, bool) and said != (token in ids):
            puts = "puts it" if token in ids else "puts none"
            notes.append(
                f"add_{name} is {str(said).lower()}, but {HUGGING_FACE_FILE} decides and {puts} {where} a text"
            )
    return notes


def _add_missing(tokenizer: Tokenizer, config: _Config, additional: Sequence[str], path: Path, option: str) -> None:
    """Add tokens that the configuration or the user names and tokenizer.json lacks, in transformers' order."""
    decoder = config.values.get("added_tokens_decoder")
    numbered = sorted((int(key), value) for key, value in decoder.items()) if isinstance(decoder, dict) else []
    for number, value in numbered:
        text = str(value["content"])
        if tokenizer.token_to_id(text) is None:
            options = {name: bool(value.get(name, False)) for name in ("single_word", "lstrip", "rstrip", "special")}
            tokenizer.add_tokens([AddedToken(text, normalized=bool(value.get("normalized", True)), **options)])
            if tokenizer.token_to_id(text) != number:
                rule = f"tokenizer_config.json gives {text!r} the id {number}, and the next one of {HUGGING_FACE_FILE}"
                rule += f" is {tokenizer.token_to_id(text)}"
                raise ConfigError(option, str(path), rule, "Get both files again.")
    named = [config.special[name] for name in _SPECIAL_NAMES if name in config.special]
    missing = [text for text in dict.fromkeys([*named, *additional]) if tokenizer.token_to_id(text) is None]
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in missing])


def _usual_eod(tokenizer: Tokenizer, path: Path, option: str) -> str:
    special = [token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special]
    usual = [text for text in _USUAL_EOD if text in special]
    if len(usual) != 1:
        found = ", ".join(special[:8]) or "none"
        rule = f"says nowhere which token ends a text (eos_token; its special tokens: {found})"
        way_out = 'Put a tokenizer_config.json beside it, such as {"eos_token": "</s>"}.'
        raise ConfigError(option, str(path), rule, way_out)
    return usual[0]


def _read_config(folder: Path, option: str) -> _Config:
    """tokenizer_config.json, special_tokens_map.json and chat_template.jinja, as far as they are there."""
    values = _read_object(folder / "tokenizer_config.json", option)
    named = _read_object(folder / "special_tokens_map.json", option) | values
    special = {name: text for name in _SPECIAL_NAMES if (text := _token_text(named.get(name))) is not None}
    template = _template(values.get("chat_template"))
    template_file = folder / "chat_template.jinja"
    if template_file.is_file():
        template = template_file.read_text(encoding="utf-8")
    return _Config(values=values, special=special, template=template)


def _read_object(path: Path, option: str) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ConfigError(option, str(path), f"is invalid JSON: {error}", "Get the file again.") from error
    if not isinstance(content, dict):
        raise ConfigError(option, str(path), "is not a JSON object", "Get the file again.")
    return content


def _token_text(value: object) -> str | None:
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) and value else None


def _template(value: object) -> str | None:
    """The template; of several, the one that is called default."""
    if isinstance(value, list):
        named = {item.get("name"): item.get("template") for item in value if isinstance(item, dict)}
        value = named.get("default")
    return value if isinstance(value, str) else None
