"""The search: every shape is priced or rejected for a stated reason, and nothing that could win is left out.

Method. A shape that Megatron accepts is rejected where a lower bound of its memory (even load, no spare slots) does not
fit in any recomputation mode. The others wait in a heap by a lower bound of time (even load, overlap for free), and the
lowest comes next. The first time that it comes, its bound is raised by what must be recomputed because less of it
cannot fit, and it waits again; the second time it is priced. Once the lowest bound is above the slowest of the best
few, no shape that waits can enter them, and the rest is rejected with its bound as the reason. Of the recomputation
modes of a shape the first that fits is taken: they are ordered by time, each adds work to the one before. So the best
few are the best few of the whole space (as the cost model predicts it), found after pricing a fraction of it; a test
prices the whole space of small worlds and compares.

Alternatives: dynamic programming over layers (Galvatron, Alpa) handles layers that differ in kind, and a GPT's do not;
beam search and annealing give no proof.
"""

from __future__ import annotations

import heapq
import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

from megatron_smartmoe.errors import ConfigError
from megatron_smartmoe.planner import space
from megatron_smartmoe.planner.pricing import Launch, Pricing
from megatron_smartmoe.planner.space import Rejected, SpaceOptions, shapes
from megatron_smartmoe.spec.parallel import ParallelSpec, Recompute

Ranking = Literal["expected", "worst"]
ROUNDING = 1e-9  # of a bound: two sums of the same terms in another order
NEAREST_MISSES = 500  # launches counted in full to find the smallest when nothing fits


@dataclass(frozen=True, eq=False)
class SearchResult:
    """What a search found.

    Attributes:
        best: the best launches, one per shape, fastest first.
        pareto: launches that no other priced launch beats in both time and memory, fastest first.
        rejected: every other point with its reason.
        shapes: points of the space.
        priced: launches that were priced in full.
        seconds: time that the search took.
    """

    best: list[Launch]
    pareto: list[Launch]
    rejected: list[Rejected]
    shapes: int
    priced: int
    seconds: float


class _Bounded(NamedTuple):
    """A shape that waits, ordered by its bound; `mode` is the first recomputation mode that may fit, until it has
    raised the bound."""

    bound_s: float
    number: int
    shape: ParallelSpec
    mode: Recompute | None


@dataclass
class _Kept:
    """The best few launches so far, and all that were priced."""

    limit: int
    rank: Ranking
    heap: list[tuple[float, int, Launch]] = field(default_factory=list)
    launches: list[Launch] = field(default_factory=list)
    counter: Iterator[int] = field(default_factory=itertools.count)

    def seconds(self, launch: Launch) -> float:
        return seconds_of(launch, self.rank)

    @property
    def slowest(self) -> float:
        """Seconds that a new launch must beat."""
        return -self.heap[0][0] if len(self.heap) == self.limit else float("inf")

    def add(self, launch: Launch) -> None:
        self.launches.append(launch)
        entry = (-self.seconds(launch), next(self.counter), launch)
        if len(self.heap) < self.limit:
            heapq.heappush(self.heap, entry)
        elif entry[0] > self.heap[0][0]:
            heapq.heapreplace(self.heap, entry)

    def best(self) -> list[Launch]:
        return [launch for _, _, launch in sorted(self.heap, key=lambda entry: (-entry[0], entry[1]))]


def seconds_of(launch: Launch, rank: Ranking) -> float:
    """Seconds of a step that a launch is ranked by."""
    return launch.expected_s if rank == "expected" else launch.worst_s


def search(
    pricing: Pricing, gpus: int, options: SpaceOptions | None = None, *, limit: int = 10, rank: Ranking = "expected"
) -> SearchResult:
    """Find the best `limit` shapes.

    Raises:
        ConfigError: nothing fits; the message says how far the nearest miss is.
    """
    options = options or SpaceOptions()
    found = find(pricing, gpus, options, limit=limit, rank=rank)
    if not found.best:
        raise nothing_fits(pricing, gpus, options, found.rejected)
    return found


def find(pricing: Pricing, gpus: int, options: SpaceOptions, *, limit: int, rank: Ranking) -> SearchResult:
    """The same; without a best launch where nothing fits."""
    began = time.perf_counter()
    # Step 1: reject what breaks a rule or cannot fit; bound the time of the rest from below.
    rejected: list[Rejected] = []
    waiting, count, memory_bytes = list[_Bounded](), 0, pricing.cluster.gpu.memory_bytes
    for point in shapes(pricing.model, pricing.cluster, gpus, options):
        count += 1
        if isinstance(point, Rejected):
            rejected.append(point)
            continue
        least, first_mode = pricing.least_memory(point, options.recompute)
        if first_mode is None:
            rejected.append(Rejected(point, _too_big(least, memory_bytes), least))
            continue
        bound_s = pricing.least_s(point, options, options.recompute[0])
        waiting.append(_Bounded(bound_s, count, point, first_mode))
    # Step 2: price in the order of the bounds, until no later shape can enter the best few.
    heapq.heapify(waiting)
    kept = _Kept(limit, rank)
    while waiting:
        bound_s, number, shape, mode = heapq.heappop(waiting)
        if bound_s * (1 - ROUNDING) > kept.slowest:
            reason = f"at least {bound_s:.3f} s per step even with an even load, the best {limit} need less"
            rejected.append(Rejected(shape, reason))
            continue
        if mode is not None:
            heapq.heappush(waiting, _Bounded(pricing.least_s(shape, options, mode), number, shape, None))
            continue
        found = _best_of_shape(shape, pricing, options, kept)
        if isinstance(found, Rejected):
            rejected.append(found)
        else:
            kept.add(found)
    # Step 3: give every priced launch that is not among the best its reason.
    best = kept.best()
    rejected.extend(_lost(launch, best, kept) for launch in kept.launches if launch not in best)
    return SearchResult(best, _pareto(kept.launches), rejected, count, len(kept.launches), time.perf_counter() - began)


def _best_of_shape(shape: ParallelSpec, pricing: Pricing, options: SpaceOptions, kept: _Kept) -> Launch | Rejected:
    """The launch of one shape with the best spare slots, overlap, dispatch and recomputation."""
    best: Launch | None = None
    least = float("inf")
    for spare_slots in space.spare_slots(pricing.model, shape, options):
        slotted = replace(shape, spare_slots=spare_slots, replicas="auto" if spare_slots else "off")
        spec, used = first_that_fits(slotted, pricing, options.recompute)
        if spec is None:
            least = min(least, used)
            continue
        for degree, dispatch in space.exchanges(pricing.model, pricing.cluster, spec, options):
            exchanging = replace(spec, overlap_degree=degree, dispatch=dispatch)
            if not exchanging.recomputes(exchanging.recompute):
                continue  # overlap needs this project's experts
            launch = pricing.price(exchanging)
            if best is None or kept.seconds(launch) < kept.seconds(best):
                best = launch
    if best is None:
        reason = _too_big(least, pricing.cluster.gpu.memory_bytes) + ", under the worst load"
        return Rejected(shape, reason, least)
    return best


def first_that_fits(
    spec: ParallelSpec, pricing: Pricing, modes: Sequence[Recompute]
) -> tuple[ParallelSpec | None, float]:
    """The launch with the first recomputation mode that fits.

    Args:
        spec: the launch.
        pricing: what counts its memory.
        modes: recomputation modes to try, fastest first.

    Returns:
        The launch, or None if no mode fits; and the bytes that it, or else the smallest one, needs.
    """
    least = float("inf")
    for mode in modes:
        if not spec.recomputes(mode):
            continue
        tried = replace(spec, recompute=mode)
        used = pricing.memory(tried)
        if used <= pricing.cluster.gpu.memory_bytes:
            return tried, used
        least = min(least, used)
    return None, least


def _too_big(used: float, memory_bytes: float) -> str:
    return f"needs {used / 1e9:.1f} GB with everything recomputed, the GPU has {memory_bytes / 1e9:.1f} GB"


def _lost(launch: Launch, best: list[Launch], kept: _Kept) -> Rejected:
    """Why a priced launch is not among the best: the term in which it loses most to the first."""
    first = best[0]
    differences = dict(launch.time.terms())
    for what, value in first.time.terms():
        differences[what] = differences.get(what, 0.0) - value
    worst = max(differences, key=lambda what: differences[what])
    slower = kept.seconds(launch) / kept.seconds(first) - 1
    return Rejected(
        launch.spec, f"{slower:.0%} slower than the first, most of it by {worst} (+{differences[worst]:.3f} s)"
    )


def _pareto(launches: list[Launch]) -> list[Launch]:
    """Plans that no other beats in both expected time and memory."""
    found: list[Launch] = []
    for launch in sorted(launches, key=lambda p: (p.expected_s, p.memory.total)):
        if not found or launch.memory.total < found[-1].memory.total:
            found.append(launch)
    return found


def nothing_fits(pricing: Pricing, gpus: int, options: SpaceOptions, rejected: list[Rejected]) -> ConfigError:
    """The error for an empty result: the nearest miss where memory is short, else the simplest launch's reason."""
    has = pricing.cluster.gpu.memory_bytes
    misses = [(one.needs_bytes, at) for at, one in enumerate(rejected) if one.needs_bytes is not None]
    if misses:
        # They were rejected by bounds of different strength: the likely ones are counted in full.
        near = [
            replace(rejected[at].spec, recompute=options.recompute[-1]) for _, at in sorted(misses)[:NEAREST_MISSES]
        ]
        needs, at = min((pricing.memory(spec), at) for at, spec in enumerate(near))
        rule = f"no launch fits: the smallest needs {needs / 1e9:.1f} GB per GPU, and a GPU has {has / 1e9:.1f} GB"
        rule += f" ({(needs - has) / 1e9:.1f} GB too much: {near[at].label()})"
        return ConfigError("--gpus", gpus, rule, "Use more GPUs, or a smaller model or sequence.")
    reason = rejected[0].reason if rejected else "the space is empty"  # the first point is the simplest
    return ConfigError("--gpus", gpus, f"no launch is possible: {reason}", "Use another number of GPUs.")
