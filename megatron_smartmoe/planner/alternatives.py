"""The launches that people ask about: the best one with one thing changed, so that the explanation can say why not.

EP traded for TP, EP across nodes, no pipeline, half or twice the stages: each is the nearest launch that Megatron
accepts, with the least recomputation that fits, or with all of it when none does.
"""

from __future__ import annotations

from dataclasses import replace

from megatron_smartmoe.planner.pricing import Launch, Pricing
from megatron_smartmoe.planner.search import first_that_fits
from megatron_smartmoe.planner.space import RECOMPUTE
from megatron_smartmoe.spec.parallel import ParallelSpec, violation


def alternatives(best: Launch, pricing: Pricing) -> list[Launch]:
    """Priced alternatives to the best launch, without those that break a rule."""
    spec = best.spec
    tries = [
        replace(spec, ep=spec.ep // 2, tp=spec.tp * 2, etp=2) if spec.ep > 1 else spec,  # the same ranks, split
        replace(spec, ep=spec.ep // 2, tp=spec.tp * 2, etp=1) if spec.ep > 1 else spec,
        replace(spec, ep=spec.ep * 2),
        replace(spec, pp=spec.pp * 2, vpp=max(1, spec.vpp // 2), layers_of_chunk=None),
        replace(spec, pp=max(1, spec.pp // 2), vpp=1, layers_of_chunk=None) if spec.pp > 1 else spec,
    ]
    if spec.spare_slots:
        tries.append(replace(spec, spare_slots=0, replicas="off"))
    found: list[Launch] = []
    for tried in tries:
        # A launch that splits a sample over more ranks may like a larger micro-batch.
        sizes = [replace(tried, micro_batch=spec.micro_batch * factor) for factor in (1, 2)]
        launches = [pricing.price(_fitting(one, pricing)) for one in sizes if violation(pricing.model, one) is None]
        if tried != spec and launches:
            launch = min(launches, key=lambda one: one.expected_s)
            if all(launch.spec != other.spec for other in found):
                found.append(launch)
    return found


def _fitting(spec: ParallelSpec, pricing: Pricing) -> ParallelSpec:
    fitting, _ = first_that_fits(spec, pricing, RECOMPUTE)
    return fitting or replace(spec, recompute="full")
