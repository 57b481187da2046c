"""Seconds of a step's MoE layers under each setting of the pool, from the load as it was in the last iterations.

Method. Copies of `history` are planned from all iterations but the last, those of `exact` from the last one's
micro-batches, both by the functions that training calls; then the last iteration's micro-batches are split among the
copies as the dispatcher would, and `cost.step.moe` prices the flows, as it does for the planner. So the price of
planning from history is in it: what the forecast gets wrong shows in the last iteration. Copies from history travel
once an iteration, exact ones once a micro-batch. Where homes may move they are where the homes loop would swap them to.

A sample of the layers and micro-batches is enough for a choice between settings: prediction takes time on rank 0, while
all others wait.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from megatron_smartmoe.cost.comm import replica_copies
from megatron_smartmoe.cost.moe_layer import LayerFlow
from megatron_smartmoe.cost.step.constants import StepConstants, layer_constants
from megatron_smartmoe.cost.step.moe import moe_times
from megatron_smartmoe.placement.history import History
from megatron_smartmoe.placement.plan_homes import HomesOptions, plan_homes
from megatron_smartmoe.placement.plan_replicas import ReplicaOptions, plan_replicas
from megatron_smartmoe.planner.pool import PoolSetting
from megatron_smartmoe.runtime.replicas.split import BALANCED, exact_slots, split_tokens
from megatron_smartmoe.spec.arrays import IntArray
from megatron_smartmoe.spec.cluster import ClusterSpec
from megatron_smartmoe.spec.model import ModelSpec
from megatron_smartmoe.spec.parallel import ParallelSpec
from megatron_smartmoe.spec.placement import EMPTY, with_empty_slots


@dataclass(frozen=True, kw_only=True, eq=False)
class PoolLoad:
    """What was routed lately, by one expert-parallel group, in a sample of the layers.

    Attributes:
        totals_ILE: tokens of each expert in each of the last iterations, the latest last; two at least.
        batches_BLRE: the first micro-batches of the latest iteration, by source rank.
        homes_LRH: expert in each home slot.
    """

    totals_ILE: IntArray
    batches_BLRE: IntArray
    homes_LRH: IntArray


@dataclass(frozen=True, kw_only=True, eq=False)
class PoolPrices:
    """What a step's MoE layers are priced with.

    Attributes:
        model: sizes.
        spec: how the run is spread; its overlap degree is the setting's.
        cluster: the machine.
        num_nodes: that an expert-parallel group lies on.
        micro_batches: of an iteration, which copies from history serve.
        layers_in_a_row: layers times micro-batches that a step waits for, one after another: those of a pipeline
            stage, and the bubble.
        replica: as the replicas loop plans.
        homes: as the homes loop plans.
        homes_move: whether the homes loop may move experts at all.
    """

    model: ModelSpec
    spec: ParallelSpec
    cluster: ClusterSpec
    num_nodes: int
    micro_batches: int
    layers_in_a_row: float
    replica: ReplicaOptions = field(default_factory=ReplicaOptions)
    homes: HomesOptions = field(default_factory=HomesOptions)
    homes_move: bool = True


def moe_seconds(settings: Iterable[PoolSetting], load: PoolLoad, prices: PoolPrices) -> dict[PoolSetting, float]:
    """Seconds of a step's MoE layers, forward and backward, by setting."""
    history = _history(load)
    homes: dict[tuple[bool, int], IntArray] = {}  # these two by what they follow from: planning takes its time
    flows: dict[tuple[bytes, int, str], Sequence[LayerFlow]] = {}
    seconds = {}
    for setting in settings:
        wanted = (setting.homes_interval > 0, setting.spare_slots)
        if wanted not in homes:
            homes[wanted] = _homes(setting, load, history, prices)
        homes_LRH = homes[wanted]
        key = (homes_LRH.tobytes(), setting.spare_slots, setting.replicas)
        if key not in flows:
            flows[key] = _flows(setting, homes_LRH, load, history, prices)
        seconds[setting] = _seconds(setting, flows[key], prices)
    return seconds


def _homes(setting: PoolSetting, load: PoolLoad, history: History, prices: PoolPrices) -> IntArray:
    """Expert in each home slot, `[L, R, S]`: as they are, or where the homes loop would have them."""
    if not setting.homes_interval or not prices.homes_move:
        return load.homes_LRH
    home_slots, moved = load.homes_LRH.shape[2], []
    for layer, homes_RH in enumerate(load.homes_LRH):
        slots_RS = with_empty_slots(homes_RH, setting.spare_slots)
        moved.append(plan_homes(slots_RS, history.scenarios_KE(layer)[0], home_slots, prices.homes).slots_RS)
    return np.stack(moved)[:, :, :home_slots]


def _seconds(setting: PoolSetting, flows: Sequence[LayerFlow], prices: PoolPrices) -> float:
    constants = StepConstants.of(prices.cluster)
    spec = replace(prices.spec, overlap_degree=setting.overlap_degree, replicas=setting.replicas)
    layer = layer_constants(prices.cluster, prices.model, spec, constants)
    times = moe_times(flows, layer, prices.model, spec, prices.cluster, constants)
    served = prices.micro_batches if setting.replicas == "history" else 1
    return prices.layers_in_a_row * (times.total_s + times.replicas_s / served)


def _history(load: PoolLoad) -> History:
    """What the replicas loop knew before the latest iteration."""
    num_layers, num_experts = load.totals_ILE.shape[1:]
    history = History(num_layers, num_experts)
    for totals_LE in load.totals_ILE[:-1]:
        history.update(totals_LE[:, None])
    return history


def _flows(
    setting: PoolSetting, homes_LRH: IntArray, load: PoolLoad, history: History, prices: PoolPrices
) -> list[LayerFlow]:
    """Who computes what in every layer and micro-batch of the sample."""
    flows = []
    for layer, homes_RH in enumerate(homes_LRH):
        slots_RS, home_slots = with_empty_slots(homes_RH, setting.spare_slots), homes_RH.shape[1]
        if setting.replicas == "history":
            rank_tokens = float(load.totals_ILE[-2, layer].sum()) / len(homes_RH)
            scenarios_KE = history.scenarios_KE(layer)
            slots_RS = plan_replicas(slots_RS, scenarios_KE, home_slots, prices.replica, rank_tokens).slots_RS
        for counts_RE in load.batches_BLRE[:, layer]:
            flows.append(_flow(setting, slots_RS, np.ascontiguousarray(counts_RE), prices))
    return flows


def _flow(setting: PoolSetting, slots_RS: IntArray, counts_RE: IntArray, prices: PoolPrices) -> LayerFlow:
    """One layer and micro-batch."""
    num_ranks, num_experts = counts_RE.shape
    home_slots = num_experts // num_ranks
    if setting.replicas == "exact":
        slots_RS = exact_slots(
            counts_RE,
            slots_RS,
            home_slots,
            num_nodes=prices.replica.num_nodes,
            limit=BALANCED,
            price_tokens=prices.replica.copy_price_tokens,
        )
    sent_RRS = split_tokens(counts_RE, slots_RS, home_slots, prices.num_nodes)
    rank, slot = np.nonzero(slots_RS != EMPTY)
    load_ER = np.zeros((num_experts, num_ranks))
    load_ER[slots_RS[rank, slot], rank] = sent_RRS.sum(axis=0)[rank, slot]
    return LayerFlow(
        load_ER=load_ER,
        traffic_RR=sent_RRS.sum(axis=2).astype(np.float64),
        copies_RR=replica_copies(slots_RS, num_experts),
        num_nodes=prices.num_nodes,
    )
