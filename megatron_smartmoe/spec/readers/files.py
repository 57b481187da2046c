"""Opening a file that a user named: it exists, is a regular file, is not too large, and is UTF-8 where it is text."""

from __future__ import annotations

import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_smartmoe.errors import ConfigError, printable

MIB = 2**20
DOCUMENT_BYTES = 64 * MIB  # of a JSON document, a line of JSON, or a CSV file; real ones are a thousand times smaller
_UTF16 = (b"\xff\xfe", b"\xfe\xff")
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True, kw_only=True)
class Named:
    """A file, and who named it.

    Attributes:
        path: of the file.
        field: the flag or the words that stand for it in errors.
        way_out: how to get a good one, a sentence.
    """

    path: Path
    field: str
    way_out: str

    def refused(self, rule: str) -> ConfigError:
        """The error for the file as a whole."""
        return ConfigError(self.field, str(self.path), rule, self.way_out)

    def at(self, line: int) -> str:
        """A line of it, as errors name it."""
        return f"{self.path}:{line}"


def size_of(named: Named) -> int:
    """Bytes of the file.

    Raises:
        ConfigError: it does not exist, cannot be reached, or is not a regular file (a pipe would be waited for).
    """
    try:
        found = named.path.stat()
    except FileNotFoundError:
        raise named.refused("does not exist") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise named.refused(f"cannot be read: {_reason(error)}") from None
    if stat.S_ISDIR(found.st_mode):
        raise named.refused("is a directory")
    if not stat.S_ISREG(found.st_mode):
        raise named.refused("is not a regular file")
    return found.st_size


def read_bytes(named: Named, most_bytes: int) -> bytes:
    """The content of a file of at most `most_bytes`.

    Raises:
        ConfigError: see `size_of`; or it is larger.
    """
    size_bytes = size_of(named)  # a buffer for `most_bytes` would cost more time than most files
    try:
        with named.path.open("rb") as file:
            data = file.read(min(size_bytes, most_bytes) + 1)
    except OSError as error:
        raise named.refused(f"cannot be read: {_reason(error)}") from None
    if len(data) > most_bytes:
        raise named.refused(f"is larger than {most_bytes / MIB:g} MiB")
    return data


def read_text(named: Named, most_bytes: int = DOCUMENT_BYTES) -> str:
    """The text of a UTF-8 file, without a byte order mark.

    Raises:
        ConfigError: see `read_bytes`; or it is not UTF-8 text.
    """
    return decode(read_bytes(named, most_bytes), named)


def decode(data: bytes, named: Named, line: int | None = None) -> str:
    """UTF-8 bytes of the file (of its line `line`) as text.

    Raises:
        ConfigError: they are not UTF-8.
    """
    if line in (None, 1):
        if data.startswith(_UTF16):
            raise named.refused("is UTF-16 text, and must be UTF-8")
        data = data.removeprefix(_BOM)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        at = line or data.count(b"\n", 0, error.start) + 1
        begin = data.rfind(b"\n", 0, error.start) + 1
        text = data[begin : error.start + 20].decode("utf-8", "backslashreplace").partition("\n")[0]
        rule = f"is not UTF-8 text: byte 0x{data[error.start]:02x}"
        raise ConfigError(named.at(at), text, rule, f"Save the file as UTF-8, or correct line {at}.") from None


def read_lines(named: Named, most_bytes: int = DOCUMENT_BYTES) -> Iterator[tuple[int, bytes]]:
    """The lines of a file of any size with their numbers, each with its line end as it is.

    Raises:
        ConfigError: see `size_of`; or a line is longer than `most_bytes`.
    """
    size_of(named)
    try:
        with named.path.open("rb") as file:
            number = 0
            while line := file.readline(most_bytes + 1):
                number += 1
                if len(line) > most_bytes:
                    rule = f"is longer than {most_bytes / MIB:g} MiB"
                    raise ConfigError(named.at(number), line[:60], rule, named.way_out)
                yield number, line
    except OSError as error:
        raise named.refused(f"cannot be read: {_reason(error)}") from None


def _reason(error: Exception) -> str:
    return printable((error.strerror if isinstance(error, OSError) else None) or str(error))
