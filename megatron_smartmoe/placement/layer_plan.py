"""The interface of every placement rule, ours and the peers': one layer at a time.

A rule is a function from what it may see (`LayerProblem`) to a plan (`LayerPlan`). The plan has the slots and how
tokens are shared among an expert's hosts; `tokens_by_rank` and `evaluate` then apply it to counts, mostly others than
the rule saw. One interface for all of them keeps the comparison fair: same counts, same yardstick.

Peers are not held to `Placement`'s rules (EPLB may put an expert twice on a rank, FasterMoE shadows on every rank), so
a plan's slots are a plain array with as many columns as the rule needs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from megatron_smartmoe.errors import PlanError
from megatron_smartmoe.placement.split import assign_sources, min_max_split
from megatron_smartmoe.spec.arrays import FloatArray, IntArray
from megatron_smartmoe.spec.placement import EMPTY, BoolArray, hosts_of

Sees = Literal["history", "exact"]
SplitRule = Literal["equal", "exact", "local", "quota"]


@dataclass(frozen=True, kw_only=True)
class LayerProblem:
    """What a rule sees when it plans one layer.

    Attributes:
        counts_RE: tokens (assignments) of source rank r for expert e: the last record (a rule that sees history) or
            the very counts it is planned for (a rule that sees the present).
        slots_RS: slots as they are now, EMPTY (-1) for none; the first E / R columns are homes.
        spare_slots: K, spare slots per rank that the rule may fill.
        num_nodes: the R ranks lie on this many nodes, R / num_nodes consecutive ranks on each.
    """

    counts_RE: IntArray
    slots_RS: IntArray
    spare_slots: int
    num_nodes: int = 1

    @property
    def num_ranks(self) -> int:
        """R."""
        return int(self.counts_RE.shape[0])

    @property
    def num_experts(self) -> int:
        """E."""
        return int(self.counts_RE.shape[1])

    @property
    def home_slots(self) -> int:
        """Home slots per rank, E / R."""
        return self.num_experts // self.num_ranks

    @property
    def load_E(self) -> IntArray:
        """Tokens per expert, from all source ranks."""
        total_E: IntArray = self.counts_RE.sum(axis=0)
        return total_E

    @property
    def home_rank_E(self) -> IntArray:
        """Rank of each expert's home slot."""
        order: IntArray = np.argsort(self.slots_RS[:, : self.home_slots].ravel(), kind="stable")
        return order // self.home_slots


@dataclass(frozen=True, kw_only=True)
class LayerPlan:
    """The slots of a layer and how an expert's tokens are shared among its hosts.

    Attributes:
        slots_RS: expert in each slot, EMPTY (-1) for none; any number of columns; every expert at least once.
        split: `equal`: every filled slot the same share; `exact`: the split that minimises the largest rank load;
            `local`: a token stays on its source rank if that hosts the expert, else it goes to the expert's home;
            `quota`: the rule's own shares of each expert, `quota_ER`.
        quota_ER: tokens of expert e for rank r as the rule planned them; used as shares when the counts are others.
        home_rank_E: for `local`: where a token goes whose source rank does not host the expert.
    """

    slots_RS: IntArray
    split: SplitRule
    quota_ER: IntArray | None = None
    home_rank_E: IntArray | None = None


class Rule(Protocol):
    """A placement rule: `name` as in the simulator's table, and whether it plans from history or from the present."""

    @property
    def name(self) -> str:
        """Name of the policy in tables and JSON."""

    @property
    def sees(self) -> Sees:
        """`history`: planned from an earlier record, kept until the next; `exact`: anew for every micro-batch."""

    def plan(self, problem: LayerProblem) -> LayerPlan:
        """Plan one layer. A pure function of `problem`: no state, no clock, no unseeded randomness."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A plan applied to counts: `load_ER` tokens of expert e on rank r, `traffic_RR` tokens from source to rank."""

    load_ER: FloatArray
    traffic_RR: FloatArray


def tokens_by_rank(plan: LayerPlan, counts_RE: IntArray) -> FloatArray:
    """Tokens of expert e that rank r computes, `[E, R]`, when `plan` is applied to `counts_RE`."""
    num_experts = counts_RE.shape[1]
    if plan.split == "exact":
        return min_max_split(counts_RE, hosts_of(plan.slots_RS, num_experts)).astype(np.float64)
    if plan.split == "local":
        return _local_tokens(plan, counts_RE)[0]
    load_E = counts_RE.sum(axis=0)
    return np.asarray(load_E[:, None] * _fractions(plan, load_E), dtype=np.float64)


def evaluate(
    plan: LayerPlan,
    counts_RE: IntArray,
    num_nodes: int = 1,
    split: Callable[[IntArray, BoolArray], IntArray] = min_max_split,
) -> Outcome:
    """Loads and traffic of a plan applied to `counts_RE`, for the cost model; `split` makes an exact split."""
    if plan.split == "exact":
        tokens_ER = split(counts_RE, hosts_of(plan.slots_RS, counts_RE.shape[1]))
        sent_RRS = assign_sources(counts_RE, plan.slots_RS, tokens_ER, num_nodes)
        return Outcome(load_ER=tokens_ER.astype(np.float64), traffic_RR=sent_RRS.sum(axis=2).astype(np.float64))
    if plan.split == "local":
        load_ER, traffic_RR = _local_tokens(plan, counts_RE)
        return Outcome(load_ER=load_ER, traffic_RR=traffic_RR)
    load_E = counts_RE.sum(axis=0)
    fraction_ER = _fractions(plan, load_E)
    return Outcome(load_ER=load_E[:, None] * fraction_ER, traffic_RR=counts_RE @ fraction_ER)


def host_counts(slots_RS: IntArray, num_experts: int) -> IntArray:
    """`[E, R]`: how many slots of rank r hold expert e (a peer may use two on one rank)."""
    slots_ER = np.zeros((num_experts, slots_RS.shape[0]), dtype=np.int64)
    rank, slot = np.nonzero(slots_RS != EMPTY)
    np.add.at(slots_ER, (slots_RS[rank, slot], rank), 1)
    return slots_ER


def _fractions(plan: LayerPlan, load_E: IntArray) -> FloatArray:
    """Share of each expert's tokens that rank r takes; equal shares for an expert whose quota is empty."""
    slots_ER = host_counts(plan.slots_RS, len(load_E)).astype(np.float64)
    weight_ER = slots_ER
    if plan.split == "quota":
        if plan.quota_ER is None:
            raise PlanError("a plan with split 'quota' must carry quota_ER")
        weight_ER = np.where(plan.quota_ER.sum(axis=1, keepdims=True) > 0, plan.quota_ER, slots_ER)
    total_E = weight_ER.sum(axis=1)
    lost_E = (total_E == 0) & (load_E > 0)
    if lost_E.any():
        expert = int(np.argmax(lost_E))
        raise PlanError(f"expert {expert} has {int(load_E[expert])} tokens and no slot on any rank")
    return np.asarray(weight_ER / np.maximum(total_E, 1e-300)[:, None])


def _local_tokens(plan: LayerPlan, counts_RE: IntArray) -> tuple[FloatArray, FloatArray]:
    """Tokens `[E, R]` and traffic `[R, R]` when tokens stay on a rank that hosts their expert, else go to its home."""
    if plan.home_rank_E is None:
        raise PlanError("a plan with split 'local' must carry home_rank_E")
    num_experts = counts_RE.shape[1]
    hosts_RE = hosts_of(plan.slots_RS, num_experts).T
    stays_RE = np.where(hosts_RE, counts_RE, 0)
    away_RE = counts_RE - stays_RE
    load_ER = stays_RE.T.astype(np.float64)
    np.add.at(load_ER, (np.arange(num_experts), plan.home_rank_E), away_RE.sum(axis=0))
    traffic_RR = np.diag(stays_RE.sum(axis=1)).astype(np.float64)
    np.add.at(traffic_RR.T, plan.home_rank_E, away_RE.T)
    return load_ER, traffic_RR
