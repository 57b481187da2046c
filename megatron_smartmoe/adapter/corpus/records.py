"""From a JSON record to a document: its keys, nested keys, and chat messages through a chat template."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_smartmoe.adapter.tokenizers.chat import ChatTemplate, ChatTemplateError, chat_messages
from megatron_smartmoe.errors import ConfigError, one_line

MAX_SHOWN_KEYS = 12
NESTED_LEVELS = 3
_ABSENT = object()


@dataclass(frozen=True, kw_only=True)
class Document:
    """A text, and whether a chat template wrote it: then its special tokens are in the text, and none are added."""

    text: str
    is_chat: bool = False


class BadRecordError(ValueError):
    """A record that is no document.

    Args:
        reason: what is wrong with it.
        keys: where a key is missing, what is there: the path of each value and its kind.
    """

    def __init__(self, reason: str, keys: Mapping[str, str] | None = None) -> None:
        super().__init__(reason)
        self.keys = dict(keys or {})


@dataclass(frozen=True, kw_only=True)
class RecordReader:
    """Reads documents out of records.

    Args:
        json_keys: see CorpusSpec.
        chat: renders messages; None where the tokenizer has no template and none was given.
    """

    json_keys: tuple[str, ...]
    chat: ChatTemplate | None = None

    def document(self, line: bytes) -> Document:
        """The document of one line of JSON.

        Raises:
            BadRecordError: there is none.
        """
        if not line.strip():
            return Document(text="")
        record = _parse(line)
        parts = [self._part(record, key) for key in self.json_keys]
        document = Document(text="\n".join(part.text for part in parts), is_chat=any(part.is_chat for part in parts))
        try:
            document.text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise BadRecordError("holds half of a surrogate pair, which is not a character") from error
        return document

    def _part(self, record: dict[str, Any], key: str) -> Document:
        value = _look_up(record, key)
        if value is _ABSENT:
            raise BadRecordError(f"key {key!r} is missing", _kinds(record))
        if isinstance(value, str):
            return Document(text=value)
        messages = chat_messages(value)
        if messages is None:
            raise BadRecordError(f"key {key!r} holds a {type(value).__name__}, a string is needed")
        if self.chat is None:
            rule = f"key {key!r} holds chat messages, and the tokenizer has no chat template"
            raise BadRecordError(f"{rule} (--chat-template FILE gives one)")
        try:
            return Document(text=self.chat.render(messages, record.get("tools")), is_chat=True)
        except ChatTemplateError as error:
            raise BadRecordError(f"the chat template refuses the messages: {one_line(error)}") from error


def missing_key(path: str, records: str, key: str, keys: Mapping[str, str]) -> ConfigError:
    """The error for records that lack a key.

    Args:
        path: the file.
        records: how many lack it, such as "10 lines".
        key: what was looked for.
        keys: what is there instead.
    """
    return ConfigError("--input", path, f"{records} have no key {key!r} ({keys_text(keys)})", key_way_out(keys))


def keys_text(keys: Mapping[str, str]) -> str:
    """The keys that are there, as the end of a sentence."""
    shown = [f"{name!r}" + ("" if kind == "string" else f" ({kind})") for name, kind in keys.items()]
    more = f" and {len(shown) - MAX_SHOWN_KEYS} more" if len(shown) > MAX_SHOWN_KEYS else ""
    return f"keys there: {', '.join(shown[:MAX_SHOWN_KEYS])}{more}" if shown else "the record is empty"


def key_way_out(keys: Mapping[str, str]) -> str:
    """The option that reads another key, with the one that most likely holds the text."""
    likely = [name for name, kind in keys.items() if kind == "string"]
    likely = [name for name in likely if name.rpartition(".")[2] in ("text", "content", "body", "code")] or likely
    likely = likely or [name for name, kind in keys.items() if kind == "chat messages"]
    return f"Give --json-keys {(likely or ['KEY'])[0]}, or the keys that hold the text."


def _parse(line: bytes) -> dict[str, Any]:
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise BadRecordError(invalid_utf8(error)) from error
    except (ValueError, RecursionError) as error:
        if line.rstrip().endswith(b"},"):
            raise BadRecordError("a comma follows the JSON object, which JSON lines have not") from error
        raise BadRecordError(f"invalid JSON: {error}") from error
    if not isinstance(record, dict):
        raise BadRecordError(f"a JSON object is needed, this is a {type(record).__name__}")
    return record


def invalid_utf8(error: UnicodeDecodeError) -> str:
    """What is wrong with bytes that are no UTF-8."""
    return f"invalid UTF-8: {error.reason} (byte 0x{error.object[error.start]:02x})"


def _look_up(record: Any, key: str) -> Any:
    """The value of a key, else what the key leads to part by part: `data.text`, `turns.0.content`."""
    if isinstance(record, dict):
        if key in record:
            return record[key]
        head, dot, rest = key.partition(".")
        while dot:
            if head in record:
                return _look_up(record[head], rest)
            more, dot, rest = rest.partition(".")
            head = f"{head}.{more}"
    if isinstance(record, list):
        head, dot, rest = key.partition(".")
        if head.isascii() and head.isdecimal() and len(head) < 10 and int(head) < len(record):
            return _look_up(record[int(head)], rest) if dot else record[int(head)]
    return _ABSENT


def _kinds(record: dict[str, Any], prefix: str = "", levels: int = NESTED_LEVELS) -> dict[str, str]:
    """The kind of each value of a record; of an object, those of its own values."""
    kinds: dict[str, str] = {}
    for name, value in record.items():
        path = f"{prefix}{name}"
        if isinstance(value, dict) and value and levels > 1:
            kinds |= _kinds(value, f"{path}.", levels - 1)
        else:
            kinds[path] = "string" if isinstance(value, str) else _kind(value)
    return kinds


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, int | float):
        return "number"
    if isinstance(value, dict):
        return "object"
    return "chat messages" if chat_messages(value) is not None else "list"
