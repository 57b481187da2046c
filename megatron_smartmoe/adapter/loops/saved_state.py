"""What the loops need to continue as if they had never stopped: arrays in files of the checkpoint's folder.

The placement of the experts is a hint in the checkpoint's arguments, and changes no result. What replicas were planned
from does: which copies there are decides the order in which gradients are added. So it is kept beside the checkpoint,
and a resumed run plans what the uninterrupted one would have. Like the placement it is a hint: a run of other sizes, or
a damaged file, starts with an empty history.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_smartmoe.errors import ConfigError, PlanError
from megatron_smartmoe.spec.readers.files import Named
from megatron_smartmoe.spec.readers.numpy_files import read_npz

State = Mapping[str, NDArray[Any]]
LAYERS = "layers"  # numbers of the layers, the first axis of the other arrays


def save(path: Path, state: State) -> str:
    """Write arrays to a file; what went wrong, or nothing."""
    try:
        with path.open("wb") as file:
            np.savez_compressed(file, allow_pickle=False, **state)
    except OSError as error:
        path.unlink(missing_ok=True)
        return f"{path.name} cannot be written: {error.strerror}"
    return ""


def load(path: Path) -> dict[str, NDArray[Any]]:
    """The arrays of a file.

    Raises:
        PlanError: it cannot be read.
    """
    try:
        return read_npz(Named(path=path, field="saved history", way_out="The history starts anew."))
    except ConfigError as error:
        raise PlanError(f"{path} cannot be read: it {error.rule}") from None


def of_layers(states: Sequence[State], numbers: Sequence[int]) -> dict[str, NDArray[Any]]:
    """The rows of some layers, from states of several pipeline stages.

    Raises:
        PlanError: a layer is missing, or the states do not belong together.
    """
    names = set(states[0]) if states else set()
    if LAYERS not in names or any(set(state) != names for state in states):
        raise PlanError("the saved histories of the pipeline stages do not belong together")
    found = [int(number) for state in states for number in state[LAYERS]]
    if missing := [number for number in numbers if number not in found]:
        raise PlanError(f"the saved history has no layer {missing[0]}")
    rows = [found.index(number) for number in numbers]
    try:
        return {name: np.concatenate([state[name] for state in states])[rows] for name in names}
    except (ValueError, IndexError) as error:
        raise PlanError(f"the saved histories of the pipeline stages do not belong together: {error}") from None
