"""The price of one launch: memory of the fullest rank and time of a step, under every scenario of the load.

Everything that several launches share is computed once: the load of an expert-parallel group's ranks (`LoadModel`), one
MoE layer at a number of tokens, one stage's buffers.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import lru_cache

import numpy as np

from megatron_smartmoe.cost.memory.budget import MemoryBudget, memory_budget
from megatron_smartmoe.cost.memory.buffers import least_state_bytes
from megatron_smartmoe.cost.moe_layer import LayerConstants, LayerCounts, LayerFlow
from megatron_smartmoe.cost.step.constants import StepConstants, layer_constants, spec_nodes
from megatron_smartmoe.cost.step.dense import tokens_of
from megatron_smartmoe.cost.step.moe import MoETimes, moe_times
from megatron_smartmoe.cost.step.step import StepTime, step_time
from megatron_smartmoe.planner.load import Balance, LoadModel
from megatron_smartmoe.spec.cluster import ClusterSpec
from megatron_smartmoe.spec.model import ModelSpec
from megatron_smartmoe.spec.parallel import ParallelSpec


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
        self._ideal = lru_cache(maxsize=100_000)(self._ideal_layer)
        self._even = lru_cache(maxsize=1024)(self._even_counts)
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

    def least_memory(self, spec: ParallelSpec) -> float:
        """A lower bound of the memory in bytes: everything recomputed, an even load, no spare slots."""
        state = least_state_bytes(self.model, spec)
        if state > self.cluster.gpu.memory_bytes:
            return state
        least = replace(spec, recompute="full", spare_slots=0, replicas="off", homes_interval=0, overlap_degree=1)
        return memory_budget(self.model, least, self.cluster.gpu, 1.0)[0].total

    def least_s(self, spec: ParallelSpec) -> float:
        """A lower bound of the step time: nothing recomputed, an even load, three quarters of the all-to-all hidden."""
        moe = self._ideal(spec.ep, spec.etp, spec.tp, spec.cp, spec.micro_batch, spec.precision)
        return step_time(self.model, spec, self.cluster, self.constants, [moe]).total_s

    def balance(self, spec: ParallelSpec) -> Balance:
        """What of the launch decides the load of its ranks."""
        nodes = spec_nodes(self.cluster, spec.ep * spec.etp)
        slots = spec.spare_slots if spec.replicas != "off" else 0
        return Balance(spec.ep, nodes, slots, spec.homes_interval > 0)

    def _moe(self, spec: ParallelSpec) -> list[list[MoETimes]]:
        """One MoE layer per part of the model, for each scenario."""
        sizes = (spec.etp, spec.tp, spec.cp, spec.micro_batch, spec.overlap_degree)
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

    def _ideal_layer(self, ep: int, etp: int, tp: int, cp: int, micro_batch: int, precision: str) -> MoETimes:
        """A layer with an even load, its all-to-all in four chunks that cost nothing extra."""
        spec = ParallelSpec(gpus=1, tp=tp, ep=ep, etp=etp, cp=cp, micro_batch=micro_batch)
        if precision == "fp32":
            spec = replace(spec, precision="fp32")
        counts = self._even(ep, spec_nodes(self.cluster, ep * etp)).scaled(self._assignments(spec))
        layer = layer_constants(self.cluster, self.model, spec, self.constants)
        overlapped = replace(spec, overlap_degree=4) if ep > 1 else spec
        times = moe_times([counts], layer, self.model, overlapped, self.cluster, self.constants, micro_batches=1)
        return replace(times, chunking_s=0.0)

    def _even_counts(self, ep: int, num_nodes: int) -> LayerCounts:
        """An even load, for one assignment of each source rank."""
        experts = self.model.moe.experts
        counts_RE, slots_RS = np.full((ep, experts), 1.0 / experts), np.arange(experts).reshape(ep, -1)
        return LayerCounts.of(LayerFlow.equal_split(counts_RE, slots_RS, num_nodes=num_nodes))
