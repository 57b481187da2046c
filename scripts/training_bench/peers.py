"""A peer's rule in this project's executor: who is where and computes what is the rule's, all else is ours."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from megatron_smartmoe.placement.layer_plan import LayerPlan, LayerProblem, Rule, tokens_by_rank
from megatron_smartmoe.placement.plan_homes import HomesOptions, HomesPlan
from megatron_smartmoe.placement.split import assign_sources
from megatron_smartmoe.runtime.replicas.split import split_tokens
from megatron_smartmoe.simulate.baselines.fastermoe import FasterMoE
from megatron_smartmoe.simulate.baselines.greedy import SmartMoE2023
from megatron_smartmoe.simulate.baselines.ultraep import UltraEp
from megatron_smartmoe.spec.arrays import FloatArray, IntArray
from megatron_smartmoe.spec.cluster import ClusterSpec
from megatron_smartmoe.spec.placement import EMPTY

MILLION = 1_000_000
PEERS = ("ultraep", "fastermoe", "smartmoe2023")


def rule_of(peer: str, cluster: ClusterSpec, *, hidden: int, ffn: int) -> Rule:
    """The rule of one of `PEERS`, for a gated expert in fp32."""
    if peer == "ultraep":
        return UltraEp(min_tokens_per_replica=1)  # its 1,024 are for larger batches: here it would make no replica
    if peer == "smartmoe2023":
        return SmartMoE2023()
    return shadowing(cluster, hidden=hidden, ffn=ffn)


def shadowing(cluster: ClusterSpec, *, hidden: int, ffn: int) -> FasterMoE:
    """FasterMoE's rule with the constants of this cluster and a gated expert in fp32."""
    return FasterMoE(
        hidden=hidden,
        ffn_factor=1.5 * ffn / hidden,  # three matrices of an expert, where FastMoE has two
        network_bytes_s=cluster.intra_node.bandwidth_bytes_s,
        gpu_flops=cluster.gpu.peak_flops,
        element_bytes=4,
    )


class RuleInExecutor:
    """Has training place homes, or replicas and their tokens, by a peer's rule in place of this project's plans."""

    def __init__(self, rule: Rule) -> None:
        self.plans = 0
        self._rule, self._latest = rule, LayerPlan(slots_RS=np.zeros((1, 1), dtype=np.int64), split="equal")

    def install(self) -> None:
        """Replace the functions that training plans with: `plan_homes`, or the two of the plan made step by step."""
        from megatron_smartmoe.placement import homes_planner
        from megatron_smartmoe.runtime.replicas import dispatch_plan

        if self._rule.sees == "history":
            _replace(homes_planner, "plan_homes", self.plan_homes)
            return
        _replace(dispatch_plan, "exact_slots", self.exact_slots)
        _replace(dispatch_plan, "split_tokens", self.split_tokens)
        planner = dispatch_plan.DispatchPlanner
        planner.plan = lambda at, *planned: dispatch_plan.plan_in_steps(at.view, *planned)  # type: ignore[method-assign]

    def plan_homes(
        self, slots_RS: IntArray, load_E: FloatArray, home_slots: int, options: HomesOptions | None = None
    ) -> HomesPlan:
        """Homes by the rule."""
        parts_E = np.rint(load_E * (MILLION / load_E.sum())).astype(np.int64)  # a forecast is in shares
        counts_RE = parts_E[None].repeat(len(slots_RS), axis=0)  # only their sum is asked for
        after_RS = self._plan(counts_RE, slots_RS, home_slots).slots_RS
        moved_RS = after_RS != slots_RS
        swaps = zip(slots_RS[moved_RS].tolist(), after_RS[moved_RS].tolist(), strict=True)
        return HomesPlan(slots_RS=after_RS, swaps=tuple(swaps))

    def exact_slots(self, counts_RE: IntArray, slots_RS: IntArray, home_slots: int, **prices: Any) -> IntArray:
        """Slots by the rule, as wide as the executor's."""
        plan = self._plan(counts_RE, slots_RS, home_slots)
        missing = slots_RS.shape[1] - plan.slots_RS.shape[1]
        if missing < 0:
            raise SystemExit(f"{self._rule.name} wants {-missing} spare slots more than a rank has")
        assert (plan.slots_RS[:, :home_slots] == slots_RS[:, :home_slots]).all(), "the rule moves homes"
        padded_RS = np.pad(plan.slots_RS, ((0, 0), (0, missing)), constant_values=EMPTY)
        self._latest = replace(plan, slots_RS=padded_RS)
        return padded_RS

    def split_tokens(self, counts_RE: IntArray, slots_RS: IntArray, home_slots: int, num_nodes: int = 1) -> IntArray:
        """Tokens by the rule's quotas."""
        return sent_tokens(self._latest, counts_RE, num_nodes)

    def _plan(self, counts_RE: IntArray, slots_RS: IntArray, home_slots: int) -> LayerPlan:
        self.plans += 1
        spare_slots = slots_RS.shape[1] - home_slots
        return self._rule.plan(LayerProblem(counts_RE=counts_RE, slots_RS=slots_RS, spare_slots=spare_slots))


def _replace(module: Any, name: str, function: Any) -> None:
    if not hasattr(module, name):
        raise SystemExit(f"{module.__name__} no longer calls {name}: a peer's rule cannot be put into it")
    setattr(module, name, function)


def sent_tokens(plan: LayerPlan, counts_RE: IntArray, num_nodes: int = 1) -> IntArray:
    """Tokens that each source rank sends to each slot, `[source rank, rank, slot]`; homes are in order of experts."""
    home_slots = counts_RE.shape[1] // len(counts_RE)
    if plan.split == "exact":
        return split_tokens(counts_RE, plan.slots_RS, home_slots, num_nodes)
    if plan.split != "local":
        tokens_ER = whole(tokens_by_rank(plan, counts_RE), counts_RE.sum(axis=0))
        return assign_sources(counts_RE, plan.slots_RS, tokens_ER, num_nodes)
    sent_RRS = np.zeros((len(counts_RE), *plan.slots_RS.shape), dtype=np.int64)
    for expert, sources in enumerate(counts_RE.T):
        slot_of = {int(rank): int(slot) for rank, slot in zip(*np.nonzero(plan.slots_RS == expert), strict=True)}
        home = expert // home_slots
        for source, tokens in enumerate(sources):
            rank = source if source in slot_of else home
            sent_RRS[source, rank, slot_of[rank]] += tokens
    return sent_RRS


def whole(tokens_ER: FloatArray, load_E: IntArray) -> IntArray:
    """Whole tokens with the same sum for every expert, the largest remainders rounded up."""
    whole_ER = np.floor(tokens_ER + 1e-9).astype(np.int64)
    for expert, missing in enumerate(load_E - whole_ER.sum(axis=1)):
        whole_ER[expert, np.argsort(whole_ER[expert] - tokens_ER[expert], kind="stable")[:missing]] += 1
    return whole_ER
