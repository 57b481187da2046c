"""Which parameters differ between two checkpoints, and how far, whatever layouts and formats they were saved in.

Parameters with equal digests have equal numbers and are not compared further. Where both manifests hold digests, only
what differs is read at all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_smartmoe.checkpoint.contents import Contents, ParameterKey, as_numbers
from megatron_smartmoe.checkpoint.digest import KINDS, MAIN_WEIGHT, WEIGHT
from megatron_smartmoe.checkpoint.manifest import Manifest


@dataclass(frozen=True, kw_only=True)
class Difference:
    """How far a parameter of one checkpoint is from the same one of another.

    Attributes:
        key: the parameter.
        num_elements: of it.
        num_differing: elements that are not equal.
        largest: largest difference of two elements; nan where one of them is.
        relative: norm of the difference over the norm of the first checkpoint's parameter.
        what: why the numbers were not compared; None if they were.
    """

    key: ParameterKey
    num_elements: int
    num_differing: int = 0
    largest: float = 0.0
    relative: float = 0.0
    what: str | None = None


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two checkpoints, parameter by parameter.

    Attributes:
        differences: parameters that differ, in the order of their names.
        num_equal: parameters that are equal to the bit.
        only_in_first: parameters that the second one does not have.
        only_in_second: parameters that the first one does not have.
        buffers: why optimizer state was not compared by parameter; empty if it was.
        digests_from: manifests, where equality was read off them, or files.
    """

    differences: tuple[Difference, ...]
    num_equal: int
    only_in_first: tuple[ParameterKey, ...]
    only_in_second: tuple[ParameterKey, ...]
    buffers: tuple[str, ...]
    digests_from: str

    @property
    def is_equal(self) -> bool:
        """Whether everything that could be compared is equal."""
        return not (self.differences or self.only_in_first or self.only_in_second)


def compare(
    first: Contents,
    second: Contents,
    manifests: tuple[Manifest | None, Manifest | None] = (None, None),
    progress: Callable[[list[ParameterKey]], Any] = list,
) -> Comparison:
    """Compare two checkpoints.

    Args:
        first: one.
        second: the other.
        manifests: theirs; digests are taken from them if both have some.
        progress: wraps the list of parameters, such as tqdm.
    """
    known = [digests_of(manifest) for manifest in manifests if manifest is not None and manifest.digests]
    known = known if len(known) == 2 else []
    both = [key for key in first.parameters if key in second.parameters]
    differences, num_equal = _by_digests(known, set(both))
    for key in progress(sorted(both, key=_order)):
        found = None if _same_digests(first, second, key, known) else _difference(first, second, key)
        if found is None:
            num_equal += 1
        else:
            differences.append(found)
    return Comparison(
        differences=tuple(sorted(differences, key=lambda found: _order(found.key))),
        num_equal=num_equal,
        only_in_first=_only(first, second),
        only_in_second=_only(second, first),
        buffers=() if known else tuple(str(c.folder) for c in (first, second) if c.buffers),
        digests_from="manifests" if known else "files",
    )


def _by_digests(
    known: list[Mapping[ParameterKey, tuple[str, int]]], readable: set[ParameterKey]
) -> tuple[list[Difference], int]:
    """What only the manifests tell of both: optimizer state in buffers. Differences, and the number of equal ones."""
    if not known:
        return [], 0
    keys = sorted((key for key in known[0] if key in known[1] and key not in readable), key=_order)
    differing = [key for key in keys if known[0][key] != known[1][key]]
    what = "its digest differs; how far it is apart is not known, because it was saved buffer by buffer"
    return [Difference(key=key, num_elements=0, what=what) for key in differing], len(keys) - len(differing)


def digests_of(manifest: Manifest) -> Mapping[ParameterKey, tuple[str, int]]:
    """Type and digest of each parameter in a manifest."""
    found: dict[ParameterKey, tuple[str, int]] = {}
    for entry in manifest.digests:
        for number, value in enumerate(entry.digests):
            expert = number if ".experts." in entry.name else None
            found[ParameterKey(entry.name, expert, entry.kind)] = (entry.dtype, value)
    return found


def _order(key: ParameterKey) -> tuple[list[str], int, int]:
    """By layer number, name, expert and kind."""
    words = [word.zfill(9) if word.isdigit() else word for word in key.name.split(".")]
    return words, -1 if key.expert is None else key.expert, KINDS.index(key.kind)


def _same_digests(
    first: Contents, second: Contents, key: ParameterKey, known: list[Mapping[ParameterKey, tuple[str, int]]]
) -> bool:
    """Whether shape, type and digest are the same."""
    if (first.shape(key), first.dtype(key)) != (second.shape(key), second.dtype(key)):
        return False
    if known and all(key in digests for digests in known):
        return known[0][key] == known[1][key]
    return first.digest(key) == second.digest(key)


def _difference(first: Contents, second: Contents, key: ParameterKey) -> Difference | None:
    """How far they differ; None if all numbers are equal, as of two types that hold the same ones."""
    num_elements = math.prod(first.shape(key))
    if first.shape(key) != second.shape(key):
        what = f"shape {first.shape(key)} and {second.shape(key)}"
        return Difference(key=key, num_elements=num_elements, what=what)
    if first.missing_elements(key) or second.missing_elements(key):
        return Difference(key=key, num_elements=num_elements, what="one of them is incomplete")
    num_differing, largest, squares, norm = 0, 0.0, 0.0, 0.0
    for start, end in first.row_blocks(key):
        try:
            a, b = (
                as_numbers(side.rows(key, start, end), side.dtype(key)).astype(np.float64) for side in (first, second)
            )
        except KeyError:
            return Difference(key=key, num_elements=num_elements, what="8-bit floats, which are not compared further")
        gap = np.abs(a - b)
        gap[np.isnan(a) & np.isnan(b)] = 0
        gap[a == b] = 0  # two infinities
        num_differing += int(np.count_nonzero(gap))
        largest = float(np.max(gap, initial=largest))
        squares += float(np.square(gap).sum())
        norm += float(np.square(a).sum())
    same_type = first.dtype(key) == second.dtype(key)
    if not num_differing and not same_type:
        return None
    relative = math.sqrt(squares / norm) if norm else (0.0 if not squares else math.inf)
    return Difference(
        key=key,
        num_elements=num_elements,
        num_differing=num_differing,
        largest=largest,
        relative=relative,
        what=None if num_differing else "the same numbers with other bits (signs of zeros, or kinds of nan)",
    )


def _only(one: Contents, other: Contents) -> tuple[ParameterKey, ...]:
    """Parameters that the other one lacks, and has not in buffers, or as weights that are main weights too."""
    return tuple(sorted((key for key in one.parameters if not has(other, key)), key=_order))


def has(contents: Contents, key: ParameterKey) -> bool:
    """Whether a checkpoint has a parameter: also as weights that are main weights, or in buffers."""
    if key in contents.parameters:
        return True
    if key.kind == MAIN_WEIGHT:
        weight = key._replace(kind=WEIGHT)
        if weight in contents.parameters and contents.dtype(weight) == "float32":
            return True
    return bool(contents.buffers) and key.kind != WEIGHT
