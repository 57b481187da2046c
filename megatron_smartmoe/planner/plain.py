"""The best launch of plain Megatron beside the best ones of this project: a plan is never the slower of the two.

Plain Megatron moves no experts, makes no replicas and exchanges in one flat all-to-all, so it can run experts that
`--smartmoe` does not have: TransformerEngine's, whose activations alone can be recomputed. Both spaces are searched in
full, since neither contains the other.
"""

from __future__ import annotations

from dataclasses import replace

from megatron_smartmoe.planner.pricing import Launch, Pricing
from megatron_smartmoe.planner.search import Ranking, SearchResult, find, nothing_fits, seconds_of
from megatron_smartmoe.planner.space import SpaceOptions
from megatron_smartmoe.spec.parallel import FLAT


def plain_space(options: SpaceOptions) -> SpaceOptions:
    """The launches of a space that run without `--smartmoe`."""
    return replace(options, spare_slots=(0,), overlap_degrees=(1,), dispatches=(FLAT,), homes_interval=0)


def search_beside_plain(
    pricing: Pricing, gpus: int, options: SpaceOptions, *, limit: int = 10, rank: Ranking = "expected"
) -> tuple[SearchResult, Launch | None]:
    """Find the best `limit` shapes, the best of plain Megatron among them if it is that fast.

    Args:
        pricing: what prices a launch.
        gpus: of the job.
        options: the space.
        limit: launches to find.
        rank: the step time that they are ordered by.

    Returns:
        The search, and the best launch of plain Megatron, None where none fits.

    Raises:
        ConfigError: nothing fits.
    """
    # Step 1: both spaces; what fits in one of them may not fit in the other.
    found = find(pricing, gpus, options, limit=limit, rank=rank)
    alone = find(pricing, gpus, plain_space(options), limit=1, rank=rank)
    if not found.best and not alone.best:
        raise nothing_fits(pricing, gpus, options, found.rejected)
    if not alone.best:
        return found, None
    plain = alone.best[0]
    # Step 2: put the plain launch where it belongs; of two that are as fast, the plain one comes first.
    others = [one for one in found.best if one.spec != plain.spec]
    best = sorted([plain, *others], key=lambda one: seconds_of(one, rank))[:limit]
    return replace(found, best=best, priced=found.priced + alone.priced, seconds=found.seconds + alone.seconds), plain
