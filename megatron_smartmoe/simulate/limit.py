"""The limit: the least time that a layer can take under any plan, from its counts alone.

Balance has a price that no plan avoids. An expert with L tokens needs ceil(L / B) ranks if none of them may have more
than B tokens. All but its home get its weights over a link, and the ranks that have the weights at most double while
one transfer takes place, since a port carries one at a time. So

    s transfers in a row  =>  an expert is on at most min(2^s, R) ranks  =>  B >= max(L_hottest / min(2^s, R), mean),

in whole tokens; without a transfer, B is at least the hottest expert and the coldest ones of its home's other slots.
For each s from 0 to ceil(log2 R) the layer then takes at least as long as B tokens of the busiest rank and s transfers,
at the price that training pays for them (`cost.replicas`): shared among the micro-batches, less what is hidden. The
limit is the least of these sums, for replicas from history and for replicas from exact counts.

What the formula does not bound is the exchange of tokens: it is that of an even load, which is what the limit is
compared with. Tokens that stay on their rank may make a plan faster than that.

Why this is a bound. A replica's bytes cannot be split among more senders: transfers are of whole experts, as they are
priced. The number of ranks that have an expert's weights is 1 at first, its home. In the time of one transfer each rank
that has them sends them to one other at most, so after s of them there are at most 2^s (the broadcast bound of the
one-port model: Bar-Noy and Kipnis, "Designing broadcasting algorithms in the postal model", 1994). Gradients come back
by as many transfers, since a reduction is a broadcast run backwards.

Example. 8 ranks, a mean of 1,000 tokens a rank, and one expert with 2,900. A transfer takes as long as 300 tokens and
nothing hides it. Without replicas the busiest rank has at least 2,900; after 1 transfer 1,450, and with its price
1,750; after 2 transfers 1,000 (725 of the hot expert), and with their price 1,600. So any plan takes at least as long
as 1,600 tokens, where an even load has 1,000: its share of the ideal is at most 62.5%, as far as computing goes.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from megatron_smartmoe.cost.comm import NOTHING
from megatron_smartmoe.cost.moe_layer import LayerCounts, layer_time, on_the_wire
from megatron_smartmoe.placement.layer_cost import LayerPricing, even_load
from megatron_smartmoe.placement.layer_plan import Sees
from megatron_smartmoe.simulate.run import SimulationSetup
from megatron_smartmoe.spec.arrays import FloatArray, IntArray
from megatron_smartmoe.spec.trace import RoutingTrace

# Seconds by transfers in a row, tokens and experts of the busiest rank, and tokens of the busiest source.
Known = dict[tuple[int, int, float, float], float]
_MODES: tuple[Sees, ...] = ("history", "exact")


def limits_s(trace: RoutingTrace, setup: SimulationSetup) -> FloatArray:
    """The limit of every counted layer and micro-batch, in the order of the replay."""
    prices = [setup.pricing_of(mode) for mode in _MODES]
    levels = [level.ranks for level in setup.constants.levels]
    even: dict[int, LayerCounts] = {}
    known: dict[tuple[int, int], Known] = {}
    found = []
    for record in range(setup.warmup, trace.num_records):
        counts_LGMRE = trace.groups(setup.num_ranks, record)
        for counts_RE in counts_LGMRE.reshape(-1, *counts_LGMRE.shape[-2:]):
            if not (tokens := int(counts_RE.sum())):
                continue
            if tokens not in even:
                even[tokens] = LayerCounts.of(
                    on_the_wire(even_load(tokens, trace.num_experts, setup.pricing), setup.pricing.dispatcher), levels
                )
            found.append(
                min(
                    limit_s(counts_RE, setup.spare_slots, each, even[tokens], known.setdefault((mode, tokens), {}))
                    for mode, each in enumerate(prices)
                )
            )
    return np.array(found)


def limit_s(
    counts_RE: IntArray, spare_slots: int, pricing: LayerPricing, even: LayerCounts, known: Known | None = None
) -> float:
    """Seconds that the layer takes at least.

    Args:
        counts_RE: tokens of source rank r for expert e.
        spare_slots: of a rank; without any there are no replicas.
        pricing: constants, and how replicas travel.
        even: an even load of as many tokens, for what the formula does not bound.
        known: seconds found before with these prices and this even load; most layers share them.
    """
    known = {} if known is None else known
    constants, num_ranks = pricing.constants, len(counts_RE)
    # Step 1: tokens of the busiest rank after so many transfers in a row.
    load_E = np.sort(counts_RE.sum(axis=0))
    hottest, mean = int(load_E[-1]), -(-int(load_E.sum()) // num_ranks)
    least = [max(mean, hottest + int(load_E[: len(load_E) // num_ranks - 1].sum()))]
    if spare_slots:
        most = range(1, (num_ranks - 1).bit_length() + 1)
        least += [max(mean, -(-hottest // min(2**steps, num_ranks))) for steps in most]
    # Step 2: the least time of them. All ranks together have every active expert once at least, so that some rank has
    # as much to do as the mean of tokens and experts.
    active, half = np.count_nonzero(load_E) / num_ranks, constants.half_rate_tokens
    crosses = pricing.num_nodes > 1 and constants.inter_replica_s < constants.intra_replica_s
    source_tokens = float(counts_RE.sum(axis=1).max())
    seconds = []
    for steps, busiest in enumerate(least):
        experts = max(1.0, active - (busiest - mean) / half) if half else 1.0
        key = (steps, busiest, experts, source_tokens)
        if key in known:
            seconds.append(known[key])
            continue
        transfers = replace(NOTHING, **{"inter_gpu" if crosses else "intra": steps})
        counts = replace(
            even,
            tokens_R=np.array([float(busiest)]),
            active_R=np.array([experts]),
            source_tokens=source_tokens,
            fetched=transfers,
            returned=transfers,
            early_tokens=float(busiest),
        )
        time = layer_time(counts, constants, replicas=pricing.replicas, dispatcher=pricing.dispatcher)
        known[key] = time.total_s
        seconds.append(time.total_s)
    return min(seconds)
