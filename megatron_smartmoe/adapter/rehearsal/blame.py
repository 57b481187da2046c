"""Which flag of the user is the reason of a failure: the one without which the same step passes.

An assertion deep inside Megatron rarely names a flag. But every flag can be left out: if the step that failed passes
then, the flag is a reason, and it is one that the user wrote. Flags whose names occur in the error, or in the source
lines of its traceback, are tried first, those of the command line before those of a file.
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import replace

from megatron_smartmoe.adapter.rehearsal.children import ChildDied, in_child
from megatron_smartmoe.adapter.rehearsal.request import Failure, Request
from megatron_smartmoe.adapter.rehearsal.steps import rehearse_here
from megatron_smartmoe.errors import ConfigError
from megatron_smartmoe.planner.flags import parse_tokens

DETAILS = "{details}"  # in a way out: the file with the whole traceback
_NAMED, _RELATED = 1.0, 0.5  # how much a text says about a flag: its name, or a name that begins alike
_FADING = 0.8  # what a source line counts, compared with the next inner one
_MOST_SECONDS = 20.0  # of the search; what is left then is named by the text alone
_NEVER = ("--smartmoe-run-dir", "--smartmoe-rehearsal", "--num-workers")

# What each step reads most, for the case that neither text nor search names a flag.
_TYPICAL = {
    "tokenizer": ("--tokenizer-model", "--tokenizer-type", "--vocab-size"),
    "learning-rate schedule": ("--lr-decay-style", "--lr", "--train-iters", "--train-samples"),
    "batch sizes": ("--step-batch-size-schedule", "--global-batch-size", "--micro-batch-size"),
    "datasets": ("--split", "--data-path", "--train-data-path", "--data-args-path", "--eval-iters"),
}


def find_cause(request: Request, failure: Failure) -> ConfigError | None:
    """The error of the flag that is the reason; None if no flag is known to be.

    Args:
        request: the run.
        failure: why a step of it failed.
    """
    if failure.refusal is not None:
        return failure.refusal.set_by(_origin(request, failure.refusal.field))
    flags = parse_tokens(request.tokens)
    suspects = rank_suspects(request, failure, list(flags))
    cause = _search(request, failure, [flag for flag, _ in suspects])
    confirmed = cause is not None
    if cause is None:
        named = [flag for flag, score in suspects if score > 0]
        cause = next(iter([*named, *(flag for flag in _TYPICAL.get(failure.step, ()) if flag in flags)]), None)
    if cause is None:
        return None
    values = flags[cause]
    value = True if not values else values[0] if len(values) == 1 else " ".join(values)
    where = f", {failure.place}" if failure.place else ""
    rule = f"{failure.step}: {failure.message} ({failure.kind}{where})"
    way_out = f"Change it or remove it: without it this step passes. Details: {DETAILS}."
    if not confirmed:
        way_out = f"Change it, or what it has to fit. Details: {DETAILS}."
    return ConfigError(cause, value, rule, way_out, request.origin(cause))


def _origin(request: Request, field: str) -> str | None:
    flags = parse_tokens(request.tokens)
    return next((request.origin(word) for word in field.split() if word in flags), None)


def rank_suspects(request: Request, failure: Failure, flags: Sequence[str]) -> list[tuple[str, float]]:
    """(flag, score) from the most to the least likely reason; 0 where no text speaks of the flag."""
    scored = []
    for place, flag in enumerate(flags):
        if flag in _NEVER:
            continue
        texts = (failure.message, *failure.statements)
        score = max(_mention(flag, text) * _FADING**depth for depth, text in enumerate(texts))
        from_file = request.origin(flag) != "command line"
        scored.append((-score, from_file, -place, flag))
    return [(flag, -score) for score, _, _, flag in sorted(scored)]


def _mention(flag: str, text: str) -> float:
    """How clearly a text speaks of a flag."""
    name = flag.removeprefix("--").replace("-", "_")
    words = {word.strip("_").lower() for word in re.findall(r"[A-Za-z_][A-Za-z0-9_-]*", text.replace("--", " "))}
    words = {word.replace("-", "_") for word in words}
    if name in words:
        return _NAMED
    parts = name.split("_")
    for word in words:
        others = word.split("_")
        if len(parts) > 1 and len(others) > 1 and parts[:2] == others[:2]:
            return _RELATED
    return 0.0


def _search(request: Request, failure: Failure, flags: Sequence[str]) -> str | None:
    """The first flag without which the step that failed passes."""
    deadline = time.monotonic() + _MOST_SECONDS
    for flag in flags:
        if time.monotonic() > deadline:
            return None
        try:
            attempt = in_child(rehearse_here, replace(request, tokens=_without(request.tokens, flag)), failure.number)
        except ChildDied:
            continue
        if attempt.failure is None:
            return flag
    return None


def _without(tokens: Sequence[str], flag: str) -> tuple[str, ...]:
    """The flags without one of them and its values."""
    kept, keep = [], True
    for token in tokens:
        if token.startswith("--"):
            keep = token.partition("=")[0] != flag
        if keep:
            kept.append(token)
    return tuple(kept)
