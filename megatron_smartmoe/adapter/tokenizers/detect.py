"""Which tokenizer a path is, told by content: `tokenizer.model` is the name of two kinds of files."""

from __future__ import annotations

import binascii
from pathlib import Path

from megatron_smartmoe.adapter.tokenizers.base import HUGGING_FACE, SENTENCEPIECE, TIKTOKEN
from megatron_smartmoe.errors import ConfigError

HUGGING_FACE_FILE = "tokenizer.json"
# What AutoTokenizer of the package transformers can read where there is no tokenizer.json.
_SLOW_FILES = ("tokenizer_config.json", "vocab.json", "vocab.txt", "spiece.model")


def detect(path: Path, option: str = "--tokenizer-model") -> tuple[str, Path]:
    """The --tokenizer-type of a tokenizer, and its file, or its folder where the type reads a folder.

    Args:
        path: what the user gave.
        option: the flag, for messages.

    Raises:
        ConfigError: nothing is there, or no tokenizer.
    """
    if path.is_dir():
        return _in_folder(path, option)
    if not path.is_file():
        if is_hub_name(path):
            return HUGGING_FACE, path
        way_out = "Give a sentencepiece .model, a folder with tokenizer.json, or a tiktoken file."
        raise ConfigError(option, str(path), "no such file", way_out)
    with path.open("rb") as file:
        head = file.read(4096)
    text = head.lstrip()
    if text.startswith(b"{"):
        return HUGGING_FACE, path
    if text.startswith(b"[") or is_tiktoken_line(head.partition(b"\n")[0]):
        return TIKTOKEN, path
    return SENTENCEPIECE, path


def is_hub_name(path: Path) -> bool:
    """Whether a path that does not exist may be a name such as `Qwen/Qwen3-8B`."""
    return (
        not path.is_absolute()
        and len(path.parts) == 2
        and not path.parent.exists()
        and path.suffix not in (".model", ".json")
    )


def is_tiktoken_line(line: bytes) -> bool:
    """Whether a line is base64 and a rank, as in OpenAI's `.tiktoken` files and Llama 3's `tokenizer.model`."""
    token, _, rank = line.strip().partition(b" ")
    if not rank.isdigit():
        return False
    try:
        return bool(binascii.a2b_base64(token, strict_mode=True))
    except binascii.Error:
        return False


def _in_folder(folder: Path, option: str) -> tuple[str, Path]:
    if (folder / HUGGING_FACE_FILE).is_file():
        return HUGGING_FACE, folder
    if (folder / "tokenizer.model").is_file():
        return detect(folder / "tokenizer.model", option)
    if tiktoken := sorted(folder.glob("*.tiktoken")):
        return TIKTOKEN, tiktoken[0]
    if any((folder / name).is_file() for name in _SLOW_FILES):
        return HUGGING_FACE, folder
    way_out = "Give the folder that has tokenizer.json or tokenizer.model."
    raise ConfigError(option, str(folder), "is a folder without a tokenizer", way_out)
