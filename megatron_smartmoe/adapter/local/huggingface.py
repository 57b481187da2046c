"""Megatron's HuggingFaceTokenizer where `transformers` is not needed: a folder or file with tokenizer.json.

Megatron's own class is transformers' AutoTokenizer. This one reads the same files with the package `tokenizers`, and
with the code that prepares data, so that the ids in a dataset and those in training are the same by construction.
Everything else (names of the hub, vocab.json with merges.txt, code of others) still goes to Megatron's class.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from megatron.core.tokenizers.text.libraries.abstract_tokenizer import MegatronTokenizerTextAbstract

from megatron_smartmoe.adapter.tokenizers.base import GPT2
from megatron_smartmoe.adapter.tokenizers.detect import HUGGING_FACE_FILE
from megatron_smartmoe.adapter.tokenizers.huggingface import HuggingFaceTextTokenizer, load_gpt2, load_huggingface


def is_read_here(
    path: Path, *, use_fast: bool = True, trust_remote_code: bool = False, vocab_file: object = None
) -> bool:
    """Whether `tokenizers` alone reads what Megatron's flags name."""
    in_one_file = path.is_file() or (path / HUGGING_FACE_FILE).is_file()
    return in_one_file and use_fast and not trust_remote_code and vocab_file is None


def choose_class(megatrons: Callable[..., Any]) -> Callable[..., Any]:
    """What stands in for Megatron's class: this module's for what it can read, else Megatron's own."""

    def build(tokenizer_path: str, **options: Any) -> Any:
        wanted = {name: options[name] for name in ("use_fast", "trust_remote_code", "vocab_file") if name in options}
        if not is_read_here(Path(tokenizer_path), **wanted):
            return megatrons(tokenizer_path, **options)
        additional = options.get("additional_special_tokens") or ()
        include = options.get("include_special_tokens", True)
        return LocalHuggingFaceTokenizer(
            load_huggingface(Path(tokenizer_path), additional=additional, include_special_tokens=include),
            additional_special_tokens=additional,
            include_special_tokens=include,
            chat_template=options.get("chat_template"),
        )

    return build


def choose_gpt2_class(megatrons: Callable[..., Any]) -> Callable[..., Any]:
    """What stands in for Megatron's class of GPT2BPETokenizer and BERT's: GPT-2's two files are read here."""

    def build(tokenizer_path: str, **options: Any) -> Any:
        vocab_file, merge_file = options.get("vocab_file"), options.get("merges_file")
        if tokenizer_path != GPT2 or vocab_file is None or merge_file is None:
            return megatrons(tokenizer_path, **options)
        additional = options.get("additional_special_tokens") or ()
        return LocalHuggingFaceTokenizer(
            load_gpt2(vocab_file, merge_file, additional), additional_special_tokens=additional
        )

    return build


class LocalHuggingFaceTokenizer(MegatronTokenizerTextAbstract):
    """Megatron's interface of a text tokenizer, on `HuggingFaceTextTokenizer`."""

    def __init__(
        self,
        text_tokenizer: HuggingFaceTextTokenizer,
        *,
        additional_special_tokens: Sequence[str] = (),
        include_special_tokens: bool = True,
        chat_template: str | None = None,
    ) -> None:
        self.text_tokenizer = text_tokenizer
        self.tokenizer = self.text_tokenizer.tokenizer
        self.include_special_tokens = include_special_tokens
        own = self.text_tokenizer.chat
        self.chat_template = chat_template if chat_template is not None or own is None else own.source
        self._additional = list(additional_special_tokens)

    def text_to_tokens(self, text: str) -> list[str]:
        """The tokens of a text, without those that are put around it."""
        tokens: list[str] = self.tokenizer.encode(text, add_special_tokens=False).tokens
        return tokens

    def tokens_to_text(self, tokens: list[str]) -> str:
        """The text of tokens."""
        return self.text_tokenizer.decode(self.tokens_to_ids(tokens))

    def tokens_to_ids(self, tokens: list[str]) -> list[int]:
        """The ids of tokens; a token that is not in the vocabulary is a KeyError."""
        vocabulary: dict[str, int] = self.tokenizer.get_vocab(with_added_tokens=True)
        return [vocabulary[token] for token in tokens]

    def token_to_id(self, token: str) -> int:
        """The id of a token."""
        return self.tokens_to_ids([token])[0]

    def ids_to_tokens(self, ids: list[int]) -> list[str]:
        """The tokens of ids; an id that the vocabulary leaves out is empty."""
        return [self.tokenizer.id_to_token(number) or "" for number in ids]

    def text_to_ids(self, text: str) -> list[int]:
        """The ids of a text, with those that the tokenizer puts around it."""
        return self.text_tokenizer.encode(text)

    def ids_to_text(self, ids: list[int], remove_special_tokens: bool | None = None) -> str:
        """The text of ids; special tokens stay, unless the option or the flag that adds none says otherwise."""
        remove = not self.include_special_tokens if remove_special_tokens is None else remove_special_tokens
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=remove))

    def apply_chat_template(
        self, conversation: list[dict[str, str]], chat_template: str, tokenize: bool = True, **options: Any
    ) -> str | list[int]:
        """Messages as text, or as its ids."""
        from megatron_smartmoe.adapter.tokenizers.chat import ChatTemplate

        tokens = tuple(sorted(self.text_tokenizer.special.items()))
        text = ChatTemplate(source=chat_template, tokens=tokens).render(conversation, **options)
        return self.text_tokenizer.encode(text, is_chat=True) if tokenize else text

    def add_special_tokens(self, special_tokens_dict: dict[str, Any]) -> int:
        """Not supported: the vocabulary is that of the data. --tokenizer-special-tokens adds tokens at the start."""
        raise NotImplementedError("Pass --tokenizer-special-tokens to add tokens.")

    @property
    def space_sensitive(self) -> bool:
        """Whether two words joined by a space are other tokens than the two words."""
        return self.text_to_tokens("x y") != self.text_to_tokens("x") + self.text_to_tokens("y")

    @property
    def additional_special_tokens_ids(self) -> list[int]:
        """The ids of the tokens that --tokenizer-special-tokens added."""
        return self.tokens_to_ids(self._additional)

    @property
    def vocab(self) -> list[str]:
        """The tokens in the order of their ids."""
        return self.ids_to_tokens(list(range(self.vocab_size)))

    @property
    def inv_vocab(self) -> dict[int, str]:
        """Ids to tokens."""
        return {number: token for token, number in self.tokenizer.get_vocab(with_added_tokens=True).items()}

    @property
    def vocab_size(self) -> int:
        """Entries, added tokens included."""
        return self.text_tokenizer.facts.vocab_size

    @property
    def eod(self) -> int:
        """Ends documents: the tokenizer's eos."""
        eod = self.text_tokenizer.facts.eod
        assert eod is not None  # load_huggingface refuses a tokenizer without
        return eod.id

    @property
    def eos_id(self) -> int:
        """Ends a text."""
        return self.eod

    @property
    def bos_id(self) -> int | None:
        """Begins a text; None where the tokenizer has no such token."""
        bos = self.text_tokenizer.facts.bos
        return bos.id if bos is not None else None

    @property
    def pad_id(self) -> int | None:
        """Padding; None where the tokenizer has no such token, and Megatron then leaves nothing out of the loss."""
        pad = self.text_tokenizer.facts.pad
        return pad.id if pad is not None else None

    @property
    def unk_id(self) -> int | None:
        """Unknown."""
        return self._id_of("unk_token")

    @property
    def sep_id(self) -> int | None:
        """Separator; eos stands in for it, as in Megatron's class."""
        return self._id_of("sep_token", "eos_token")

    @property
    def cls_id(self) -> int | None:
        """Classification; bos stands in for it, as in Megatron's class."""
        return self._id_of("cls_token", "bos_token")

    @property
    def mask_id(self) -> int | None:
        """Mask."""
        return self._id_of("mask_token")

    def _id_of(self, *names: str) -> int | None:
        found = [token.id for name in names if (token := self.text_tokenizer.token(name)) is not None]
        return found[0] if found else None
