"""The price of one launch: memory of the fullest rank and time of a step, under every scenario of the load.

Everything that several launches share is computed once: the load of an expert-parallel group's ranks (`LoadModel`), one
MoE layer at a number of tokens, one stage's buffers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache

import numpy as np

from megatron_smartmoe.cost.comm import BusiestPorts
from megatron_smartmoe.cost.memory.budget import MemoryBudget, memory_budget
from megatron_smartmoe.cost.memory.buffers import least_state_bytes
from megatron_smartmoe.cost.moe_layer import ALL_TO_ALLS, APART_EXCHANGES, LayerConstants, LayerCounts
from megatron_smartmoe.cost.step.constants import StepConstants, layer_constants, spec_nodes
from megatron_smartmoe.cost.step.dense import tokens_of
from megatron_smartmoe.cost.step.moe import MoETimes, moe_times
from megatron_smartmoe.cost.step.step import StepTime, least_step_s, step_time
from megatron_smartmoe.planner.load import Balance, LoadModel
from megatron_smartmoe.planner.space import SpaceOptions, exchanges, spare_slots
from megatron_smartmoe.spec.cluster import ClusterSpec
from megatron_smartmoe.spec.model import ModelSpec
from megatron_smartmoe.spec.parallel import HIERARCHICAL, Dispatch, ParallelSpec, Precision, Recompute


@dataclass(frozen=True, eq=False)
class Launch:
    """A launch and its price.

    Attributes:
        spec: the launch.
        time: terms of the step time, the weighted mean over scenarios.
        scenario_s: seconds of a step under each scenario.
        memory: bytes of the fullest rank.
        stage: pipeline stage of the fullest rank.
        hot: the busiest rank's tokens over the mean, in the worst scenario.
    """

    spec: ParallelSpec
    time: StepTime
    scenario_s: tuple[float, ...]
    memory: MemoryBudget
    stage: int
    hot: float

    @property
    def expected_s(self) -> float:
        """Seconds of a step, the weighted mean over scenarios."""
        return self.time.total_s

    @property
    def worst_s(self) -> float:
        """Seconds of a step under the worst scenario."""
        return max(self.scenario_s)


class Pricing:
    """Prices launches of one model on one cluster under one load.

    Args:
        model: the model to train.
        cluster: machines and links.
        loads: scenarios.
        constants: shares of the peaks that are reached; None for those of the cluster file, else the priors.
    """

    def __init__(
        self, model: ModelSpec, cluster: ClusterSpec, loads: LoadModel, constants: StepConstants | None = None
    ) -> None:
        self.model, self.cluster, self.loads = model, cluster, loads
        self.constants = constants or StepConstants.of(cluster)
        self._layers: dict[tuple[object, ...], list[list[MoETimes]]] = {}
        self._least = lru_cache(maxsize=100_000)(self._least_layer)
        self._counts = lru_cache(maxsize=1024)(self._least_counts)
        self._budget = lru_cache(maxsize=1024)(self._count_memory)

    def price(self, spec: ParallelSpec) -> Launch:
        """The memory and the step time of a launch."""
        hot, (memory, stage) = self.hot(spec), self._budget(spec)
        times = [step_time(self.model, spec, self.cluster, self.constants, moe) for moe in self._moe(spec)]
        weights = [scenario.weight for scenario in self.loads.scenarios]
        total = sum(weights)
        mean = {
            f.name: sum(w * getattr(time, f.name) for w, time in zip(weights, times, strict=True)) / total
            for f in fields(StepTime)
        }
        return Launch(spec, StepTime(**mean), tuple(time.total_s for time in times), memory, stage, hot)

    def hot(self, spec: ParallelSpec) -> float:
        """The busiest rank's tokens over the mean, in the worst scenario."""
        return max(load.hot for load in self.loads.after_balancing(self.balance(spec)))

    def memory(self, spec: ParallelSpec) -> float:
        """Bytes of the fullest rank, under the worst scenario."""
        return self._budget(spec)[0].total

    def _count_memory(self, spec: ParallelSpec) -> tuple[MemoryBudget, int]:
        """The fullest stage's budget under the worst scenario, and which stage that is."""
        return memory_budget(self.model, spec, self.cluster.gpu, self.hot(spec))

    def least_memory(self, shape: ParallelSpec, modes: Sequence[Recompute]) -> tuple[float, Recompute | None]:
        """What a shape needs at least, under an even load without spare slots.

        Returns:
            The bytes, and the first recomputation mode that may fit; if none does, the bytes of the smallest, and None.
        """
        has, state = self.cluster.gpu.memory_bytes, least_state_bytes(self.model, shape)
        if state > has:
            return state, None
        # Where homes stay, a launch may do without this project's experts, which keep other tensors than Megatron's.
        kinds = [shape] if shape.smartmoe or shape.ep == 1 else [shape, replace(shape, replicas="auto")]
        least = float("inf")
        for mode in modes:
            tried = [replace(kind, recompute=mode) for kind in kinds]
            used = min(memory_budget(self.model, spec, self.cluster.gpu, 1.0)[0].total for spec in tried)
            if used <= has:
                return used, mode
            least = min(least, used)
        return least, None

    def least_s(self, shape: ParallelSpec, options: SpaceOptions, mode: Recompute) -> float:
        """A lower bound of the step time of every launch of a shape that recomputes so, or more."""
        sizes = (shape.ep, shape.etp, shape.tp, shape.cp, shape.micro_batch, shape.precision)
        spec, most_chunks = replace(shape, recompute=mode), dict[Dispatch, int]()
        for degree, dispatch in exchanges(self.model, self.cluster, shape, options):
            most_chunks[dispatch] = max(degree, most_chunks.get(dispatch, 1))
        layers = [
            self._least(*sizes, slots, mode, dispatch, degree)
            for slots in spare_slots(self.model, shape, options)
            for dispatch, degree in most_chunks.items()
        ]
        return min(least_step_s(self.model, spec, self.cluster, self.constants, layer) for layer in layers)

    def balance(self, spec: ParallelSpec) -> Balance:
        """What of the launch decides the load of its ranks."""
        nodes = spec_nodes(self.cluster, spec.ep * spec.etp)
        slots = spec.spare_slots if spec.replicas != "off" else 0
        return Balance(spec.ep, nodes, slots, spec.homes_interval > 0)

    def _moe(self, spec: ParallelSpec) -> list[list[MoETimes]]:
        """One MoE layer per part of the model, for each scenario."""
        sizes = (spec.etp, spec.tp, spec.cp, spec.micro_batch, spec.overlap_degree, spec.dispatch)
        travels = (spec.replicas, spec.micro_batches, spec.overlap_param_gather)
        key = (self.balance(spec), *sizes, *travels, spec.precision)
        if key not in self._layers:
            layer = layer_constants(self.cluster, self.model, spec, self.constants)
            balanced = self.loads.after_balancing(self.balance(spec))
            bare = self.loads.after_balancing(replace(self.balance(spec), spare_slots=0))
            self._layers[key] = [
                [self._layer(spec, layer, *pair) for pair in zip(load.counts_P, alone.counts_P, strict=True)]
                for load, alone in zip(balanced, bare, strict=True)
            ]
        return self._layers[key]

    def _layer(self, spec: ParallelSpec, layer: LayerConstants, load: LayerCounts, bare: LayerCounts) -> MoETimes:
        """One MoE layer, with its replicas where they save more than they cost: training makes no others."""
        tokens, choices = self._assignments(spec), [load] if load is bare else [load, bare]
        times = [
            moe_times([each.scaled(tokens)], layer, self.model, spec, self.cluster, self.constants) for each in choices
        ]
        return min(times, key=lambda one: one.with_replicas_s)

    def _assignments(self, spec: ParallelSpec) -> float:
        """Assignments (tokens x top-k) of one rank and micro-batch."""
        return tokens_of(self.model, spec) / spec.tp * self.model.moe.top_k

    def _least_layer(
        self,
        ep: int,
        etp: int,
        tp: int,
        cp: int,
        micro_batch: int,
        precision: Precision,
        slots: int,
        mode: Recompute,
        dispatch: Dispatch,
        degree: int,
    ) -> MoETimes:
        """A layer that takes no longer than any with these spare slots, this dispatch and at most this overlap.

        The busiest rank has at least the mean of tokens and of active experts, and a port carries at least what
        `_least_counts` has; chunks and replicas cost nothing. What is hidden grows with the GEMMs, and recomputation
        charges half of what moves and a third of the GEMMs: there, GEMMs that hide all that can be are the cheapest.
        Of a hierarchical dispatch's exchanges half are flat, and the others carry at least one row of K between nodes.
        """
        spec = ParallelSpec(gpus=1, tp=tp, ep=ep, etp=etp, cp=cp, micro_batch=micro_batch, precision=precision)
        fewest = ALL_TO_ALLS if etp == 1 else APART_EXCHANGES
        layer = layer_constants(self.cluster, self.model, spec, self.constants, exchanges=fewest)
        num_nodes = spec_nodes(self.cluster, ep * etp)
        costlier_between = num_nodes == 1 or layer.inter_gpu_token_s >= layer.intra_token_s
        counts = self._counts(ep, num_nodes, slots, costlier_between)
        if dispatch == HIERARCHICAL:
            between = counts.tokens.inter_gpu * (1 + 1 / self.model.moe.top_k) / 2
            counts = replace(counts, tokens=replace(counts.tokens, intra=counts.tokens.intra / 2, inter_gpu=between))
        overlapped = replace(spec, overlap_degree=degree)
        times = moe_times(
            [counts.scaled(self._assignments(spec))],
            layer,
            self.model,
            overlapped,
            self.cluster,
            self.constants,
            micro_batches=1,
        )
        found = times.layer
        if mode in ("moe", "full"):
            may_hide_s = (found.all_to_all_intra_s + found.all_to_all_inter_s) * (1 - 1 / degree)
            missing_s = max(0.0, may_hide_s - found.gemm_s - found.experts_s)
            found = replace(found, gemm_s=found.gemm_s + missing_s, hidden_s=found.hidden_s - missing_s)
        return replace(times, layer=found, chunking_s=0.0)

    def _least_counts(self, ep: int, num_nodes: int, slots: int, costlier_between: bool) -> LayerCounts:
        """The least that ranks and ports have to do, for one assignment of each source rank.

        Source ranks route alike. With homes alone, the hottest rank receives from every other rank what an even load
        sends there, or more. With K spare slots a rank keeps at most what its S + K experts have; replicas that stay on
        their home's node keep no token there that its homes would not.
        """
        per_node, homes = ep // num_nodes, self.model.moe.experts // ep
        away, between = 1.0 - 1.0 / ep, 1.0 - 1.0 / num_nodes
        if slots:
            away = min(away, 1.0 - self.loads.hottest_share(homes + slots))
            if not self.loads.within_node:
                between = min(between, 1.0 - self.loads.hottest_share(per_node * (homes + slots)))
        away, between = max(away, 0.0), max(between, 0.0)
        # Where links between nodes are the faster ones, all that leaves a rank may as well go there.
        inside, between = (max(0.0, away - between), between) if costlier_between else (0.0, max(away, between))
        nothing = BusiestPorts(intra=0.0, inter_gpu=0.0, inter_node=0.0, inter_node_reverse=0.0)
        return LayerCounts(
            tokens_R=np.ones(ep),
            active_R=np.full(ep, self.loads.least_active / ep),
            source_tokens=1.0,
            tokens=replace(nothing, intra=inside, inter_gpu=between),
            fetched=nothing,
            returned=nothing,
            early_tokens=0.0,
        )
