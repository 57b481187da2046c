"""Small tokenizers of the kinds that real models have, made here."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from tests.support.corpus import texts

VOCAB_SIZE = 400
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
)
CONFIG: dict[str, Any] = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": None,
    "eos_token": "<|im_end|>",
    "pad_token": {"__type": "AddedToken", "content": "<|endoftext|>", "special": True},
    "chat_template": CHAT_TEMPLATE,
    "model_max_length": 32,
}


def byte_level_bpe(vocab_size: int = VOCAB_SIZE) -> Tokenizer:
    """A byte-level BPE as GPT-2, Qwen and Llama 3 have it, trained on the tests' texts."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts(60), trainer)
    return tokenizer


def write_huggingface(
    folder: Path, config: dict[str, Any] | None = None, *, puts_before: str | None = None, vocab_size: int = VOCAB_SIZE
) -> Path:
    """A folder as it is beside a model: tokenizer.json and tokenizer_config.json.

    Args:
        folder: made if needed.
        config: the content of tokenizer_config.json, CONFIG by default; empty for none.
        puts_before: the token that tokenizer.json puts before every text.
        vocab_size: entries.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = byte_level_bpe(vocab_size)
    tokenizer.enable_truncation(max_length=8)  # some files have it, and data must not be cut by it
    if puts_before is not None:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{puts_before} $A", special_tokens=[(puts_before, tokenizer.token_to_id(puts_before))]
        )
    tokenizer.save(str(folder / "tokenizer.json"))
    if config is None or config:
        (folder / "tokenizer_config.json").write_text(json.dumps(CONFIG if config is None else config))
    return folder


def tiktoken_ranks() -> list[bytes]:
    """The bytes, not in their order (as in OpenAI's files), and a few words."""
    values = [bytes([value]) for value in range(256)]
    return [*values[33:], *values[:33], b" f", b"un", b"ction", b"re", b"return", b" x", b" =", b"def"]


def write_tiktoken(path: Path) -> Path:
    """A vocabulary as lines, the way of OpenAI's `.tiktoken` files."""
    lines = [f"{base64.b64encode(token).decode()} {rank}" for rank, token in enumerate(tiktoken_ranks())]
    path.write_text("\n".join(lines) + "\n")
    return path
