"""Time of one MoE layer, forward and backward, from its counts, its placement and its constants.

Method. Every term is a count times a constant: tokens of the busiest source, tokens and active experts of the busiest
rank, bytes over the busiest port of each kind of link, replicas. The counts come from the routing
(`LayerFlow`), the constants either from datasheets (`constants_of`) or from measured times
(`scripts.validation.layer_fit`). A model that is linear in its constants can be fitted without a starting point, and
its terms add up and print.

The four all-to-alls (dispatch, combine, and the gradient of each) move the same matrix, twice transposed; ports are
full duplex, so each takes as long as the busiest port. A replica's weights go out once and its gradient comes back
once for all micro-batches that they serve (`cost.replicas`). Overlap is a term of its own, negative: with the
all-to-all in c chunks, all but one of them may hide behind the GEMMs (the smart schedule of FasterMoE, PPoPP 2022), and
weights that are fetched early behind what computes meanwhile.

The original SmartMoE predicts from the busiest rank's tokens alone, which does not
distinguish micro-batch sizes or node counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from megatron_smartmoe.cost.comm import NOTHING, BusiestPorts, busiest_domain, busiest_ports, replica_traffic
from megatron_smartmoe.cost.compute import ExpertShape, busiest_rank
from megatron_smartmoe.cost.dispatchers import (
    ALL_TO_ALL,
    Dispatcher,
    DispatcherName,
    carried,
    padded,
    rows_at_a_rank,
    wire_rows,
)
from megatron_smartmoe.cost.hierarchical import HopCounts, hops_fixed_s
from megatron_smartmoe.cost.replicas import (
    EVERY_MICRO_BATCH,
    FORWARD_HALF,
    FORWARD_SHARE,
    PERMUTE_SHARE,
    LegPrice,
    ReplicaSchedule,
    TransferPrice,
)
from megatron_smartmoe.errors import PlanError
from megatron_smartmoe.spec.arrays import FloatArray, IntArray
from megatron_smartmoe.spec.cluster import ClusterSpec, LevelSpec, LinkSpec
from megatron_smartmoe.spec.placement import EMPTY

ALL_TO_ALLS = 4  # dispatch, combine, and the gradient of each
# As collectives, where the dispatch sends rows and their weights apart, and so do its gradients.
APART_EXCHANGES = 6
# Estimates that hold until `scripts.validation.layer_fit` replaces the constants made from them; none is measured. The
# three efficiencies give way to those of the cluster file, which `smartmoe calibrate` sets to 1 for what it measured.
LAUNCHES_PER_LAYER = 200  # small kernels and collectives: router, permute, exchange of counts, and their backward
LAUNCH_S = 10e-6  # from one small kernel to the next
ROWS_MOVED_PER_TOKEN = 8  # permute and unpermute: a row read and one written, forward and backward
ROWS_MOVED_PER_COPY = 2  # a row read and one written
GEMM_EFFICIENCY = 0.6  # of the dense peak, large grouped GEMMs
LINK_EFFICIENCY = 0.8  # of the nominal bandwidth
MEMORY_EFFICIENCY = 0.8  # of the nominal bandwidth


@dataclass(frozen=True, kw_only=True)
class LayerFlow:
    """Who computes what and who sends it where, in one layer of one expert-parallel group.

    Attributes:
        load_ER: tokens of expert e that rank r computes.
        traffic_RR: tokens that source rank r sends to rank q.
        replicas_RR: replicas that home rank r feeds on rank q; their gradients come back this way.
        num_nodes: the ranks lie on this many nodes, consecutive ranks together.
        fetch_RR: replicas that rank r sends the weights of to rank q, where that is not the way of the gradients; None
            where it is.
        replica_steps: transfers of replicas that follow one another, inside nodes and between them, where holders wait
            for what they forward (`RelayTree.steps_by_link`); None for as many as the busiest port has.
        early_tokens: tokens for homes on that rank with replicas which has fewest of them; they are computed before
            the replicas' weights are needed.
        wire_RR: rows that rank r sends to rank q in an exchange, where a dispatcher sends others than one for each
            token of `traffic_RR`; see `dispatchers`.
        kept_steps: as `replica_steps`, of the replicas from history where others were planned anew for this
            micro-batch: they were fetched for the iteration all the same.
        kept_returns: whether another micro-batch uses those, so that their gradients go home.
    """

    load_ER: FloatArray
    traffic_RR: FloatArray
    replicas_RR: FloatArray
    num_nodes: int = 1
    fetch_RR: FloatArray | None = None
    replica_steps: tuple[int, int] | None = None
    early_tokens: float = 0.0
    wire_RR: FloatArray | None = None
    kept_steps: tuple[int, int] = (0, 0)
    kept_returns: bool = True

    @classmethod
    def from_shares(
        cls, counts_RE: IntArray | FloatArray, share_ER: IntArray | FloatArray, slots_RS: IntArray, num_nodes: int = 1
    ) -> LayerFlow:
        """Every source sends an expert's tokens to its hosts in proportion to `share_ER` (tokens or any weights)."""
        total_E = share_ER.sum(axis=1)
        load_E = counts_RE.sum(axis=0)
        if ((load_E > 0) & (total_E <= 0)).any():
            expert = int(np.argmax((load_E > 0) & (total_E <= 0)))
            raise PlanError(f"expert {expert} has {load_E[expert]} tokens and no share on any rank")
        fraction_ER = share_ER / np.where(total_E > 0, total_E, 1)[:, None]
        return cls(
            load_ER=load_E[:, None] * fraction_ER,
            traffic_RR=np.asarray(counts_RE @ fraction_ER, dtype=np.float64),
            replicas_RR=replica_traffic(slots_RS, counts_RE.shape[1]),
            num_nodes=num_nodes,
        )

    @classmethod
    def equal_split(cls, counts_RE: IntArray | FloatArray, slots_RS: IntArray, num_nodes: int = 1) -> LayerFlow:
        """An expert's home and replicas take equal shares; with homes alone this is plain expert parallelism."""
        hosts_ER = np.zeros((counts_RE.shape[1], slots_RS.shape[0]))
        rank, slot = np.nonzero(slots_RS != EMPTY)
        np.add.at(hosts_ER, (slots_RS[rank, slot], rank), 1.0)
        return cls.from_shares(counts_RE, hosts_ER, slots_RS, num_nodes)


@dataclass(frozen=True, kw_only=True, eq=False)
class RelayedFlow:
    """A `LayerFlow` whose replicas travel along relay trees, added up over the experts: all that its time depends on.

    Attributes:
        tokens_R: tokens that each rank computes.
        active_R: experts that have any of them.
        traffic_RR: see `LayerFlow`; so are the others.
    """

    tokens_R: FloatArray
    active_R: IntArray
    traffic_RR: FloatArray
    num_nodes: int
    replica_steps: tuple[int, int]
    early_tokens: float
    wire_RR: FloatArray | None = None
    kept_steps: tuple[int, int] = (0, 0)
    kept_returns: bool = True


def on_the_wire(flow: LayerFlow, dispatcher: Dispatcher) -> LayerFlow:
    """A flow, with the rows that a dispatcher sends for it, and those that ranks compute if it pads.

    Args:
        flow: tokens from source to the ranks of their experts, one for each choice.
        dispatcher: what sends them.
    """
    if dispatcher.padded_factor:
        has_replicas = bool(flow.replicas_RR.any())
        load_ER, traffic_RR = padded(flow.load_ER, flow.traffic_RR, dispatcher, replicas=has_replicas)
        flow = replace(flow, load_ER=load_ER, traffic_RR=traffic_RR)
    wire_RR = wire_rows(flow.traffic_RR, flow.num_nodes, dispatcher)
    return flow if wire_RR is None else replace(flow, wire_RR=wire_RR)


@dataclass(frozen=True, kw_only=True, eq=False)
class LayerCounts:
    """What of a flow decides its time: a few numbers instead of matrices, so that thousands of them can be kept.

    Attributes:
        tokens_R: tokens that each rank computes.
        active_R: experts that have any of them.
        source_tokens: tokens of the busiest source rank.
        tokens: the busiest ports for tokens.
        fetched: the same for the weights of replicas, in transfers that follow one another.
        returned: the same for their gradients.
        early_tokens: see `LayerFlow`.
        kept: as `fetched`, of the replicas from history that this micro-batch does not use.
        kept_returns: see `LayerFlow`.
        hops: what a dispatch in two hops carries; None on one node.
        leaving: tokens out of the busiest domain of each level above the nodes, over its ranks; none where a flow was
            counted without levels.
    """

    tokens_R: FloatArray
    active_R: FloatArray | IntArray
    source_tokens: float
    tokens: BusiestPorts
    fetched: BusiestPorts
    returned: BusiestPorts
    early_tokens: float
    kept: BusiestPorts = NOTHING
    kept_returns: bool = True
    hops: HopCounts | None = None
    leaving: tuple[float, ...] = ()

    @classmethod
    def of(
        cls, flow: LayerFlow | RelayedFlow, ranks_of_levels: Sequence[int] = (), *, two_hops: bool = True
    ) -> LayerCounts:
        """Count a flow, and what leaves the domains of so many consecutive ranks.

        Args:
            flow: tokens and replicas.
            ranks_of_levels: consecutive ranks of a domain of each level.
            two_hops: count on several nodes also what a dispatch in two hops carries.
        """
        wire_RR = flow.traffic_RR if flow.wire_RR is None else flow.wire_RR
        if isinstance(flow, RelayedFlow):
            tokens_R, active_R = flow.tokens_R, flow.active_R
            returned = fetched = _in_a_row(flow.replica_steps)
        else:
            tokens_R, active_R = flow.load_ER.sum(axis=0), (flow.load_ER > 0).sum(axis=0)
            direct, steps, nodes = flow.fetch_RR, flow.replica_steps, flow.num_nodes
            returned = busiest_ports(flow.replicas_RR, nodes) if steps is None else _in_a_row(steps)
            fetched = returned if direct is None else busiest_ports(direct, nodes)
        return cls(
            tokens_R=tokens_R,
            active_R=active_R,
            source_tokens=float(flow.traffic_RR.sum(axis=1).max()),
            tokens=busiest_ports(wire_RR, flow.num_nodes),
            fetched=fetched,
            returned=returned,
            early_tokens=flow.early_tokens,
            kept=_in_a_row(flow.kept_steps),
            kept_returns=flow.kept_returns,
            hops=HopCounts.of(flow.traffic_RR, flow.num_nodes) if two_hops and flow.num_nodes > 1 else None,
            leaving=tuple(busiest_domain(wire_RR, ranks) for ranks in ranks_of_levels),
        )

    def scaled(self, factor: float) -> LayerCounts:
        """The same flow with `factor` times the tokens."""
        ports = BusiestPorts(**{name: value * factor for name, value in vars(self.tokens).items()})
        return replace(
            self,
            tokens_R=self.tokens_R * factor,
            source_tokens=self.source_tokens * factor,
            tokens=ports,
            early_tokens=self.early_tokens * factor,
            hops=None if self.hops is None else self.hops.scaled(factor),
            leaving=tuple(tokens * factor for tokens in self.leaving),
        )


def _in_a_row(steps: tuple[int, int]) -> BusiestPorts:
    """Transfers that follow one another, inside nodes and between them, as the busiest ports'."""
    return replace(NOTHING, intra=steps[0], inter_gpu=steps[1])


@dataclass(frozen=True, kw_only=True)
class LevelPrice:
    """A level of the network above the nodes.

    Attributes:
        ranks: consecutive ranks of one of its domains.
        token_s: seconds per token over one rank's share of the way out of the busiest domain, all four all-to-alls.
    """

    ranks: int
    token_s: float


@dataclass(frozen=True, kw_only=True)
class LayerConstants:
    """Seconds per count, forward and backward together. Linear: `layer_time` is their product with the counts.

    Attributes:
        fixed_s: per layer: launches and latencies that no count explains.
        source_token_s: per token of the busiest source rank: router, permute, unpermute.
        token_s: per token of the busiest rank: GEMMs, activation, sorting by expert.
        expert_s: per active expert of the busiest rank: its weights' way through memory, its launches.
        intra_token_s: per token over the busiest GPU's port inside a node, all four all-to-alls.
        inter_gpu_token_s: per token over the busiest GPU's port between nodes.
        inter_node_token_s: per token over the busiest node's port; 0 where every GPU has its own card.
        inter_node_reverse_token_s: per token in that port's less busy direction; 0 for a full duplex port.
        intra_replica_s: per replica over the busiest port inside a node: weights out, gradient back.
        inter_replica_s: per replica over the busiest GPU's port between nodes.
        levels: the levels above the nodes. What crosses one has left its node as well, at the same time, so of all of
            them and the nodes' ports the slowest counts.
    """

    fixed_s: float = 0.0
    source_token_s: float = 0.0
    token_s: float = 0.0
    expert_s: float = 0.0
    intra_token_s: float = 0.0
    inter_gpu_token_s: float = 0.0
    inter_node_token_s: float = 0.0
    inter_node_reverse_token_s: float = 0.0
    intra_replica_s: float = 0.0
    inter_replica_s: float = 0.0
    levels: tuple[LevelPrice, ...] = ()

    @property
    def half_rate_tokens(self) -> float:
        """Tokens of one expert at which its GEMMs reach half of their full rate."""
        return self.expert_s / self.token_s if self.token_s > 0 else 0.0


@dataclass(frozen=True, kw_only=True)
class LayerTime:
    """The terms of a layer's time; `total_s` is their sum, `hidden_s` and `replicas_hidden_s` are negative or zero."""

    fixed_s: float
    source_s: float
    gemm_s: float
    experts_s: float
    all_to_all_intra_s: float
    all_to_all_inter_s: float
    replicas_s: float
    hidden_s: float
    replicas_hidden_s: float = 0.0

    @property
    def total_s(self) -> float:
        """Seconds of the layer, forward and backward."""
        return float(sum(vars(self).values()))

    def explain(self) -> str:
        """The terms, a line each, and their sum."""
        labels = {
            "fixed_s": "launches and latencies",
            "source_s": "router, permute (busiest source)",
            "gemm_s": "grouped GEMM, tokens (busiest rank)",
            "experts_s": "grouped GEMM, active experts",
            "all_to_all_intra_s": "all-to-all inside nodes",
            "all_to_all_inter_s": "all-to-all between nodes",
            "replicas_s": "replica weights and gradients",
            "hidden_s": "hidden behind GEMMs",
            "replicas_hidden_s": "replicas, hidden",
        }
        total_s = self.total_s
        lines = []
        for name, what in labels.items():
            term_s = getattr(self, name)
            lines.append(f"{what:<36} {term_s * 1e3:10.3f} ms {term_s / max(total_s, 1e-300):7.1%}")
        return "\n".join([*lines, f"{'MoE layer, forward and backward':<36} {total_s * 1e3:10.3f} ms"])


def layer_time(
    flow: LayerFlow | RelayedFlow | LayerCounts,
    constants: LayerConstants,
    *,
    all_to_all_chunks: int = 1,
    ranks_per_device: float = 1.0,
    replicas: ReplicaSchedule = EVERY_MICRO_BATCH,
    dispatcher: Dispatcher = ALL_TO_ALL,
    kept: ReplicaSchedule = EVERY_MICRO_BATCH,
) -> LayerTime:
    """Time of one layer and micro-batch, forward and backward.

    Args:
        flow: tokens by expert and rank, and their way there; or what has been counted of it.
        constants: seconds per count.
        all_to_all_chunks: chunks of every all-to-all that overlap with the GEMMs; 1 for no overlap.
        ranks_per_device: see `GpuSpec`.
        replicas: how often replicas travel, and what hides them.
        kept: the same for replicas from history that this micro-batch does not use.
        dispatcher: what sends the tokens; what has been counted already is of one that sends a row for each choice.
    """
    # Step 1: counts. What the busiest rank computes, and what the busiest ports carry.
    levels = [level.ranks for level in constants.levels]
    counts = flow if isinstance(flow, LayerCounts) else _counted(flow, dispatcher, levels)
    busy = busiest_rank(counts.tokens_R, counts.active_R, constants.half_rate_tokens, ranks_per_device)
    exchange = carried(counts.tokens, counts.leaving, counts.hops, dispatcher, levels)
    tokens = exchange.ports
    permuted = counts.source_tokens + exchange.copied * ROWS_MOVED_PER_COPY / ROWS_MOVED_PER_TOKEN
    # Step 2: counts times constants.
    source_s = permuted * constants.source_token_s
    gemm_s = busy.tokens * constants.token_s
    experts_s = busy.active_experts * constants.expert_s
    intra_s = tokens.intra * constants.intra_token_s
    inter_s = (
        tokens.inter_gpu * constants.inter_gpu_token_s
        + tokens.inter_node * constants.inter_node_token_s
        + tokens.inter_node_reverse * constants.inter_node_reverse_token_s
    )
    for leaving, level in zip(exchange.leaving, constants.levels, strict=False):
        inter_s = max(inter_s, leaving * level.token_s)
    fetch_s = replicas.weight_share * _transfer_s(counts.fetched, constants)
    return_s = (1 - replicas.weight_share) * _transfer_s(counts.returned, constants)
    # Step 3: overlap. Of c chunks all but one may hide behind the GEMMs, never more than the GEMMs themselves take;
    # replicas' weights behind what leaves the ports idle.
    may_hide_s = (intra_s + inter_s) * (1 - 1 / all_to_all_chunks)
    early_s = counts.early_tokens * constants.token_s
    fetch_idle_s, return_idle_s = _idle_s(replicas, source_s, gemm_s + experts_s, early_s, constants.fixed_s)
    replicas_hidden_s = min(fetch_s, fetch_idle_s) + min(return_s, return_idle_s)
    # Step 4: replicas from history that were fetched and are not used. Their weights weigh as much, and what hides the
    # others is taken.
    kept_s = _transfer_s(counts.kept, constants) * replicas.weight_share / kept.weight_share
    kept_fetch_s, kept_return_s = kept_s * kept.weight_share, kept_s * (1 - kept.weight_share) * counts.kept_returns
    forward_s, backward_s = _idle_s(kept, source_s, gemm_s + experts_s, early_s, constants.fixed_s)
    kept_hidden_s = min(kept_fetch_s, max(0.0, forward_s - min(fetch_s, fetch_idle_s)))
    kept_hidden_s += min(kept_return_s, max(0.0, backward_s - min(return_s, return_idle_s)))
    return LayerTime(
        fixed_s=constants.fixed_s,
        source_s=source_s,
        gemm_s=gemm_s,
        experts_s=experts_s,
        all_to_all_intra_s=intra_s,
        all_to_all_inter_s=inter_s,
        replicas_s=(fetch_s + return_s) / replicas.micro_batches + (kept_fetch_s + kept_return_s) / kept.micro_batches,
        hidden_s=0.0 - min(may_hide_s, gemm_s + experts_s),
        replicas_hidden_s=0.0 - replicas_hidden_s / replicas.micro_batches - kept_hidden_s / kept.micro_batches,
    )


def _counted(flow: LayerFlow | RelayedFlow, dispatcher: Dispatcher, ranks_of_levels: Sequence[int]) -> LayerCounts:
    """What a dispatcher makes of a flow, counted."""
    if isinstance(flow, LayerFlow):
        flow = on_the_wire(flow, dispatcher)
    else:
        assert not dispatcher.padded_factor, "padded rows are counted by expert"
        flow = replace(flow, wire_RR=wire_rows(flow.traffic_RR, flow.num_nodes, dispatcher))
    return LayerCounts.of(flow, ranks_of_levels, two_hops=dispatcher.name == "hierarchical")


def _idle_s(
    replicas: ReplicaSchedule, source_s: float, arithmetic_s: float, early_s: float, fixed_s: float
) -> tuple[float, float]:
    """Seconds that a layer's computation hides of the weights' way out, and of the gradients' way back."""
    around_s = FORWARD_HALF * (source_s + fixed_s)  # of the forward pass, and of the backward pass
    fetch = {
        "nothing": 0.0,
        "home_rows": PERMUTE_SHARE * source_s + FORWARD_SHARE * early_s,
        "forward": FORWARD_SHARE * arithmetic_s + around_s,
    }
    back = {"nothing": 0.0, "backward": (1 - FORWARD_SHARE) * arithmetic_s + around_s}
    return fetch[replicas.fetch_hidden], back[replicas.return_hidden]


def _transfer_s(replicas: BusiestPorts, constants: LayerConstants) -> float:
    """Seconds of replicas out and back."""
    return replicas.intra * constants.intra_replica_s + replicas.inter_gpu * constants.inter_replica_s


def transfer_price(
    constants: LayerConstants,
    replicas: ReplicaSchedule,
    rank_tokens: float,
    *,
    num_nodes: int = 1,
    domains: int = 1,
    margin: float = 1.0,
    dispatcher: Dispatcher = ALL_TO_ALL,
) -> TransferPrice:
    """What replicas cost the planners, in tokens of the busiest rank.

    Args:
        constants: seconds per count.
        replicas: how often replicas travel, and what hides them.
        rank_tokens: tokens per rank of a micro-batch, of which the home rows are taken to be half.
        num_nodes: nodes that the ranks lie on; of the tokens that a rank takes more, as large a share comes over the
            links between them as of all tokens.
        domains: parts of the group that replicas stay in.
        margin: times its cost that a replica must save.
        dispatcher: what sends the tokens.
    """
    source_s, gemm_s = rank_tokens * constants.source_token_s, rank_tokens * constants.token_s
    hidden_s = _idle_s(replicas, source_s, gemm_s, gemm_s / 2, constants.fixed_s)
    rows = rows_at_a_rank(dispatcher, num_nodes)
    arrival_s = rows.inside * constants.intra_token_s + rows.between * constants.inter_gpu_token_s
    factor = margin / (constants.token_s + arrival_s)
    fetch, back = (
        LegPrice(
            inside_tokens=share * constants.intra_replica_s * factor,
            between_tokens=share * constants.inter_replica_s * factor,
            hidden_tokens=idle_s * factor,
        )
        for share, idle_s in zip((replicas.weight_share, 1 - replicas.weight_share), hidden_s, strict=True)
    )
    return TransferPrice(fetch=fetch, back=back, num_nodes=num_nodes, crosses_nodes=num_nodes > domains)


def constants_of(
    cluster: ClusterSpec,
    expert: ExpertShape,
    *,
    ranks: int = 2,
    shared_network_card: bool = False,
    two_hops: bool = False,
    exchanges: int = ALL_TO_ALLS,
) -> LayerConstants:
    """Constants of the layer from a cluster file; with datasheet numbers, what to expect before anything is measured.

    Args:
        cluster: peaks, bandwidths and latencies, and the shares of them that are known to be reached.
        expert: sizes.
        ranks: number of expert-parallel ranks; with 1 there is no exchange.
        shared_network_card: the GPUs of a node share one card of `gpus_per_node` times `inter_node`'s bandwidth, and
            it is what limits them. What a GPU exchanges with other nodes then goes through the same port as what it
            exchanges inside its own, and on through the card.
        two_hops: whether tokens are dispatched in two, which have more collectives and kernels.
        exchanges: collectives of the all-to-alls, see `exchanges_of`.
    """
    gpu, link = cluster.gpu, cluster.inter_node if cluster.nodes > 1 else cluster.intra_node
    memory_bytes_s = gpu.memory_bandwidth_bytes_s * cluster.efficiency.get("memory", MEMORY_EFFICIENCY)
    flops = gpu.peak_flops * cluster.efficiency.get("gemm", GEMM_EFFICIENCY)
    intra_bytes_s = exchange_bytes_s(cluster, between_nodes=False)
    inter_bytes_s = exchange_bytes_s(cluster, between_nodes=True)
    # A replica that may be anywhere may have to cross every level; in any other scope it never leaves a domain.
    crossed = cluster.levels if cluster.replica_scope in ("auto", "group") else ()
    row_s = expert.token_bytes / memory_bytes_s
    token_s = expert.flops_per_token / flops + ROWS_MOVED_PER_TOKEN * row_s
    replica_bytes = expert.sent_weight_bytes + expert.gradient_bytes
    intra_token_s = ALL_TO_ALLS * expert.token_bytes / intra_bytes_s
    inter_token_s = ALL_TO_ALLS * expert.token_bytes / inter_bytes_s
    fixed_s = LAUNCHES_PER_LAYER * LAUNCH_S + exchange_latency_s(link, ranks, exchanges)
    if two_hops:
        fixed_s += hops_fixed_s(cluster.inter_node, ranks, LAUNCH_S)
    return LayerConstants(
        fixed_s=fixed_s,
        source_token_s=ROWS_MOVED_PER_TOKEN * row_s,
        token_s=token_s,
        expert_s=gpu.weight_passes * (expert.weight_bytes / memory_bytes_s),
        intra_token_s=intra_token_s,
        inter_gpu_token_s=intra_token_s if shared_network_card else inter_token_s,
        inter_node_token_s=inter_token_s / cluster.gpus_per_node if shared_network_card else 0.0,
        intra_replica_s=replica_bytes / intra_bytes_s,
        inter_replica_s=replica_bytes / min([inter_bytes_s, *(level_bytes_s(cluster, level) for level in crossed)]),
        levels=tuple(
            LevelPrice(
                ranks=level.nodes * cluster.gpus_per_node,
                token_s=ALL_TO_ALLS * expert.token_bytes / level_bytes_s(cluster, level),
            )
            for level in cluster.levels
        ),
    )


def level_bytes_s(cluster: ClusterSpec, level: LevelSpec) -> float:
    """Bytes a second that one GPU reaches, in each direction, of the way out of a domain of this level."""
    share = cluster.efficiency.get("all_to_all_inter", LINK_EFFICIENCY)
    return level.link.bandwidth_bytes_s * cluster.efficiency.get(f"all_to_all_{level.name}", share)


def crossing_bytes_s(cluster: ClusterSpec, num_nodes: int) -> float:
    """Bytes a second that one GPU reaches, in each direction, to any other one of a group on so many nodes."""
    crossed = [level_bytes_s(cluster, level) for level in cluster.levels if level.nodes < num_nodes]
    return min([exchange_bytes_s(cluster, between_nodes=num_nodes > 1), *crossed])


def exchanges_of(
    dispatcher: DispatcherName = "alltoall",
    *,
    ranks: int,
    slots: int,
    chunks: int = 1,
    expert_tensor_ranks: int = 1,
    padded: bool = False,
    overlaps_micro_batches: bool = False,
) -> int:
    """Collectives of a layer's all-to-alls: four where a row and its weight travel together, else six.

    They do where a permutation beside the exchange packs them on its way (`adapter.moe.dispatcher.SlotDispatcher`), and
    in the exchanges of the flex dispatchers.

    Args:
        dispatcher: what sends the tokens.
        ranks: of the expert-parallel group.
        slots: of a rank, spare ones included; a single one is not sorted.
        chunks: of every all-to-all; a chunk of one source is not sorted.
        expert_tensor_ranks: that share an expert, and add its gradients up.
        padded: whether experts' rows are padded to capacity, which Megatron's own all-to-all does.
        overlaps_micro_batches: --overlap-moe-expert-parallel-comm, with which the gradients of both come apart.
    """
    if dispatcher == "flex":
        return ALL_TO_ALLS
    is_sorted = slots > 1 and ranks >= 2 * chunks
    apart = dispatcher != "alltoall" or expert_tensor_ranks > 1 or padded or overlaps_micro_batches
    return ALL_TO_ALLS if is_sorted and not apart else APART_EXCHANGES


def exchange_latency_s(link: LinkSpec, ranks: int, exchanges: int) -> float:
    """Seconds of a layer's exchanges without a token: the all-to-alls, and the all-gather of their sizes."""
    return exchanges * link.all_to_all_latency_of(ranks) + link.ring_latency_of(ranks) if ranks > 1 else 0.0


def exchange_bytes_s(cluster: ClusterSpec, *, between_nodes: bool) -> float:
    """Bytes a second that one GPU reaches, in each direction, when it exchanges tokens, replicas or experts."""
    if between_nodes:
        share = cluster.efficiency.get("all_to_all_inter", LINK_EFFICIENCY)
        return cluster.inter_node.bandwidth_bytes_s * share
    return cluster.intra_node.bandwidth_bytes_s * cluster.efficiency.get("all_to_all_intra", LINK_EFFICIENCY)
