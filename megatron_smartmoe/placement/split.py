"""The fast loop: how many of an expert's tokens each of its hosts takes, and from which source ranks.

Method. A host is a rank with an expert's home or a replica of it. `min_max_split` finds the smallest possible largest
rank load over all integer splits, exactly: start with local tokens where they are and the others on the emptiest hosts;
then push tokens from ranks above the bound T to ranks below it along shortest paths (rank -> an expert with tokens
there -> another of its hosts), as augmenting paths do in maximum flow (Edmonds and Karp 1972). When no rank below T can
be reached, the reached ranks Q hold only experts whose hosts all lie inside Q, so no split can do better than
load(Q) / |Q|: T rises to that (Hall's condition, 1935) and the search continues. It ends when no rank is above T, and T
has always been a lower bound, so the result is optimal. `assign_sources` then decides which source rank's tokens go to
which host: the source itself first, then its own node, then in rank order. On several nodes each of an expert's hosts
on a node gets the same share of its tokens from other nodes, so that no rank's port to them is busier than its load.

Alternatives. Equal shares (EPLB and its kin) leave 5 to 10% on real traces; a linear program (LPLB) finds fractions,
needs rounding and costs milliseconds; a threshold search (UltraEP) stops within 1%. The graph has one edge per host
of a replicated expert (some hundreds), so the exact integer answer is the cheap one. Lists and plain integers instead
of arrays: at this size numpy's call overhead is the larger cost, and the C++ twin reads the same line by line.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_smartmoe.errors import PlanError
from megatron_smartmoe.placement.checks import check_split
from megatron_smartmoe.spec.arrays import IntArray
from megatron_smartmoe.spec.placement import EMPTY, BoolArray

_PRODUCTS_BELOW = 1 << 31  # of two such numbers have 64 bits
_Hop = tuple[int, int, int, int]  # from rank, flexible expert, its share index there, its share index at the new rank


@dataclass(frozen=True, kw_only=True)
class SplitGraph:
    """The experts that leave a choice, and their hosts.

    Attributes:
        num_ranks: R.
        fixed_ER: 1 for an expert's only host, else 0.
        flexible_F: experts with two hosts or more, fewest hosts first.
        hosts: ranks of each flexible expert, ascending.
        on_rank: for each rank, (index into `flexible_F`, index into its hosts) of the flexible experts there.
    """

    num_ranks: int
    fixed_ER: IntArray
    flexible_F: IntArray
    hosts: list[list[int]]
    on_rank: list[list[tuple[int, int]]]


def split_graph(hosts_ER: BoolArray, load_E: IntArray) -> SplitGraph:
    """Build the graph; experts without tokens are left out, one with tokens and without a host is an error."""
    num_hosts_E = hosts_ER.sum(axis=1)
    lost_E = (num_hosts_E == 0) & (load_E > 0)
    if lost_E.any():
        expert = int(np.argmax(lost_E))
        raise PlanError(f"expert {expert} has {int(load_E[expert])} tokens and no slot on any rank")
    flexible_F = np.nonzero((num_hosts_E > 1) & (load_E > 0))[0]
    flexible_F = flexible_F[np.lexsort((-load_E[flexible_F], num_hosts_E[flexible_F]))]
    ranks = np.nonzero(hosts_ER[flexible_F])[1].tolist()
    ends = np.cumsum(num_hosts_E[flexible_F]).tolist()
    hosts = [ranks[begin:end] for begin, end in zip([0, *ends], ends, strict=False)]
    on_rank: list[list[tuple[int, int]]] = [[] for _ in range(hosts_ER.shape[1])]
    for expert, its_ranks in enumerate(hosts):
        for at, rank in enumerate(its_ranks):
            on_rank[rank].append((expert, at))
    return SplitGraph(
        num_ranks=hosts_ER.shape[1],
        fixed_ER=np.where(num_hosts_E[:, None] == 1, hosts_ER, 0).astype(np.int64),
        flexible_F=flexible_F,
        hosts=hosts,
        on_rank=on_rank,
    )


def min_max_split(counts_RE: IntArray, hosts_ER: BoolArray) -> IntArray:
    """Tokens of expert e that rank r takes, `[E, R]`, with the smallest possible largest rank load.

    Args:
        counts_RE: tokens of source rank r for expert e.
        hosts_ER: whether rank r holds expert e; every expert with tokens needs a host.

    Raises:
        PlanError: see `checks.check_split`; or an expert with tokens has no host.
    """
    check_split(counts_RE, hosts_ER)
    # Step 1: experts with one host are settled; the others form the graph.
    load_E = counts_RE.sum(axis=0)
    graph = split_graph(hosts_ER, load_E)
    tokens_ER = graph.fixed_ER * load_E[:, None]
    if not graph.hosts:
        return tokens_ER
    # Step 2: a lower bound T: the mean, rounded up, or the most that single hosts already bring to a rank.
    base_R = tokens_ER.sum(axis=0)
    bound = max(-(-int(load_E.sum()) // graph.num_ranks), int(base_R.max()))
    # Step 3: a first split: local tokens stay, the others fill the emptiest hosts up to T.
    which, rank = np.nonzero(hosts_ER[graph.flexible_F])
    local = iter(counts_RE[rank, graph.flexible_F[which]].tolist())
    shares = [[next(local) for _ in ranks] for ranks in graph.hosts]
    load = base_R.tolist()
    _fill(load, graph.hosts, shares, load_E[graph.flexible_F].tolist(), bound)
    # Step 4: push tokens from ranks above T to ranks below it, raising T only where no split could keep it.
    _level(load, graph, shares, bound)
    tokens_ER[graph.flexible_F[which], rank] = [tokens for share in shares for tokens in share]
    return tokens_ER


@dataclass(frozen=True, kw_only=True)
class Balance:
    """A split that takes no heed of where tokens come from.

    Attributes:
        bound: tokens of the busiest rank, as few as possible.
        tokens_ER: tokens of expert e that rank r takes.
        load: tokens of each rank.
        cut: ranks whose experts cannot leave them and which hold `bound` on average; empty when that is the mean.
    """

    bound: int
    tokens_ER: IntArray
    load: list[int]
    cut: list[int]


def best_balance(hosts_ER: BoolArray, load_E: IntArray) -> Balance:
    """The split with the smallest possible largest rank load, and what limits it."""
    graph = split_graph(hosts_ER, load_E)
    tokens_ER = graph.fixed_ER * load_E[:, None]
    bound = -(-int(load_E.sum()) // graph.num_ranks)
    shares = [[0] * len(ranks) for ranks in graph.hosts]
    load, cuts = tokens_ER.sum(axis=0).tolist(), list[list[int]]()
    _fill(load, graph.hosts, shares, load_E[graph.flexible_F].tolist(), bound)
    bound = _level(load, graph, shares, bound, cuts)
    which, rank = np.nonzero(hosts_ER[graph.flexible_F])
    tokens_ER[graph.flexible_F[which], rank] = [tokens for share in shares for tokens in share]
    return Balance(bound=bound, tokens_ER=tokens_ER, load=load, cut=cuts[-1] if cuts else [])


def busiest_rank_tokens(hosts_ER: BoolArray, load_E: IntArray) -> int:
    """Tokens of the busiest rank with the best split."""
    return binding_cuts(split_graph(hosts_ER, load_E), load_E)[0]


def binding_cuts(graph: SplitGraph, load_E: IntArray) -> tuple[int, list[list[int]]]:
    """The smallest possible largest rank load, and the sets of ranks (cuts) that prove it, loosest first.

    Each set holds more tokens that cannot leave it than its ranks can take at the bound before. The first set has the
    largest overflow above the mean load, the last one the largest mean.
    """
    base_R = (graph.fixed_ER * load_E[:, None]).sum(axis=0)
    bound = -(-int(load_E.sum()) // graph.num_ranks)
    shares = [[0] * len(ranks) for ranks in graph.hosts]
    load, cuts = base_R.tolist(), list[list[int]]()
    _fill(load, graph.hosts, shares, load_E[graph.flexible_F].tolist(), bound)
    return _level(load, graph, shares, bound, cuts), cuts


def _fill(load: list[int], hosts: list[list[int]], shares: list[list[int]], totals: list[int], bound: int) -> None:
    """A first split: local tokens stay, the others go to the emptiest hosts up to the bound, what is left to the
    emptiest of them."""
    for ranks, share in zip(hosts, shares, strict=True):
        for rank, tokens in zip(ranks, share, strict=True):
            load[rank] += tokens
    for ranks, share, total in zip(hosts, shares, totals, strict=True):
        rest = total - sum(share)
        if not rest:
            continue
        by_load = sorted((load[rank], at) for at, rank in enumerate(ranks))
        for tokens, at in by_load:
            room = min(rest, bound - tokens)
            if room <= 0:
                break
            share[at] += room
            load[ranks[at]] += room
            rest -= room
        emptiest = by_load[0][1]
        share[emptiest] += rest
        load[ranks[emptiest]] += rest


def _level(
    load: list[int], graph: SplitGraph, shares: list[list[int]], bound: int, cuts: list[list[int]] | None = None
) -> int:
    """Push tokens until no rank is above the bound, raising it only where Hall's condition says so; returns it.

    Every set of ranks that makes the bound rise is appended to `cuts`.
    """
    while True:
        over = [rank for rank, tokens in enumerate(load) if tokens > bound]
        if not over:
            return bound
        parent, reached = _reachable(over, graph, shares)
        pushed = False
        for rank in reached:
            if load[rank] < bound:
                pushed = _push(rank, parent, load, shares, bound) or pushed
        if not pushed:
            bound = -(-sum(load[rank] for rank in reached) // len(reached))
            if cuts is not None:
                cuts.append(sorted(reached))


def _reachable(over: list[int], graph: SplitGraph, shares: list[list[int]]) -> tuple[dict[int, _Hop | None], list[int]]:
    """Ranks that tokens of overloaded ranks can get to, breadth first, with the hop that reached each."""
    parent: dict[int, _Hop | None] = dict.fromkeys(over)
    reached = list(over)
    hosts, on_rank = graph.hosts, graph.on_rank
    seen = [False] * len(hosts)
    for rank in reached:  # grows while it is walked
        for expert, at in on_rank[rank]:
            if seen[expert] or not shares[expert][at]:
                continue
            seen[expert] = True
            for to, target in enumerate(hosts[expert]):
                if target not in parent:
                    parent[target] = (rank, expert, at, to)
                    reached.append(target)
    return parent, reached


def _push(end: int, parent: dict[int, _Hop | None], load: list[int], shares: list[list[int]], bound: int) -> bool:
    """Move as many tokens as the path to `end` can carry; False when an earlier push has used it up."""
    # Walk back to the overloaded rank where the path starts: the smallest share on the way limits the push.
    amount, rank, path = bound - load[end], end, []
    while (hop := parent[rank]) is not None:
        path.append(hop)
        rank, expert, at, _ = hop
        amount = min(amount, shares[expert][at])
    amount = min(amount, load[rank] - bound)
    if amount <= 0:
        return False
    for _, expert, at, to in path:
        shares[expert][at] -= amount
        shares[expert][to] += amount
    load[rank] -= amount
    load[end] += amount
    return True


def assign_sources(counts_RE: IntArray, slots_RS: IntArray, tokens_ER: IntArray, num_nodes: int = 1) -> IntArray:
    """Tokens that each source rank sends to each slot, `[source rank, rank, slot]`.

    Args:
        counts_RE: tokens of source rank r for expert e.
        slots_RS: expert in each slot, EMPTY for none.
        tokens_ER: what each host takes, from `min_max_split`.
        num_nodes: the ranks lie on this many nodes, R / num_nodes consecutive ranks each.
    """
    # Step 1: list the filled slots, those of one expert side by side (axis C).
    num_ranks = counts_RE.shape[0]
    rank_C, slot_C = np.nonzero(slots_RS != EMPTY)
    expert_C = slots_RS[rank_C, slot_C]
    order = np.lexsort((rank_C, expert_C))
    rank_C, slot_C, expert_C = rank_C[order], slot_C[order], expert_C[order]
    # Step 2: an expert with one host gets every token there; the others' tokens are routed.
    sent_RC = counts_RE[:, expert_C]
    shared_C = np.bincount(expert_C, minlength=counts_RE.shape[1])[expert_C] > 1
    if shared_C.any():
        sent_RC[:, shared_C] = _route(counts_RE, expert_C[shared_C], rank_C[shared_C], tokens_ER, num_nodes)
    sent_RRS = np.zeros((num_ranks, *slots_RS.shape), dtype=np.int64)
    sent_RRS[:, rank_C, slot_C] = sent_RC
    return sent_RRS


def _route(counts_RE: IntArray, expert_C: IntArray, rank_C: IntArray, tokens_ER: IntArray, num_nodes: int) -> IntArray:
    """Tokens from source rank to filled slot, `[R, C]`: local, then within the node, then anywhere."""
    num_ranks = counts_RE.shape[0]
    expert_F, which_C = np.unique(expert_C, return_inverse=True)
    left_RF = counts_RE[:, expert_F]
    need_C = tokens_ER[expert_C, rank_C]
    sent_RC = np.zeros((num_ranks, len(expert_C)), dtype=np.int64)

    node_C = rank_C * num_nodes // num_ranks
    # Step 1: what each host takes from its node, such a part of its tokens that the rest, which has to cross between
    # nodes, is as large a part at each of the expert's hosts there.
    every = np.arange(len(expert_C))
    of_node_C = left_RF.reshape(num_nodes, num_ranks // num_nodes, -1).sum(axis=1)[node_C, which_C]
    part_C = _in_proportion(need_C, of_node_C, which_C * num_nodes + node_C)
    # Step 2: tokens that are already on a host of their expert stay there.
    local_C = np.minimum(left_RF[rank_C, which_C], part_C)
    sent_RC[rank_C, every] = local_C
    left_RF[rank_C, which_C] -= local_C

    # Step 3: then sources of the same node, then all sources.
    for num_domains, until_C in ((num_nodes, part_C), (1, need_C)) if num_nodes > 1 else ((1, need_C),):
        per_domain = num_ranks // num_domains
        domain_C = rank_C // per_domain
        left_PC = left_RF.reshape(num_domains, per_domain, -1)[domain_C, :, which_C].T
        met_PC = _in_order(left_PC, until_C - sent_RC.sum(axis=0), which_C * num_domains + domain_C)
        source_PC = domain_C * per_domain + np.arange(per_domain)[:, None]
        sent_RC[source_PC, every] += met_PC
        np.subtract.at(left_RF, (source_PC, which_C), met_PC)
    return sent_RC


def _in_proportion(need_C: IntArray, supply_C: IntArray, pool_C: IntArray) -> IntArray:
    """Whole numbers in proportion to the needs, which add up to a pool's supply, or to its needs if those are less.

    Args:
        need_C: what slot c takes.
        supply_C: what the pool of slot c has.
        pool_C: slots with the same number share a supply; ascending.
    """
    end_C = np.cumsum(need_C)
    start_C = (end_C - need_C)[np.searchsorted(pool_C, pool_C)]
    total_C = end_C[np.searchsorted(pool_C, pool_C, side="right") - 1] - start_C
    if (supply_C >= total_C).all():
        return need_C
    numbers = [end_C - need_C - start_C, end_C - start_C, np.minimum(supply_C, total_C), np.maximum(total_C, 1)]
    if total_C.max() >= _PRODUCTS_BELOW:
        numbers = [number.astype(object) for number in numbers]
    begin_C, end_C, supply_C, total_C = numbers
    return np.asarray(end_C * supply_C // total_C - begin_C * supply_C // total_C).astype(np.int64)


def _in_order(left_PC: IntArray, need_C: IntArray, pool_C: IntArray) -> IntArray:
    """Lay supply and demand of each pool end to end; a source serves the slots whose interval overlaps its own.

    Args:
        left_PC: what each of P sources still has for the pool of slot c; equal columns within a pool.
        need_C: what slot c still takes.
        pool_C: slots with the same number share their sources; ascending.
    """
    supply_end_PC = np.cumsum(left_PC, axis=0)
    end_C = np.cumsum(need_C)
    begin_C = end_C - need_C
    before_C = begin_C[np.searchsorted(pool_C, pool_C)]  # of the first slot of the pool
    overlap_PC = np.minimum(supply_end_PC, end_C - before_C) - np.maximum(supply_end_PC - left_PC, begin_C - before_C)
    return np.asarray(np.maximum(overlap_PC, 0))
