"""The parallelism that a checkpoint in Megatron's older `torch` format is for."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

TENSOR, STAGES, EXPERT = "--tp", "--pp", "--ep"


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """Sizes of the parallelism that a checkpoint in the older format is for.

    Attributes:
        tensor: tensor-parallel ranks.
        stages: pipeline stages.
        expert: expert-parallel ranks.
    """

    tensor: int = 1
    stages: int = 1
    expert: int = 1

    @property
    def count(self) -> int:
        """Ranks of a job that loads the checkpoint, at least: experts are cut by tensor parallelism too."""
        return self.tensor * self.stages * self.expert

    def flags(self) -> dict[str, int | bool]:
        """Megatron's flags, where they are not 1."""
        found: dict[str, int | bool] = {}
        if self.tensor > 1:
            found |= {"tensor-model-parallel-size": self.tensor, "sequence-parallel": True}
        if self.stages > 1:
            found["pipeline-model-parallel-size"] = self.stages
        if self.expert > 1:
            found["expert-model-parallel-size"] = self.expert
        return found

    def places(self) -> Iterator[tuple[int, int, int]]:
        """Tensor rank, stage and expert rank of each file."""
        return itertools.product(range(self.tensor), range(self.stages), range(self.expert))

    def folder(self, tensor: int, stage: int, expert: int) -> str:
        """The folder of a rank's file, as Megatron names it (`get_checkpoint_name`)."""
        name = f"mp_rank_{tensor:02d}"
        name += f"_{stage:03d}" if self.stages > 1 else ""
        return name + (f"_{expert:03d}" if self.expert > 1 else "")
