"""Errors that a user can act on.

Every message names the field, its value, the rule that it breaks and the way out, so that nobody has to read a
traceback to correct a command line. Anything else that is raised is a bug of this project.
"""

from __future__ import annotations

import reprlib

EXIT_CONFIG_ERROR = 2  # exit status of every command of the project for a wrong command line or file
SHOWN_CHARACTERS = 200  # of a value in a message: enough to recognize it


class SmartMoEError(Exception):
    """Base class: catch this to catch everything that the project raises on purpose."""


class ConfigError(SmartMoEError):
    """A flag, a configuration file or an input file is wrong. Raised before any work starts.

    Args:
        field: the flag or the dotted path of the key, as the user wrote it.
        value: the value that the user gave.
        rule: the rule that it breaks, as a statement.
        way_out: what to write instead.
        origin: where the value was set, such as "command line" or a file and its key; empty where nobody asked.
    """

    def __init__(self, field: str, value: object, rule: str, way_out: str, origin: str = "") -> None:
        self.field, self.value, self.rule, self.way_out, self.origin = field, value, rule, way_out, origin
        where = f" ({printable(origin)})" if origin else ""
        super().__init__(_escaped(f"{printable(field)} = {shown(value)}{where}: {rule}. {way_out}", keep="\n"))

    def set_by(self, origin: str | None) -> ConfigError:
        """The same error with the place where the value was set; itself where that is not known, or named already."""
        if not origin or self.origin:
            return self
        return type(self)(self.field, self.value, self.rule, self.way_out, origin)

    def __reduce__(self) -> tuple[type[ConfigError], tuple[str, object, str, str, str]]:
        """Pickle by the parts (the default would replay the joined message as `field`)."""
        return type(self), (self.field, self.value, self.rule, self.way_out, self.origin)


def shown(value: object) -> str:
    """A value as an error shows it: its repr, of a long one the beginning and the end."""
    try:
        text = repr(value) if isinstance(value, str | bytes) else _SHORT.repr(value)
    except (ValueError, RecursionError):  # a whole number of thousands of digits
        text = f"a {type(value).__name__}"
    return _cut(text)


def printable(text: str) -> str:
    """A text from a file on one line: control characters and surrogates as escapes, the middle of a long one cut."""
    return _cut(_escaped(text))


def _escaped(text: str, keep: str = "") -> str:
    """The text with escapes in place of what a terminal does not print, but for the characters of `keep`."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in keep else c.encode("unicode_escape").decode("ascii") for c in text)


def _cut(text: str) -> str:
    if len(text) <= SHOWN_CHARACTERS:
        return text
    head, tail = SHOWN_CHARACTERS * 3 // 4, SHOWN_CHARACTERS // 4
    return f"{text[:head]} ... ({len(text) - head - tail} characters) ... {text[-tail:]}"


def one_line(error: object) -> str:
    """Another library's message as part of one of ours: without line breaks, of a long one the beginning."""
    text = " ".join(str(error).split())
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]} ..."


def _short_repr() -> reprlib.Repr:
    """A repr that looks at the first entries of a container only: a few lines of YAML can stand for a billion."""
    short = reprlib.Repr()
    short.maxlevel, short.maxstring, short.maxother, short.maxlong = 4, 1000, 1000, 1000
    short.maxlist = short.maxtuple = short.maxset = short.maxfrozenset = short.maxdeque = short.maxarray = 8
    short.maxdict = 8
    return short


_SHORT = _short_repr()


class CompatError(SmartMoEError):
    """The installed software (Megatron, torch, a compiler) is not supported."""


class PlanError(SmartMoEError):
    """A placement, a split or a trace breaks one of its rules. The message names the offending entry."""


class MigrationError(SmartMoEError):
    """Experts could not be moved; they stay where they were."""


class CheckpointError(SmartMoEError):
    """A checkpoint is damaged or incomplete, or cannot be read.

    Args:
        place: the file or folder.
        what: what is wrong with it, as the end of a sentence about `place`.
        reason: how that shows.
    """

    def __init__(self, place: str, what: str, reason: str) -> None:
        self.place, self.what, self.reason = place, what, reason
        super().__init__(f"{place} {what}: {reason}" if reason else f"{place} {what}")

    def __reduce__(self) -> tuple[type[CheckpointError], tuple[str, str, str]]:
        """Pickle by the three parts."""
        return type(self), (self.place, self.what, self.reason)
