"""Whether a checkpoint is whole, and whether its numbers belong together: everything in it is read.

Besides files and digests (`manifest`), the numbers themselves say something. Every save writes the weights as the
rounded main weights. megatron-core up to 0.19.2 saves main weights and moments of several gradient buckets from wrong
places (--dist-ckpt-optim-fully-reshardable with --overlap-grad-reduce): they belong to the parameter's neighbours, and
the last ones end in zeros. Such a checkpoint loads without complaint and its files are as they were written.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from megatron_smartmoe.checkpoint.compare import digests_of, has
from megatron_smartmoe.checkpoint.contents import WORDS, Contents, ParameterKey, as_numbers, by_parameter
from megatron_smartmoe.checkpoint.digest import EXP_AVG, EXP_AVG_SQ, MAIN_WEIGHT, WEIGHT
from megatron_smartmoe.checkpoint.inspection import Inspection, inspect
from megatron_smartmoe.checkpoint.manifest import Manifest
from megatron_smartmoe.checkpoint.reader import read_contents
from megatron_smartmoe.errors import CheckpointError

_ROUNDED = ("float32", "bfloat16", "float16")  # types of weights that are rounded main weights


@dataclass(frozen=True, kw_only=True)
class Finding:
    """Something that is wrong, or looks wrong, in one parameter.

    Attributes:
        subject: the parameter and kind, or the file.
        what: the end of a sentence about it.
        kind: file, digest, incomplete, main_weights, zeros or not_finite.
        severity: damage, or warning for what a sound checkpoint may have too.
    """

    subject: str
    what: str
    kind: str
    severity: Literal["damage", "warning"] = "damage"

    def __str__(self) -> str:
        return f"{self.subject} {self.what}"


@dataclass(frozen=True, kw_only=True)
class Verification:
    """What was checked in a checkpoint, and what is wrong.

    Attributes:
        inspection: of its files.
        findings: what was found, damage first.
        num_parameters: parameters, of each layer and expert, whose numbers were read.
        num_digests: digests that were compared with the manifest's.
        num_main_weights: parameters whose main weights were compared with the weights.
        not_checked: what could not be checked, and why.
    """

    inspection: Inspection
    findings: tuple[Finding, ...]
    num_parameters: int = 0
    num_digests: int = 0
    num_main_weights: int = 0
    not_checked: tuple[str, ...] = ()

    @property
    def is_whole(self) -> bool:
        """Whether nothing is damaged; there may be warnings."""
        return all(finding.severity != "damage" for finding in self.findings)


def verify(folder: Path, progress: Callable[[list[Any]], Any] = list, *, files_only: bool = False) -> Verification:
    """Read a whole checkpoint and say what is wrong with it.

    Args:
        folder: of the checkpoint.
        progress: wraps the list of things to do, such as tqdm.
        files_only: stop after the files.
    """
    # Step 1: files, by their checksums.
    inspection = inspect(folder, "full")
    findings = [_of_file(problem) for problem in inspection.problems]
    result = Verification(inspection=inspection, findings=tuple(findings))
    if files_only:
        return replace(result, not_checked=("numbers: --files-only",))
    # Step 2: where the parameters are; nothing more can be said of what cannot be read.
    try:
        contents = read_contents(folder)
    except CheckpointError as error:
        if not findings:
            findings.append(Finding(subject=error.place, what=f"{error.what}: {error.reason}", kind="file"))
        return replace(result, findings=tuple(findings))
    # Step 3: each parameter by itself, with its optimizer state.
    digests = {} if inspection.manifest is None else digests_of(inspection.manifest)
    scaled = _scaled_by(contents.arguments)
    num_digests = num_main_weights = 0
    for (name, expert), kinds in progress(sorted(by_parameter(contents).items(), key=_order)):
        for kind in kinds:
            key = ParameterKey(name, expert, kind)
            findings += _whole(contents, key)
            if key in digests:
                num_digests += 1
                findings += _same_digest(contents, key, *digests[key])
        try:
            findings += _numbers(contents, name, expert, kinds, scaled)
        except CheckpointError as error:
            findings.append(Finding(subject=error.place, what=f"{error.what}: {error.reason}", kind="file"))
        num_main_weights += not scaled and _has_main_weights(contents, name, expert, kinds)
    findings += [_lost(key) for key in digests if not has(contents, key)]
    return replace(
        result,
        findings=tuple(sorted(dict.fromkeys(findings), key=lambda finding: finding.severity == "warning")),
        num_parameters=len(by_parameter(contents)),
        num_digests=num_digests,
        num_main_weights=num_main_weights,
        not_checked=tuple(_not_checked(contents, inspection.manifest, num_main_weights, scaled)),
    )


def _order(item: tuple[tuple[str, int | None], list[str]]) -> tuple[str, int]:
    (name, expert), _ = item
    return name, -1 if expert is None else expert


def _of_file(problem: str) -> Finding:
    subject, _, what = problem.partition(" ")
    return Finding(subject=subject, what=what, kind="file")


def _whole(contents: Contents, key: ParameterKey) -> Iterator[Finding]:
    missing = contents.missing_elements(key)
    if missing:
        what = f"lacks {missing:,}" if missing > 0 else f"has {-missing:,} too many"
        yield Finding(subject=str(key), what=f"{what} of its {_size(contents, key):,} elements", kind="incomplete")


def _same_digest(contents: Contents, key: ParameterKey, dtype: str, expected: int) -> Iterator[Finding]:
    if contents.dtype(key) != dtype:
        what = f"is {contents.dtype(key)}, and was {dtype} in the ranks' memory when it was saved"
        yield Finding(subject=str(key), what=what, kind="digest")
    elif contents.digest(key) != expected:
        what = "has other numbers than were in the ranks' memory when it was saved (its digest differs)"
        yield Finding(subject=str(key), what=what, kind="digest")


def _lost(key: ParameterKey) -> Finding:
    return Finding(subject=str(key), what="is not there, and was in the ranks' memory when it was saved", kind="digest")


def _size(contents: Contents, key: ParameterKey) -> int:
    return math.prod(contents.shape(key))


def _has_main_weights(contents: Contents, name: str, expert: int | None, kinds: list[str]) -> bool:
    if not {WEIGHT, MAIN_WEIGHT} <= set(kinds):
        return False
    weight, main = (ParameterKey(name, expert, kind) for kind in (WEIGHT, MAIN_WEIGHT))
    is_comparable = contents.dtype(weight) in _ROUNDED and contents.dtype(main) == "float32"
    return is_comparable and contents.shape(weight) == contents.shape(main)


def _are_main_weights(contents: Contents) -> bool:
    """Whether the optimizer's main weights are the weights themselves, as in float32."""
    kinds = {key.kind for key in contents.parameters}
    return MAIN_WEIGHT not in kinds and all(
        contents.dtype(key) == "float32" for key in contents.parameters if key.kind == WEIGHT
    )


def _numbers(
    contents: Contents, name: str, expert: int | None, kinds: list[str], scaled: str | None
) -> Iterator[Finding]:
    """What the numbers of a parameter and of its optimizer state say."""
    tails: dict[str, int] = {}
    for kind in kinds:
        key = ParameterKey(name, expert, kind)
        if contents.missing_elements(key):
            return
        scan = _scan(contents, key)
        if scan.not_finite:
            what = f"has {scan.not_finite:,} elements of {_size(contents, key):,} that are infinite or not a number"
            yield Finding(subject=str(key), what=what, kind="not_finite", severity="warning")
        if scan.negative and kind == EXP_AVG_SQ:
            what = f"has {scan.negative:,} negative elements, and is a mean of squares"
            yield Finding(subject=str(key), what=what, kind="main_weights")
        tails[kind] = scan.zeros_at_end if scan.has_numbers else 0
    differing = 0
    if scaled is None and _has_main_weights(contents, name, expert, kinds):
        differing = _not_rounded(contents, name, expert)
    if differing:
        yield _wrong_main_weights(contents, ParameterKey(name, expert, MAIN_WEIGHT), differing, tails)
    else:
        yield from _suspicious_zeros(contents, name, expert, tails)


@dataclass(frozen=True, kw_only=True)
class _Scan:
    """What one pass over a tensor finds."""

    not_finite: int
    negative: int
    zeros_at_end: int
    has_numbers: bool


def _scan(contents: Contents, key: ParameterKey) -> _Scan:
    not_finite = negative = zeros_at_end = 0
    has_numbers = False
    for first, end in contents.row_blocks(key):
        try:
            numbers = as_numbers(contents.rows(key, first, end), contents.dtype(key))
        except KeyError:  # 8-bit floats
            return _Scan(not_finite=0, negative=0, zeros_at_end=0, has_numbers=True)
        not_finite += int(numbers.size - np.count_nonzero(np.isfinite(numbers)))
        negative += int(np.count_nonzero(numbers < 0))
        others = np.flatnonzero(numbers)
        has_numbers |= len(others) > 0
        zeros_at_end = numbers.size - 1 - int(others[-1]) if len(others) else zeros_at_end + numbers.size
    return _Scan(not_finite=not_finite, negative=negative, zeros_at_end=zeros_at_end, has_numbers=has_numbers)


def _not_rounded(contents: Contents, name: str, expert: int | None) -> int:
    """Number of main weights that do not round to the weights."""
    weight, main = (ParameterKey(name, expert, kind) for kind in (WEIGHT, MAIN_WEIGHT))
    dtype, differing = contents.dtype(weight), 0
    for first, end in contents.row_blocks(weight):
        numbers = as_numbers(contents.rows(weight, first, end), dtype)
        rounded = as_numbers(_round(contents.rows(main, first, end), dtype), dtype)
        same = (rounded == numbers) | (np.isnan(rounded) & np.isnan(numbers))
        differing += int(same.size - np.count_nonzero(same))
    return differing


def _round(numbers: NDArray[np.float32], dtype: str) -> NDArray[Any]:
    """float32 rounded to nearest, ties to even; bfloat16 as unsigned integers."""
    if dtype != "bfloat16":
        with np.errstate(over="ignore"):
            return numbers.astype(dtype)
    bits = numbers.view(np.uint32)
    odd = (bits >> np.uint32(16)) & np.uint32(1)
    rounded = ((bits + np.uint32(0x7FFF) + odd) >> np.uint32(16)).astype(np.uint16)
    return np.where(np.isnan(numbers), np.uint16(0x7FC0), rounded)


def _wrong_main_weights(contents: Contents, key: ParameterKey, differing: int, tails: dict[str, int]) -> Finding:
    what = f"does not round to the weights: {differing:,} of {_size(contents, key):,} elements differ"
    ends = [f"{WORDS[kind]}s {tails[kind]:,}" for kind in (MAIN_WEIGHT, EXP_AVG, EXP_AVG_SQ) if tails.get(kind)]
    if ends and not tails[WEIGHT]:
        what += f", and ends in zeros ({', '.join(ends)})"
    return Finding(subject=str(key), what=what, kind="main_weights")


def _suspicious_zeros(contents: Contents, name: str, expert: int | None, tails: dict[str, int]) -> Iterator[Finding]:
    """Optimizer state whose end is zero within a row: whole rows are zero for tokens that no text had."""
    key = ParameterKey(name, expert, EXP_AVG_SQ)
    zeros = tails.get(EXP_AVG_SQ, 0)
    if not zeros or zeros != tails.get(EXP_AVG, 0):
        return
    width = math.prod(contents.shape(key)[1:])
    if width == 1 or zeros % width:
        what = f"ends in {zeros:,} zeros of {_size(contents, key):,} elements, as does the first moment"
        yield Finding(subject=str(key), what=what, kind="zeros", severity="warning")


def _scaled_by(arguments: Mapping[str, Any]) -> str | None:
    """The flag with which weights are not the rounded main weights; None if the run had none."""
    if arguments.get("qk_clip"):
        return "--qk-clip"
    if arguments.get("use_precision_aware_optimizer") and arguments.get("bf16"):
        return "--use-precision-aware-optimizer"
    return None


def _not_checked(
    contents: Contents, manifest: Manifest | None, num_main_weights: int, scaled: str | None
) -> Iterator[str]:
    if manifest is None:
        yield "checksums and digests: there is no manifest"
    elif not manifest.digests:
        yield "digests: the manifest has none"
    if contents.buffers:
        yield (
            f"optimizer state by parameter: it was saved buffer by buffer ({len(contents.buffers)} buffers), in an "
            "order that only the run knows; --dist-ckpt-optim-fully-reshardable saves it by parameter"
        )
    elif scaled is not None:
        yield f"main weights: with {scaled} they do not round to the weights"
    elif not num_main_weights and not _are_main_weights(contents):
        yield "main weights: none are saved beside the weights in a type that can be compared"
