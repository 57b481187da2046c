"""Errors that a user can act on.

Every message names the field, its value, the rule that it breaks and the way out, so that nobody has to read a
traceback to correct a command line. Anything else that is raised is a bug of this project.
"""

from __future__ import annotations

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
    """

    def __init__(self, field: str, value: object, rule: str, way_out: str) -> None:
        self.field, self.value, self.rule, self.way_out = field, value, rule, way_out
        super().__init__(f"{field} = {shown(value)}: {rule}. {way_out}")

    def __reduce__(self) -> tuple[type[ConfigError], tuple[str, object, str, str]]:
        """Pickle by the four parts (the default would replay the joined message as `field`)."""
        return type(self), (self.field, self.value, self.rule, self.way_out)


def shown(value: object) -> str:
    """A value as an error shows it: its repr, of a long one the beginning and the end."""
    text = repr(value)
    if len(text) <= SHOWN_CHARACTERS:
        return text
    head, tail = SHOWN_CHARACTERS * 3 // 4, SHOWN_CHARACTERS // 4
    return f"{text[:head]} ... ({len(text) - head - tail} characters) ... {text[-tail:]}"


def one_line(error: object) -> str:
    """Another library's message as part of one of ours: without line breaks, of a long one the beginning."""
    text = " ".join(str(error).split())
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]} ..."


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
