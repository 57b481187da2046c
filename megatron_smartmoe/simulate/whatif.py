"""What a run's own routing would have cost under settings that were never run: terms of a step, traffic, imbalance.

Method. Routing does not depend on where experts are: the same tokens choose the same experts under every setting. So
the run's counts are shared out anew (`regrouped`), the simulator replays homes, replicas and split as training would
have planned them, and the cost model prices what comes out, term by term. What a second of
each term is worth on this machine is fitted to the run (`report.fit`); nothing here is measured.

A step is measured in one of two ways, and terms are made for either. In *wall time* every layer waits for its busiest
rank: a step is a sum over layers of maxima over ranks. In *CPU time of each rank*, what ranks on few cores are
measured by, waiting costs nothing: each rank has a sum of its own, and a step is the largest of them.

What sharing out loses: a trace that was recorded without micro-batches has each iteration's counts in equal parts, so
micro-batches do not differ; a source rank whose tokens are split among several routes alike in each of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np

from megatron_smartmoe.cost.comm import BusiestPorts, busiest_ports
from megatron_smartmoe.cost.dispatchers import carried
from megatron_smartmoe.cost.fitted import Part
from megatron_smartmoe.cost.moe_layer import ALL_TO_ALLS, LayerConstants, LayerCounts, LayerFlow, LayerTime, on_the_wire
from megatron_smartmoe.cost.step.constants import StepConstants, expert_shape, layer_constants
from megatron_smartmoe.cost.step.moe import LAUNCHES_PER_CHUNK, MoETimes, moe_times
from megatron_smartmoe.cost.step.step import StepTime, step_time
from megatron_smartmoe.placement.kernels import NUMPY, Kernels
from megatron_smartmoe.placement.layer_cost import relayed_flow
from megatron_smartmoe.placement.layer_plan import Sees, evaluate
from megatron_smartmoe.placement.online_options import OnlineOptions
from megatron_smartmoe.placement.review import LayerSeconds
from megatron_smartmoe.simulate.policies import OnlinePolicy, SimulatedPolicy
from megatron_smartmoe.simulate.run import Applied, SimulationSetup, replay
from megatron_smartmoe.spec.arrays import FloatArray, IntArray
from megatron_smartmoe.spec.cluster import ClusterSpec
from megatron_smartmoe.spec.model import ModelSpec
from megatron_smartmoe.spec.parallel import ParallelSpec
from megatron_smartmoe.spec.placement import Placement
from megatron_smartmoe.spec.trace import RoutingTrace

# The terms of a step in groups, each of which has one factor that is fitted to the run.
GROUPS = ("tokens", "weights", "rows", "layers", "exchange", "shared", "replicas", "dense", "step")
GROUP_OF = {
    "moe_gemm_s": "tokens",
    "moe_experts_s": "weights",
    "moe_source_s": "rows",
    "moe_fixed_s": "layers",
    "all_to_all_intra_s": "exchange",
    "all_to_all_inter_s": "exchange",
    "expert_tensor_s": "exchange",
    "hidden_s": "exchange",
    "other_s": "exchange",
    "replicas_s": "replicas",
    "attention_s": "dense",
    "dense_mlp_s": "dense",
    "shared_expert_s": "shared",
    "tensor_comm_s": "dense",
    "context_comm_s": "dense",
    "recompute_s": "dense",
    "loss_s": "dense",
    "pipeline_comm_s": "dense",
    "bubble_s": "dense",
    "grad_sync_s": "step",
    "param_gather_s": "step",
    "optimizer_s": "step",
}
# Parts of a step as a run measures them -> the groups that explain them. Planning and migration have no term.
GROUPS_OF_PART: dict[Part, tuple[str, ...]] = {
    Part.OUTSIDE: ("dense", "step"),
    Part.DISPATCH: ("rows", "layers", "exchange", "shared"),
    Part.EXPERTS: ("tokens", "weights"),
    Part.REPLICAS: ("replicas",),
}
_LAYER_TERMS = tuple(term.name for term in fields(LayerTime))
_EXTRA_TERMS = ("replicas_s", "expert_tensor_s", "chunking_s")


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What a setting is priced with.

    Attributes:
        model: what is trained.
        spec: the launch.
        cluster: machines and links, with as many nodes as the launch has.
        constants: shares of the peaks.
        by_rank: price each rank's CPU time instead of the wall time of all.
    """

    model: ModelSpec
    spec: ParallelSpec
    cluster: ClusterSpec
    constants: StepConstants
    by_rank: bool

    @property
    def sources(self) -> int:
        """Source ranks of a pipeline stage, over all expert-parallel groups."""
        return self.spec.ep * self.spec.edp

    @property
    def expert_layers(self) -> list[int]:
        """Layers that have experts."""
        return [layer for layer in range(self.model.layers) if self.model.has_experts(layer)]


@dataclass(frozen=True, kw_only=True, eq=False)
class Replayed:
    """A setting, replayed and priced with the cost model's constants.

    Attributes:
        iteration: of each record, `[N]`.
        terms_NUG: seconds of a step by record, unit and group of terms; a unit is a rank where each rank's CPU time is
            priced, and the slowest expert-parallel group where wall time is.
        imbalance_N: max / mean tokens per rank, mean over layers.
        hot: the largest max / mean tokens per rank of a layer.
        exchange_bytes: of a step's all-to-alls through the busiest rank's port, mean over records.
        replica_bytes: likewise of replicas' weights and gradients.
        migration_bytes: of homes that moved, all ranks, per iteration.
        experts_moved: homes that changed their rank.
    """

    iteration: IntArray
    terms_NUG: FloatArray
    imbalance_N: FloatArray
    hot: float
    exchange_bytes: float
    replica_bytes: float
    migration_bytes: float
    experts_moved: int


@dataclass(frozen=True, kw_only=True, eq=False)
class Move:
    """Homes that a run has moved.

    Attributes:
        iteration: after whose step they moved.
        homes: the placement after it, without spare slots.
    """

    iteration: int
    homes: Placement


class RecordedPolicy(OnlinePolicy):
    """Homes as a run has moved them; replicas and split as training would plan them there.

    Args:
        placement: at the start.
        num_groups: expert-parallel groups.
        options: options of the planners, with homes_interval 0.
        layer_seconds: cost model, which is not asked.
        moves: of the run, in their order.
        kernels: what computes the plans.
    """

    def __init__(
        self,
        placement: Placement,
        num_groups: int,
        options: OnlineOptions,
        layer_seconds: LayerSeconds,
        moves: Sequence[Move],
        kernels: Kernels = NUMPY,
    ) -> None:
        super().__init__(placement, num_groups, options, layer_seconds, kernels)
        self._moves = list(moves)

    def before(self, iteration: int) -> None:
        """Move what the run had moved by now, then plan every group's replicas."""
        while self._moves and self._moves[0].iteration < iteration:
            before, after = self.groups[0].placement, self._moves.pop(0).homes
            self.stats.experts_moved += int((before.home_rank_LE != after.home_rank_LE).sum())
            for planner in self.groups:
                planner.rehome(after)
        super().before(iteration)


def regrouped(trace: RoutingTrace, sources: int, micro_batches: int) -> RoutingTrace:
    """The same assignments of every iteration, layer and expert, from other source ranks and in other micro-batches.

    Source ranks that become fewer are merged, consecutive ones together; a source rank that becomes several has its
    tokens in equal parts. Micro-batches stay as recorded where their number is the same, else they are equal parts of
    the iteration.

    Args:
        trace: as recorded.
        sources: source ranks of the new layout; divides the recorded number, or is a multiple of it.
        micro_batches: of an iteration.
    """
    counts_NLSME = trace.counts.astype(np.int64)
    if not trace.has_micro_batches:
        counts_NLSME = counts_NLSME[..., None, :]
    if counts_NLSME.shape[3] != micro_batches:
        counts_NLSME = _parts(counts_NLSME.sum(axis=3), micro_batches, axis=3)
    recorded = trace.num_sources
    if sources < recorded:
        counts_NLSME = counts_NLSME.reshape(*counts_NLSME.shape[:2], sources, -1, *counts_NLSME.shape[3:]).sum(axis=3)
    elif sources > recorded:
        parts = _parts(counts_NLSME, sources // recorded, axis=3)
        counts_NLSME = parts.reshape(*parts.shape[:2], sources, *parts.shape[4:])
    meta = {**trace.meta, "source_ranks": sources}
    return RoutingTrace(counts=counts_NLSME.astype(np.uint32), iteration=trace.iteration, layer=trace.layer, meta=meta)


def _parts(counts: IntArray, parts: int, axis: int) -> IntArray:
    """Whole numbers in `parts` parts along a new axis; who gets the remainders turns from expert to expert."""
    turn_PE = (np.arange(parts)[:, None] + np.arange(counts.shape[-1])) % parts
    whole = np.expand_dims(counts, axis)
    shape = [1] * whole.ndim
    shape[axis], shape[-1] = parts, counts.shape[-1]
    return np.asarray((whole + turn_PE.reshape(shape)) // parts)


def replayed(
    trace: RoutingTrace,
    policy: SimulatedPolicy,
    setup: SimulationSetup,
    machine: Machine,
    records: Iterable[int] | None = None,
) -> Replayed:
    """Replay a trace through a policy and price every step of it.

    Args:
        trace: from `regrouped`, for this machine's launch.
        policy: one that has observed nothing yet.
        setup: ranks, slots and the prices that the policy decides by.
        machine: what the steps are priced with.
        records: numbers of the records in order, wrapped to show progress; None takes all of them.
    """
    # Step 1: replay, and add up what every layer and micro-batch costs.
    layers = _Layers(trace, setup, machine)
    result = replay(trace, policy, setup, records, watch=layers.add)
    # Step 2: steps from layers.
    counted = slice(setup.warmup, None)
    terms_NUG = np.array([layers.step_terms(record) for record in range(setup.warmup, trace.num_records)])
    iterations = int(trace.iteration[-1] - trace.iteration[setup.warmup]) + 1
    moved_bytes = result.stats.experts_moved * setup.state_bytes
    return Replayed(
        iteration=trace.iteration[counted],
        terms_NUG=terms_NUG,
        imbalance_N=layers.imbalance_NL[counted].mean(axis=1),
        hot=float(layers.hottest_NL[counted].max()),
        exchange_bytes=float(layers.exchange_NL[counted].sum(axis=1).mean()),
        replica_bytes=float(layers.replicas_NL[counted].sum(axis=1).mean()),
        migration_bytes=moved_bytes / iterations,
        experts_moved=result.stats.experts_moved,
    )


class _Layers:
    """Terms of every record, unit and layer, summed over micro-batches as the replay applies its plans."""

    def __init__(self, trace: RoutingTrace, setup: SimulationSetup, machine: Machine) -> None:
        self.machine, self.setup = machine, setup
        spec, model = machine.spec, machine.model
        self.micro_batches = spec.micro_batches
        self.constants_of = {
            mode: layer_constants(machine.cluster, model, replace(spec, replicas=mode), machine.constants)
            for mode in ("off", "history", "exact")
        }
        self.expert = expert_shape(model, spec)
        shape = (trace.num_records, trace.num_layers)
        units = machine.sources if machine.by_rank else spec.edp
        self.terms_NULT = np.zeros((shape[0], units, shape[1], len(_LAYER_TERMS) + len(_EXTRA_TERMS)))
        self.imbalance_NL, self.hottest_NL = np.zeros(shape), np.ones(shape)
        self.exchange_NL, self.replicas_NL = np.zeros(shape), np.zeros(shape)

    def add(self, applied: Applied) -> None:
        """Add a layer of one micro-batch of one group."""
        record, group, layer, nodes = applied.record, applied.group, applied.layer, self.setup.num_nodes
        flow = flow_of(applied, nodes, self.setup.kernels)
        flows = [(flow, applied.planned.mode)]
        if (kept := applied.planned.kept) is not None:  # fetched from history, and planned anew
            nothing_ER, nothing_RR = np.zeros_like(flow.load_ER), np.zeros_like(flow.traffic_RR)
            flows.append((relayed_flow(kept.slots_RS, nothing_ER, nothing_RR, nodes, self.setup.kernels), "history"))
        if self.machine.by_rank:
            for rank in range(self.setup.num_ranks):
                unit = group * self.setup.num_ranks + rank
                self.terms_NULT[record, unit, layer] += self._rank_terms(flows, rank)
        else:
            self.terms_NULT[record, group, layer] += self._terms(*flows[0])
        self._count(record, layer, flows)

    def _count(self, record: int, layer: int, flows: list[tuple[LayerFlow, Sees]]) -> None:
        """Add balance and bytes: means over groups, and over micro-batches where a step has one of them."""
        flow, groups = flows[0][0], self.machine.spec.edp
        load_R = flow.load_ER.sum(axis=0)
        worst = float(load_R.max() / load_R.mean())
        self.hottest_NL[record, layer] = max(self.hottest_NL[record, layer], worst)
        self.imbalance_NL[record, layer] += worst / groups / self.micro_batches
        counts = LayerCounts.of(on_the_wire(flow, self.setup.dispatcher))
        sent = _through(carried(counts.tokens, (), counts.hops, self.setup.dispatcher).ports)
        self.exchange_NL[record, layer] += sent * ALL_TO_ALLS * self.expert.token_bytes / groups
        both_ways_bytes = self.expert.sent_weight_bytes + self.expert.gradient_bytes
        for one, mode in flows:
            copied = _through(busiest_ports(one.replicas_RR, self.setup.num_nodes)) * both_ways_bytes
            self.replicas_NL[record, layer] += copied / self._served(mode) / groups

    def _served(self, mode: Sees) -> int:
        """Micro-batches that one transfer of a replica serves."""
        return 1 if mode == "exact" else self.micro_batches

    def _terms(self, flow: LayerFlow, mode: Sees) -> FloatArray:
        """Seconds that all ranks of a group take, waiting for the busiest."""
        machine = self.machine
        spec = machine.spec if machine.spec.replicas == "off" else replace(machine.spec, replicas=mode)
        constants = self.constants_of[spec.replicas]
        return _vector(moe_times([flow], constants, machine.model, spec, machine.cluster, machine.constants))

    def _rank_terms(self, flows: list[tuple[LayerFlow, Sees]], rank: int) -> FloatArray:
        """CPU seconds of one rank."""
        times = [rank_time(flow, rank, self.constants_of[mode]) for flow, mode in flows]
        replica_s = sum(time.replicas_s / self._served(mode) for time, (_, mode) in zip(times, flows, strict=True))
        layer = replace(times[0], replicas_s=0.0)
        chunk_s = layer.experts_s + LAUNCHES_PER_CHUNK * self.machine.constants.launch_s
        chunking_s = (self.machine.spec.overlap_degree - 1) * chunk_s
        return _vector(MoETimes(layer, replica_s, 0.0, chunking_s))

    def step_terms(self, record: int) -> FloatArray:
        """Seconds of a step by unit and group of terms, `[U, G]`."""
        units_ULT = self.terms_NULT[record] / self.micro_batches
        if not self.machine.by_rank:  # the groups meet at the end of the step: the slowest counts
            slowest = int(units_ULT.sum(axis=(1, 2)).argmax())
            units_ULT = units_ULT[slowest : slowest + 1]
        return np.array([_groups(self._step(terms_LT)) for terms_LT in units_ULT])

    def _step(self, terms_LT: FloatArray) -> StepTime:
        machine = self.machine
        spec, cluster = machine.spec, machine.cluster
        if machine.by_rank:  # no time of a processor is hidden behind another's
            spec = replace(spec, overlap_grad_reduce=False, overlap_param_gather=False)
            cluster = replace(cluster, gpu=replace(cluster.gpu, ranks_per_device=1.0))
        moe = [_WITHOUT_EXPERTS] * machine.model.layers
        for layer, terms_T in zip(machine.expert_layers, terms_LT, strict=True):
            moe[layer] = _of_vector(terms_T)
        return step_time(machine.model, spec, cluster, machine.constants, moe)


def _through(ports: BusiestPorts) -> float:
    """What the busiest ports carry, inside nodes and between them."""
    return ports.intra + ports.inter_gpu


def flow_of(applied: Applied, num_nodes: int, kernels: Kernels) -> LayerFlow:
    """Who computes what and who sends it where, under the plan that the replay has applied."""
    plan = applied.planned.plan
    outcome = evaluate(plan, applied.counts_RE, num_nodes, kernels.split)
    return relayed_flow(plan.slots_RS, outcome.load_ER, outcome.traffic_RR, num_nodes, kernels, applied.planned.kept)


def rank_time(flow: LayerFlow, rank: int, constants: LayerConstants) -> LayerTime:
    """CPU seconds of one rank in a layer and micro-batch, forward and backward.

    Nothing is hidden: a processor that sends or receives does nothing else. What goes through the rank's port is the
    mean of both directions, the cost of a token or a replica there being that of one in and one out.
    """
    load_E = flow.load_ER[:, rank]
    node_R = np.arange(len(flow.traffic_RR)) * flow.num_nodes // len(flow.traffic_RR)
    is_near_R = node_R == node_R[rank]

    def through_port(traffic_RR: FloatArray) -> tuple[float, float]:
        both_R = traffic_RR[rank] + traffic_RR[:, rank]
        both_R[rank] = 0.0
        return float(both_R[is_near_R].sum()), float(both_R[~is_near_R].sum())

    near_tokens, far_tokens = through_port(flow.traffic_RR)
    near_replicas, far_replicas = through_port(flow.replicas_RR)
    return LayerTime(
        fixed_s=constants.fixed_s,
        source_s=float(flow.traffic_RR[rank].sum()) * constants.source_token_s,
        gemm_s=float(load_E.sum()) * constants.token_s,
        experts_s=float((load_E > 0).sum()) * constants.expert_s,
        all_to_all_intra_s=near_tokens / 2 * constants.intra_token_s,
        all_to_all_inter_s=far_tokens / 2 * constants.inter_gpu_token_s,
        replicas_s=near_replicas * constants.intra_replica_s + far_replicas * constants.inter_replica_s,
        hidden_s=0.0,
    )


def _vector(times: MoETimes) -> FloatArray:
    """The terms of a layer as an array, so that micro-batches can be added."""
    return np.array(
        [*(getattr(times.layer, name) for name in _LAYER_TERMS), *(getattr(times, n) for n in _EXTRA_TERMS)]
    )


def _of_vector(terms_T: FloatArray) -> MoETimes:
    values = terms_T.tolist()
    layer = LayerTime(**dict(zip(_LAYER_TERMS, values, strict=False)))
    return MoETimes(layer, **dict(zip(_EXTRA_TERMS, values[len(_LAYER_TERMS) :], strict=True)))


_WITHOUT_EXPERTS = _of_vector(np.zeros(len(_LAYER_TERMS) + len(_EXTRA_TERMS)))


def _groups(time: StepTime) -> list[float]:
    """Seconds of a step by group of terms."""
    found = dict.fromkeys(GROUPS, 0.0)
    for name, group in GROUP_OF.items():
        found[group] += getattr(time, name)
    return list(found.values())
