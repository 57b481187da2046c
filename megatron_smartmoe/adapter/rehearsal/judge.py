"""A rehearsal judged: the report, or the flag that is the reason why it failed."""

from __future__ import annotations

from dataclasses import replace

from megatron_smartmoe.adapter.rehearsal.blame import DETAILS, find_cause
from megatron_smartmoe.adapter.rehearsal.children import ChildDied, in_child
from megatron_smartmoe.adapter.rehearsal.request import Attempt, Report, Request, Verdict
from megatron_smartmoe.adapter.rehearsal.steps import rehearse_here


def judge(request: Request) -> Verdict:
    """Rehearse in a child. A failure that no flag is the reason of is a note: it may be the rehearsal's own."""
    try:
        attempt: Attempt = in_child(rehearse_here, request)
    except ChildDied as death:
        note = f"The rehearsal could not be finished: nothing was rehearsed; details: {DETAILS}."
        return Verdict(report=Report(notes=(note,)), details=str(death))
    failure = attempt.failure
    if failure is None:
        return Verdict(report=attempt.report)
    error = None if failure.is_limit else find_cause(request, failure)
    if error is not None:
        return Verdict(report=attempt.report, error=error, details=failure.details)
    note = f"Not rehearsed from step {failure.step} on: {failure.message} ({failure.kind}); details: {DETAILS}."
    notes = (*attempt.report.notes, note)
    return Verdict(report=replace(attempt.report, notes=notes), details=failure.details)
