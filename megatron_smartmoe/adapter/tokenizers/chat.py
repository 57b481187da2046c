"""Chat messages to text, with the template that a tokenizer brings (Jinja, as in Hugging Face's tokenizers).

The environment is the one that such templates are written for: sandboxed, blocks take their line ends away, loops can
be broken, and `raise_exception`, `strftime_now` and `tojson` exist.
"""

from __future__ import annotations

import datetime
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

type Messages = Sequence[Mapping[str, Any]]

# The other common spelling of a conversation, and what its speakers are called here.
_SPEAKERS = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


class ChatTemplateError(ValueError):
    """A template is no template, or refuses the messages."""


@dataclass(frozen=True, kw_only=True)
class ChatTemplate:
    """A template and the tokenizer's special tokens, which it may name.

    Args:
        source: the template.
        tokens: (name, text) of the special tokens: bos_token, eos_token, pad_token.
    """

    source: str
    tokens: tuple[tuple[str, str], ...] = ()

    def check(self) -> None:
        """Raise ChatTemplateError when the source is no template."""
        _compile(self.source)

    def render(self, messages: Messages, tools: object = None) -> str:
        """The messages as text.

        Args:
            messages: each with a role and content.
            tools: the functions that the assistant may call, or None.

        Raises:
            ChatTemplateError: the template refuses them.
        """
        try:
            return _compile(self.source).render(
                messages=messages, tools=tools, documents=None, add_generation_prompt=False, **dict(self.tokens)
            )
        except (
            jinja2.TemplateError,
            TypeError,
            ValueError,
            ArithmeticError,
            LookupError,
            AttributeError,
            RecursionError,
        ) as error:
            raise ChatTemplateError(str(error) or type(error).__name__) from error


def chat_messages(value: object) -> Messages | None:
    """The messages that a value holds, each with role and content, or None where it holds none."""
    if not isinstance(value, list) or not value or not all(isinstance(item, dict) for item in value):
        return None
    if all("role" in item and ("content" in item or "tool_calls" in item) for item in value):
        return value
    if all("from" in item and "value" in item for item in value):
        return [{"role": _SPEAKERS.get(str(item["from"]), item["from"]), "content": item["value"]} for item in value]
    return None


@functools.lru_cache(maxsize=8)
def _compile(source: str) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    try:
        return environment.from_string(source)
    except jinja2.TemplateError as error:
        raise ChatTemplateError(str(error)) from error


class _Generation(Extension):
    """`{% generation %}` marks what the assistant wrote, for losses on that alone; here it changes nothing."""

    tags = {"generation"}  # noqa: RUF012  # jinja2 declares it so

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        """Keep what is inside."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _tojson(value: object, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    """JSON without HTML's escapes, which jinja2's own filter writes."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str, now: Callable[[], datetime.datetime] = datetime.datetime.now) -> str:
    return now().strftime(pattern)
