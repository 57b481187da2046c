"""What goes into a rehearsal and what comes out of it; all of it can be sent between processes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from megatron_smartmoe.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Request:
    """A run to rehearse.

    Attributes:
        defaults: flags that this machine needs; they come before the others.
        tokens: the flags of the ranks.
        origins: where each of these flags was set; the command line for those that are not in it.
        world_size: ranks of the job.
        ranks_per_node: ranks of one node.
        cpu: whether the ranks are CPU ranks.
        capability: compute capability of the GPUs that train.
        data_exists: whether the dataset and its tokenizer can be read already.
        vocabulary: entries of the tokenizer that is still to be made; None where it exists.
        keep_index: whether Megatron's index of the dataset is kept where training looks for it.
    """

    defaults: tuple[str, ...]
    tokens: tuple[str, ...]
    origins: Mapping[str, str] = field(default_factory=dict)
    world_size: int
    ranks_per_node: int = 1
    cpu: bool = True
    capability: tuple[int, int] = (0, 0)
    data_exists: bool = True
    vocabulary: int | None = None
    keep_index: bool = True

    @property
    def argv(self) -> tuple[str, ...]:
        """All flags, as Megatron's parser gets them."""
        return (*self.defaults, *self.tokens)

    def origin(self, flag: str) -> str:
        """Where a flag was set."""
        return self.origins.get(flag, "command line")


@dataclass(frozen=True, kw_only=True)
class StageReport:
    """Pipeline stages that are alike.

    Attributes:
        stages: their numbers.
        parameters: of one rank of a stage.
        dense_layers, moe_layers: transformer layers of a stage, those of multi-token prediction included.
    """

    stages: tuple[int, ...]
    parameters: int
    dense_layers: int
    moe_layers: int


@dataclass(frozen=True, kw_only=True)
class DataReport:
    """One split of the dataset.

    Attributes:
        split: train, validation or test.
        asked: samples that the run will read; None for all there are.
        epoch: samples of one epoch; None where that means nothing (mock data).
    """

    split: str
    asked: int | None
    epoch: int | None


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a rehearsal saw.

    Attributes:
        stages: the pipeline stages.
        data: the splits that have samples.
        memory: (what, bytes) of the parts of the fullest rank's memory, as the planner predicts it.
        notes: what could not be rehearsed, as sentences.
    """

    stages: tuple[StageReport, ...] = ()
    data: tuple[DataReport, ...] = ()
    memory: tuple[tuple[str, float], ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Failure:
    """Why a step could not be done.

    Attributes:
        step: its name.
        number: its place in the order of the steps.
        kind: name of the exception's class.
        message: its text, or the assertion that failed.
        statements: source lines of the traceback, innermost first.
        place: `file:line` of the innermost one that is Megatron's.
        details: the whole traceback and what was printed.
        refusal: the error where it is one of this project, which needs no search.
        is_limit: whether it says something about the rehearsal and nothing about the run.
    """

    step: str
    number: int
    kind: str
    message: str
    statements: tuple[str, ...] = ()
    place: str = ""
    details: str = ""
    refusal: ConfigError | None = None
    is_limit: bool = False


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What a rehearsal found: the error that would stop the ranks, or none.

    Attributes:
        report: what it saw.
        error: with `DETAILS` in its way out in the place of the file's name.
        details: the content of that file; empty where everything was done.
    """

    report: Report
    error: ConfigError | None = None
    details: str = ""


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """One way through the steps: a report, or the failure that ended it."""

    report: Report = field(default_factory=Report)
    failure: Failure | None = None
