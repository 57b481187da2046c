"""The measurements of a machine, before any line is fitted to them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from megatron_smartmoe.calibrate.line import LineFit, fit_line
from megatron_smartmoe.cost.compute import ExpertShape

COLLECTIVES = ("all_to_all", "ring", "all_reduce", "send_recv")
LINKS = ("intra", "inter")  # inside a node and between nodes; levels above the nodes are links by their names


@dataclass(frozen=True, kw_only=True)
class Point:
    """One amount and its time.

    Attributes:
        units: tokens per expert, or bytes.
        time_s: median over the repeats of the slowest rank's time.
        spread: interquartile range of the repeats over the median.
    """

    units: float
    time_s: float
    spread: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Series:
    """One operation at several amounts; the unit of an amount depends on the operation.

    gemm: tokens per expert, and the time of one expert, forward and backward. copy: bytes read and written.
    Collectives: bytes through the busiest port in one direction, so that operations are comparable: n (R - 1) / R of an
    all-to-all whose ranks hold n bytes each, twice that of an all-reduce of n bytes and of a ring (reduce-scatter and
    all-gather of n bytes), n of a message.
    """

    points: tuple[Point, ...]

    def fit(self) -> LineFit:
        """The line through the points.

        Raises:
            PlanError: fewer than two different amounts.
        """
        return fit_line([point.units for point in self.points], [point.time_s for point in self.points])


@dataclass(frozen=True, kw_only=True)
class MachineMeasurement:
    """Everything that one job measured, the same on each of its ranks.

    Attributes:
        device: name of the accelerator, or CPU-thread.
        memory_bytes: memory that one rank may use.
        nodes: number of machines.
        ranks_per_node: on each of them; all measured at the same time.
        cores_per_node: CPU cores that the ranks of a node share.
        expert: shape and precision of the products.
        gemm, copy: see Series.
        links: series by (collective, link); absent for a link with one rank.
        members: ranks of each collective, by link.
        ranks_per_device: how many times as fast products are when one rank of a node works alone; 1 on GPUs.
        levels: nodes of one domain by level, the smallest first; a level is among `links` where several of its domains
            took part.
        extra: bandwidths that a cluster file has no key for, bytes a second by name.
        how: backend, torch version, precision and date, as text for the sources.
        repeats: repeats of each point.
    """

    device: str
    memory_bytes: float
    nodes: int
    ranks_per_node: int
    cores_per_node: int
    expert: ExpertShape
    gemm: Series
    copy: Series
    links: Mapping[tuple[str, str], Series]
    members: Mapping[str, int]
    how: str
    repeats: int
    ranks_per_device: float = 1.0
    levels: Mapping[str, int] = field(default_factory=dict)
    extra: Mapping[str, float] = field(default_factory=dict)
