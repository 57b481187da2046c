"""The search: every shape is priced or is out for a stated reason, and nothing that could win is left out.

Method. For each shape that Megatron accepts, a lower bound of memory (all recomputed, even load) that does not fit puts
it out. The others are sorted by a lower bound of time (even load, nothing recomputed, overlap for free) and priced in
that order; once the bound of the next shape is above the slowest of the best few, no later shape can enter them, and
the rest is out with its bound as the reason. Of the recomputation modes of a shape the first that fits is taken: they
are ordered by time, each adds work to the one before. So the best few are the best few of the whole space (as the model
sees it), found after pricing a fraction of it.

Alternatives: dynamic programming over layers (Galvatron, Alpa) handles layers that differ in kind, and a GPT's do not;
beam search and annealing give no proof.
"""

from __future__ import annotations

import heapq
import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from megatron_smartmoe.errors import ConfigError
from megatron_smartmoe.planner import space
from megatron_smartmoe.planner.pricing import Plan, Pricing
from megatron_smartmoe.planner.space import Rejected, SpaceOptions, shapes
from megatron_smartmoe.spec.parallel import ParallelSpec, Recompute

Ranking = Literal["expected", "worst"]
LOOKED_AT = 500  # launches, for the nearest miss when nothing fits


@dataclass(frozen=True, eq=False)
class SearchResult:
    """What was found.

    Attributes:
        best: the best plans, one per shape, fastest first.
        pareto: plans that no other priced plan beats in both time and memory, fastest first.
        rejected: every other point with its reason.
        shapes: points of the space.
        priced: launches that were priced in full.
        seconds: of searching.
    """

    best: list[Plan]
    pareto: list[Plan]
    rejected: list[Rejected]
    shapes: int
    priced: int
    seconds: float


@dataclass
class _Kept:
    """The best few so far, and all that was priced."""

    limit: int
    rank: Ranking
    heap: list[tuple[float, int, Plan]] = field(default_factory=list)
    plans: list[Plan] = field(default_factory=list)
    counter: Iterator[int] = field(default_factory=itertools.count)

    def seconds(self, plan: Plan) -> float:
        return plan.expected_s if self.rank == "expected" else plan.worst_s

    @property
    def slowest(self) -> float:
        """What a new plan must beat."""
        return -self.heap[0][0] if len(self.heap) == self.limit else float("inf")

    def add(self, plan: Plan) -> None:
        self.plans.append(plan)
        entry = (-self.seconds(plan), next(self.counter), plan)
        if len(self.heap) < self.limit:
            heapq.heappush(self.heap, entry)
        elif entry[0] > self.heap[0][0]:
            heapq.heapreplace(self.heap, entry)

    def best(self) -> list[Plan]:
        return [plan for _, _, plan in sorted(self.heap, key=lambda entry: (-entry[0], entry[1]))]


def search(
    pricing: Pricing, gpus: int, options: SpaceOptions | None = None, *, limit: int = 10, rank: Ranking = "expected"
) -> SearchResult:
    """Find the best `limit` shapes.

    Raises:
        ConfigError: nothing fits; the message says how far the nearest miss is.
    """
    options, began = options or SpaceOptions(), time.perf_counter()
    rejected: list[Rejected] = []
    bounded, count, memory_bytes = [], 0, pricing.cluster.gpu.memory_bytes
    for point in shapes(pricing.model, pricing.cluster, gpus, options):
        count += 1
        if isinstance(point, Rejected):
            rejected.append(point)
            continue
        least = pricing.least_memory(point)
        if least > memory_bytes:
            rejected.append(Rejected(point, _too_big(least, memory_bytes), least))
        else:
            bounded.append((pricing.least_s(point), count, point))
    bounded.sort(key=lambda entry: entry[:2])
    kept = _Kept(limit, rank)
    for bound_s, _, shape in bounded:
        if bound_s > kept.slowest:
            reason = f"at least {bound_s:.3f} s even with a load that falls evenly, the best {limit} need less"
            rejected.append(Rejected(shape, reason))
            continue
        found = _settle(shape, pricing, options, kept)
        if isinstance(found, Rejected):
            rejected.append(found)
        else:
            kept.add(found)
    if not kept.plans:
        raise _nothing_fits(pricing, gpus, options, rejected)
    best = kept.best()
    rejected.extend(_lost(plan, best, kept) for plan in kept.plans if plan not in best)
    return SearchResult(best, _pareto(kept.plans), rejected, count, len(kept.plans), time.perf_counter() - began)


def _settle(shape: ParallelSpec, pricing: Pricing, options: SpaceOptions, kept: _Kept) -> Plan | Rejected:
    """The best spare slots, overlap and recomputation for one shape."""
    best: Plan | None = None
    least = float("inf")
    for spare_slots in space.spare_slots(pricing.model, shape, options):
        slotted = replace(shape, spare_slots=spare_slots, replicas="history" if spare_slots else "off")
        spec, used = first_that_fits(slotted, pricing, options.recompute)
        if spec is None:
            least = min(least, used)
            continue
        for degree in space.overlap_degrees(pricing.model, spec, options):
            cut = replace(spec, overlap_degree=degree)
            if not cut.recomputes(cut.recompute, pricing.model):
                continue  # cutting takes other experts
            plan = pricing.plan(cut)
            if best is None or kept.seconds(plan) < kept.seconds(best):
                best = plan
    if best is None:
        return Rejected(shape, _too_big(least, pricing.cluster.gpu.memory_bytes) + ", at the load's worst", least)
    return best


def first_that_fits(
    spec: ParallelSpec, pricing: Pricing, modes: Sequence[Recompute]
) -> tuple[ParallelSpec | None, float]:
    """The launch with the first of the modes of recomputation (cheapest first) that fits, and its bytes; else None and
    the smallest memory."""
    least = float("inf")
    for mode in modes:
        if not spec.recomputes(mode, pricing.model):
            continue
        tried = replace(spec, recompute=mode)
        used = pricing.memory(tried)
        if used <= pricing.cluster.gpu.memory_bytes:
            return tried, used
        least = min(least, used)
    return None, least


def _too_big(used: float, memory_bytes: float) -> str:
    return f"needs {used / 1e9:.1f} GB with everything recomputed, the GPU has {memory_bytes / 1e9:.1f} GB"


def _lost(plan: Plan, best: list[Plan], kept: _Kept) -> Rejected:
    """Why a priced plan is not among the best: the term that costs it most against the first."""
    first = best[0]
    differences = dict(plan.time.terms())
    for what, value in first.time.terms():
        differences[what] = differences.get(what, 0.0) - value
    worst = max(differences, key=lambda what: differences[what])
    slower = kept.seconds(plan) / kept.seconds(first) - 1
    return Rejected(
        plan.spec, f"{slower:.0%} slower than the first, most of it by {worst} (+{differences[worst]:.3f} s)"
    )


def _pareto(plans: list[Plan]) -> list[Plan]:
    """Plans that no other beats in both expected time and memory."""
    found: list[Plan] = []
    for plan in sorted(plans, key=lambda p: (p.expected_s, p.memory.total)):
        if not found or plan.memory.total < found[-1].memory.total:
            found.append(plan)
    return found


def _nothing_fits(pricing: Pricing, gpus: int, options: SpaceOptions, rejected: list[Rejected]) -> ConfigError:
    """The nearest miss where memory is what misses; else why the simplest launch is out."""
    has = pricing.cluster.gpu.memory_bytes
    misses = [(one.needs_bytes, at) for at, one in enumerate(rejected) if one.needs_bytes is not None]
    if misses:
        # What put them out are bounds of different strength: the likely ones are counted in full.
        near = [replace(rejected[at].spec, recompute=options.recompute[-1]) for _, at in sorted(misses)[:LOOKED_AT]]
        needs, at = min((pricing.memory(spec), at) for at, spec in enumerate(near))
        rule = f"no launch fits: the smallest needs {needs / 1e9:.1f} GB per GPU, there are {has / 1e9:.1f} GB"
        rule += f" ({(needs - has) / 1e9:.1f} GB too much: {near[at].label()})"
        return ConfigError("--gpus", gpus, rule, "Use more GPUs, or a smaller model or sequence.")
    reason = rejected[0].reason if rejected else "the space is empty"  # the first point is the simplest
    return ConfigError("--gpus", gpus, f"no launch is possible: {reason}", "Use another number of GPUs.")
