"""Predicted seconds of a step's MoE layers under each setting of the pool, for the load of the last iterations.

Method. Replicas of `history` are planned from all iterations but the last, those of `exact` from the last one's
micro-batches, those of `auto` in one way or the other as its rules say, all by the functions that training calls; then
the last iteration's micro-batches are split over homes and replicas as in the dispatcher, and `cost.step.moe` prices
the flows, as it does for the planner. So the prediction includes the forecast's error, which shows in the last
iteration. Replicas from history travel once per iteration, exact ones once per micro-batch. If homes may move, they are
where the homes loop would swap them to.

Only a sample of the layers and micro-batches is priced, because rank 0 predicts while all other ranks wait.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from megatron_smartmoe.cost.dispatchers import Dispatcher
from megatron_smartmoe.cost.moe_layer import LayerFlow
from megatron_smartmoe.cost.replicas import FREE_TRANSFERS, TransferPrice
from megatron_smartmoe.cost.step.constants import StepConstants, layer_constants
from megatron_smartmoe.cost.step.moe import MoETimes, moe_times
from megatron_smartmoe.placement.history import History
from megatron_smartmoe.placement.history_pays import JudgedPrices, Standing, saved_by_exact
from megatron_smartmoe.placement.layer_cost import relayed_flow
from megatron_smartmoe.placement.plan_homes import HomesOptions, plan_homes
from megatron_smartmoe.placement.plan_replicas import ReplicaOptions
from megatron_smartmoe.placement.replan import ReplanOptions, planned_anew
from megatron_smartmoe.placement.replica_scope import cheapest_replicas
from megatron_smartmoe.planner.pool import PoolSetting
from megatron_smartmoe.runtime.replicas.kernels import exact_slots, fastest_kernels
from megatron_smartmoe.runtime.replicas.split import BALANCED, split_tokens
from megatron_smartmoe.spec.arrays import IntArray
from megatron_smartmoe.spec.cluster import ClusterSpec
from megatron_smartmoe.spec.model import ModelSpec
from megatron_smartmoe.spec.parallel import ParallelSpec, Replicas
from megatron_smartmoe.spec.placement import EMPTY, with_empty_slots


@dataclass(frozen=True, kw_only=True, eq=False)
class PoolLoad:
    """The recent load of one expert-parallel group, in a sample of the layers.

    Attributes:
        totals_ILE: Tokens of each expert in each of the last iterations, the latest last; at least two.
        batches_BLRE: Tokens of each expert by source rank, in the first micro-batches of the latest iteration.
        homes_LRH: Expert in each home slot.
    """

    totals_ILE: IntArray
    batches_BLRE: IntArray
    homes_LRH: IntArray


@dataclass(frozen=True, kw_only=True, eq=False)
class PoolPrices:
    """Everything that prices a step's MoE layers.

    Attributes:
        model: The model's sizes.
        spec: The parallel sizes; the overlap degree comes from the setting instead.
        cluster: The machine.
        num_nodes: Nodes that an expert-parallel group lies on.
        micro_batches: Micro-batches of an iteration, which replicas from history serve all of.
        layers_in_a_row: Layers times micro-batches that a step executes one after another: those of a pipeline stage,
            and the bubble.
        replica: Options of the replicas loop.
        exact_price: Of replicas that serve one micro-batch, in tokens of the busiest rank.
        homes: Options of the homes loop.
        homes_move: Whether the homes loop may move experts at all.
        dispatcher: What sends the tokens; None for that of the launch.
    """

    model: ModelSpec
    spec: ParallelSpec
    cluster: ClusterSpec
    num_nodes: int
    micro_batches: int
    layers_in_a_row: float
    replica: ReplicaOptions = field(default_factory=ReplicaOptions)
    exact_price: TransferPrice = FREE_TRANSFERS
    homes: HomesOptions = field(default_factory=HomesOptions)
    homes_move: bool = True
    dispatcher: Dispatcher | None = None


def moe_seconds(settings: Iterable[PoolSetting], load: PoolLoad, prices: PoolPrices) -> dict[PoolSetting, float]:
    """Predicted seconds of a step's MoE layers, forward and backward, by setting."""
    history = _history_before_latest(load)
    # Planning is what takes time, so settings that lead to the same homes, or to the same flows, share them.
    homes: dict[tuple[bool, int], IntArray] = {}
    flows: dict[tuple[bytes, int, str], Sequence[_Flow]] = {}
    seconds = {}
    for setting in settings:
        # Step 1: the homes that this setting would have.
        moved = (setting.homes_interval > 0, setting.spare_slots)
        if moved not in homes:
            homes[moved] = _homes(setting, load, history, prices)
        homes_LRH = homes[moved]
        # Step 2: the tokens and replicas that travel, in every sampled layer and micro-batch.
        key = (homes_LRH.tobytes(), setting.spare_slots, setting.replicas)
        if key not in flows:
            flows[key] = _flows(setting, homes_LRH, load, history, prices)
        # Step 3: their seconds under the setting's overlap degree.
        seconds[setting] = _seconds(setting, flows[key], prices)
    return seconds


def _history_before_latest(load: PoolLoad) -> History:
    """The load history as the replicas loop had it before the latest iteration."""
    num_layers, num_experts = load.totals_ILE.shape[1:]
    history = History(num_layers, num_experts)
    for totals_LE in load.totals_ILE[:-1]:
        history.update(totals_LE[:, None])
    return history


def _homes(setting: PoolSetting, load: PoolLoad, history: History, prices: PoolPrices) -> IntArray:
    """Expert in each home slot, `[L, R, S]`: the homes in force, or those that the homes loop would move to."""
    if not setting.homes_interval or not prices.homes_move:
        return load.homes_LRH
    home_slots, moved = load.homes_LRH.shape[2], []
    for layer, homes_RH in enumerate(load.homes_LRH):
        slots_RS = with_empty_slots(homes_RH, setting.spare_slots)
        moved.append(plan_homes(slots_RS, history.scenarios_KE(layer)[0], home_slots, prices.homes).slots_RS)
    return np.stack(moved)[:, :, :home_slots]


@dataclass(frozen=True, kw_only=True, eq=False)
class _Flow:
    """The flow of one layer and micro-batch.

    Attributes:
        flow: Tokens by expert and rank, tokens and replicas between ranks.
        mode: Whether its replicas travel as those from history or as those from exact counts.
    """

    flow: LayerFlow
    mode: Replicas


def _flows(
    setting: PoolSetting, homes_LRH: IntArray, load: PoolLoad, history: History, prices: PoolPrices
) -> list[_Flow]:
    """The flow of every sampled layer and micro-batch."""
    flows = []
    for layer, homes_RH in enumerate(homes_LRH):
        slots_RS, home_slots = with_empty_slots(homes_RH, setting.spare_slots), homes_RH.shape[1]
        if setting.replicas in ("history", "auto"):
            rank_tokens = float(load.totals_ILE[-2, layer].sum()) / len(homes_RH)
            scenarios_KE = history.scenarios_KE(layer)
            found = cheapest_replicas(
                slots_RS, scenarios_KE, home_slots, prices.replica, rank_tokens, fastest_kernels()
            )
            slots_RS = found.slots_RS
        counts_BRE = np.ascontiguousarray(load.batches_BLRE[:, layer])
        if setting.replicas == "auto" and _suspends(slots_RS, home_slots, counts_BRE, load, layer, prices):
            slots_RS = with_empty_slots(homes_RH, setting.spare_slots)
        of_layer = [_flow(setting, slots_RS, counts_RE, prices) for counts_RE in counts_BRE]
        kept_returns = any(one.mode == "history" for one in of_layer)
        flows += [replace(one, flow=replace(one.flow, kept_returns=kept_returns)) for one in of_layer]
    return flows


def _suspends(
    slots_RS: IntArray, home_slots: int, counts_BRE: IntArray, load: PoolLoad, layer: int, prices: PoolPrices
) -> bool:
    """Whether `auto`, judged by the latest iteration, makes no replicas from history in a layer."""
    if not prices.replica.may_suspend:
        return False
    saved = saved_by_exact(
        Standing().credit,
        counts_BRE.sum(axis=1),
        float(load.totals_ILE[-1, layer].sum()) / len(slots_RS),
        slots_RS,
        home_slots,
        JudgedPrices(history=prices.replica.price, exact=prices.exact_price, limit=BALANCED),
        lambda load_E: _exact_slots(slots_RS, load_E[None], prices),
        fastest_kernels(),
    )
    return Standing().after(saved).suspended


def _flow(setting: PoolSetting, slots_RS: IntArray, counts_RE: IntArray, prices: PoolPrices) -> _Flow:
    """The flow of one layer and micro-batch, with replicas planned as the setting has it."""
    if setting.replicas == "exact":
        return _Flow(flow=_from_counts(slots_RS, counts_RE, prices).flow, mode="exact")
    kept = _Split.of(slots_RS, counts_RE, prices)
    if setting.replicas != "auto":
        return _Flow(flow=kept.flow, mode=setting.replicas)
    rule = ReplanOptions(limit=BALANCED, price=prices.exact_price)
    num_ranks, load_E = len(counts_RE), counts_RE.sum(axis=0)
    anew = planned_anew(kept.busiest, load_E, num_ranks, rule, lambda: _from_counts(slots_RS, counts_RE, prices))
    if anew is None:
        return _Flow(flow=kept.flow, mode="history")
    return _Flow(flow=replace(anew.flow, kept_steps=kept.flow.replica_steps or (0, 0)), mode="exact")


@dataclass(frozen=True, kw_only=True, eq=False)
class _Split:
    """One layer's tokens, split over homes and replicas: slots, tokens of the busiest rank, and the flow."""

    slots_RS: IntArray
    busiest: int
    flow: LayerFlow

    @classmethod
    def of(cls, slots_RS: IntArray, counts_RE: IntArray, prices: PoolPrices) -> _Split:
        """Split as the dispatcher does."""
        num_ranks, num_experts = counts_RE.shape
        sent_RRS = split_tokens(counts_RE, slots_RS, num_experts // num_ranks, prices.num_nodes)
        rank, slot = np.nonzero(slots_RS != EMPTY)
        load_ER = np.zeros((num_experts, num_ranks))
        load_ER[slots_RS[rank, slot], rank] = sent_RRS.sum(axis=0)[rank, slot]
        flow = relayed_flow(slots_RS, load_ER, sent_RRS.sum(axis=2).astype(np.float64), prices.num_nodes)
        return cls(slots_RS=slots_RS, busiest=int(sent_RRS.sum(axis=(0, 2)).max()), flow=flow)


def _from_counts(slots_RS: IntArray, counts_RE: IntArray, prices: PoolPrices) -> _Split:
    """The layer with replicas planned for exactly these counts."""
    return _Split.of(_exact_slots(slots_RS, counts_RE, prices), counts_RE, prices)


def _exact_slots(slots_RS: IntArray, counts_RE: IntArray, prices: PoolPrices) -> IntArray:
    return exact_slots(
        counts_RE,
        slots_RS,
        counts_RE.shape[1] // len(slots_RS),
        num_nodes=prices.replica.num_nodes,
        or_group=prices.replica.or_group,
        limit=BALANCED,
        price=prices.exact_price,
    )


def _seconds(setting: PoolSetting, flows: Sequence[_Flow], prices: PoolPrices) -> float:
    """Seconds of a step's MoE layers, from the mean over the sampled flows."""
    constants = StepConstants.of(prices.cluster)

    def times(mode: Replicas, of_mode: Sequence[LayerFlow]) -> MoETimes:
        spec = replace(prices.spec, overlap_degree=setting.overlap_degree, replicas=mode)
        layer = layer_constants(prices.cluster, prices.model, spec, constants)
        given = (layer, prices.model, spec, prices.cluster, constants, prices.micro_batches, prices.dispatcher)
        return moe_times(of_mode, *given)

    sum_s = 0.0
    for mode in dict.fromkeys(one.mode for one in flows):
        of_mode = [one.flow for one in flows if one.mode == mode]
        sum_s += len(of_mode) * times(mode, of_mode).with_replicas_s
    return prices.layers_in_a_row * sum_s / len(flows)
