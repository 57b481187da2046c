"""What `auto` planned anew in an iteration, as training logs it and as a replay makes it again."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megatron_smartmoe.cost.replicas import TransferPrice
from megatron_smartmoe.placement.decisions import Decision
from megatron_smartmoe.placement.replan import Replan, replans_decision
from megatron_smartmoe.runtime.replicas.tally import MicroBatch
from megatron_smartmoe.spec.placement import EMPTY, Placement


def replans_of(
    iteration: int,
    group: int,
    placement: Placement,
    records: Sequence[Sequence[MicroBatch]],
    *,
    used_slots: int,
    price: TransferPrice,
) -> Decision | None:
    """Which layers were planned anew for which micro-batches, in logical experts; None if none was.

    Args:
        iteration: the iteration, which has ended.
        group: the expert-parallel group.
        placement: the placement with the replicas from history.
        records: the micro-batches of each layer.
        used_slots: spare slots of a rank that are used.
        price: see `ReplanOptions`.
    """
    replans, judged = list[Replan](), 0
    for layer, record in enumerate(records):
        expert_E, slot_E = placement.homes_LRH[layer].ravel(), placement.home_slot_LE[layer]
        for micro_batch, micro in enumerate(micro for micro in record if micro.load_E.any()):
            judged += 1
            if micro.replanned_RS is None:
                continue
            slots_RS = micro.replanned_RS[:, : placement.home_slots + used_slots]
            logical_RS = np.where(slots_RS == EMPTY, EMPTY, expert_E[slots_RS])
            load_E = micro.load_E[slot_E]
            one = Replan(
                layer=layer,
                micro_batch=micro_batch,
                load_E=load_E,
                slots_RS=logical_RS,
                before_tokens=micro.before_tokens,
                tokens=int(micro.split_R.max()),
            )
            replans.append(one)
    if not replans:
        return None
    return replans_decision(iteration, group, placement.digest, replans, judged, price)
