"""What went wrong in a save, in a few words."""

from __future__ import annotations

from torch.distributed.checkpoint.api import CheckpointException

_TORCH_WRITER = ("inline_container", "PytorchStreamWriter")  # its errors are about itself, and not about the disk


def reason(error: BaseException) -> str:
    """The system's own words, if an error of the system is behind it."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            where = f": {cause.filename}" if cause.filename else ""
            return f"{cause.strerror}{where}"
        cause = cause.__cause__ or cause.__context__
    if isinstance(error, CheckpointException):
        for failure, _ in error.failures.values():
            return reason(failure)
        return "another rank could not write its files"
    if any(name in str(error) for name in _TORCH_WRITER):
        return "torch could not write a file"
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
