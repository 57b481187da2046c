"""Lines that are no documents, counted by what is wrong with them: a wrong key is said once and not per line."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from megatron_smartmoe.adapter.corpus.records import key_way_out, keys_text
from megatron_smartmoe.adapter.corpus.sources import Unit
from megatron_smartmoe.errors import ConfigError

MAX_LISTED = 20  # in the metadata of the dataset
MAX_COUNTED = 10_000  # then a preparation that refuses bad lines stops reading
_SHOWN_KINDS = 6


@dataclass(frozen=True, kw_only=True)
class BadLine:
    """A line that is no document.

    Args:
        path: the input.
        line: counts from 1: in the span as it is read, in the file as it is reported.
        reason: what is wrong with it.
        unit: what a line of it is in the input; a record of an array has no line number.
        keys: where a key is missing, what is there, see `records.BadRecordError`.
    """

    path: str
    line: int
    reason: str
    unit: Unit = "line"
    keys: Mapping[str, str] = field(default_factory=dict)

    @property
    def place(self) -> str:
        """Where it is: `a.jsonl:3`, or `a.json, record 3`."""
        return f"{self.path}:{self.line}" if self.unit == "line" else f"{self.path}, {self.unit} {self.line}"

    @property
    def kind(self) -> str:
        """What is wrong, without what differs from line to line."""
        return self.reason.partition(": ")[0]

    def __str__(self) -> str:
        return f"{self.place}: {self.reason}"


@dataclass(kw_only=True)
class BadLines:
    """All bad lines of a corpus.

    Args:
        count: how many.
        first: the first MAX_LISTED of them.
        kinds: for each kind of reason how many, and the first of them.
    """

    count: int = 0
    first: list[BadLine] = field(default_factory=list)
    kinds: dict[str, tuple[int, BadLine]] = field(default_factory=dict)

    def add(self, bad: BadLine) -> None:
        """Count one."""
        self.count += 1
        if len(self.first) < MAX_LISTED:
            self.first.append(bad)
        count, first = self.kinds.get(bad.kind, (0, bad))
        self.kinds[bad.kind] = (count + 1, first)

    @property
    def many(self) -> bool:
        """Whether enough are counted to stop for them."""
        return self.count >= MAX_COUNTED

    def text(self) -> str:
        """What is wrong, each kind once with its count and its first place, in one line."""
        parts = []
        for count, first in list(self.kinds.values())[:_SHOWN_KINDS]:
            keys = f"; {keys_text(first.keys)}" if first.keys else ""
            parts.append(f"{count:,} x {first.reason} ({'first ' if count > 1 else ''}{first.place}{keys})")
        if len(self.kinds) > _SHOWN_KINDS:
            parts.append(f"and {len(self.kinds) - _SHOWN_KINDS} more kinds")
        return "; ".join(parts)

    def refusal(self) -> ConfigError:
        """The error that stops a preparation for them."""
        first = self.first[0]
        plural = "line" if self.count == 1 else "lines"
        more = " or more" if self.many else ""
        rule = f"{self.count:,}{more} {plural} cannot be used: {self.text()}"
        missing = [bad.keys for _, bad in self.kinds.values() if bad.keys]
        way_out = key_way_out(missing[0]) if missing else "Correct them."
        return ConfigError("--input", first.path, rule, f"{way_out} --on-bad-line skip leaves bad lines out.")
