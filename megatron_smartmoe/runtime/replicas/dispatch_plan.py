"""All that a rank derives from the counts of one micro-batch: replicas, split, exchange sizes, and its rows' segments.

This lies on the critical path of every layer: the device waits from the arrival of the counts until the permutation is
launched. So it is one call of the compiled library, smartmoe::plan_dispatch, which writes into one buffer that stays
allocated (pinned where the counts come from a GPU, so that the segments travel back without another copy) and does not
hold the interpreter's lock. `plan_in_steps` is its twin: the same plan step by step with the functions of `split.py`,
and what serves where the library is not built.

Experts are numbered by their home: expert e is at home on rank e // S in home slot e % S.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from megatron_smartmoe import ops
from megatron_smartmoe.cost.replicas import FREE_TRANSFERS, TransferPrice
from megatron_smartmoe.placement.replan import ReplanOptions, planned_anew
from megatron_smartmoe.runtime.replicas.kernels import exact_slots
from megatron_smartmoe.runtime.replicas.split import (
    BALANCED,
    Replica,
    homes_only,
    price_tensor,
    replicas_of,
    segment_shifts,
    split_tokens,
)
from megatron_smartmoe.runtime.replicas.tally import MicroBatch
from megatron_smartmoe.spec.arrays import IntArray
from megatron_smartmoe.spec.placement import EMPTY, with_empty_slots


@dataclass(frozen=True, kw_only=True)
class ExactOptions:
    """How replicas are planned from the counts of a micro-batch.

    Attributes:
        used_slots: spare slots of a rank that are used; the others stay empty.
        num_nodes: nodes of the group; a replica stays on its home's node. 1 lets it go anywhere.
        or_group: whether it may go anywhere where that is cheaper; see `placement.exact_plan`.
        price: see `placement.paying_replicas.without_losing_replicas`; the trees are those of the view's nodes.
        limit: no replica is made while max / mean tokens per rank of the homes alone are at most this.
    """

    used_slots: int
    num_nodes: int = 1
    or_group: bool = False
    price: TransferPrice = FREE_TRANSFERS
    limit: float = BALANCED


@dataclass(frozen=True, kw_only=True)
class RankView:
    """The group, and which rank of it plans for itself.

    Attributes:
        num_ranks: R, the expert-parallel ranks.
        tp_size: P, the ranks that share an expert.
        num_experts: E.
        num_slots: home and spare slots of a rank.
        num_nodes: nodes that the group spans; a replica on a token's own node is preferred.
        rank: this rank's number in the expert-parallel group.
        tp_rank: this rank's number among those that share its experts.
    """

    num_ranks: int
    tp_size: int
    num_experts: int
    num_slots: int
    num_nodes: int
    rank: int
    tp_rank: int

    @property
    def home_slots(self) -> int:
        """S, the home slots of a rank."""
        return self.num_experts // self.num_ranks


@dataclass(frozen=True, kw_only=True, eq=False)
class DispatchPlan:
    """The plan of one micro-batch, as one rank needs it; everything on the host.

    Attributes:
        slots_RS: expert in each slot.
        num_rows: rows that this rank sends.
        sent_R: rows to each rank.
        received_R: rows from each rank, to this one of the P that share an expert.
        arriving_P: rows that arrive at each of the P.
        arriving_PRS: rows from each rank to each slot of this rank, for each of the P.
        tokens_S: rows of each slot of this rank, from all P; overwritten by the next plan.
        segments_2N: lengths of this rank's segments and how far each moves, see `split.segment_shifts`; any number of
            empty segments behind them; overwritten by the next plan.
        has_replicas: whether any rank has one.
        own_replicas: those that this rank holds or has the home of.
        load: the loads, for the history and the log.
    """

    slots_RS: IntArray
    num_rows: int
    sent_R: list[int]
    received_R: list[int]
    arriving_P: torch.Tensor
    arriving_PRS: torch.Tensor
    tokens_S: torch.Tensor
    segments_2N: torch.Tensor
    has_replicas: bool
    own_replicas: tuple[Replica, ...]
    load: MicroBatch

    @property
    def busiest(self) -> int:
        """Tokens of the busiest rank."""
        return int(self.load.split_R.max())


class PlanBuffer:
    """The memory that smartmoe::plan_dispatch writes to, and its parts, which lie one behind the other.

    One buffer serves all micro-batches of a layer: a copy from it to the GPU is queued before the layer's next counts
    are copied to the host, and the host waits for those before it plans again.

    Args:
        view: the sizes.
        pinned: whether to take page-locked memory, for copies to a GPU that the host does not wait for.
    """

    def __init__(self, view: RankView, *, pinned: bool) -> None:
        num_ranks, tp_size, all_slots = view.num_ranks, view.tp_size, view.num_ranks * view.num_slots
        shapes = {
            "numbers": (4,),  # rows that this rank sends, replicas, those that take tokens, those of this rank
            "exchange": (2, num_ranks),
            "balance": (2, num_ranks),
            "load": (view.num_experts,),
            "tokens": (view.num_slots,),
            "arriving_P": (tp_size,),
            "arriving": (tp_size, num_ranks, view.num_slots),
            "segments": (2, all_slots),
            "replicas": (all_slots - view.num_experts, 5),
        }
        ends = np.cumsum([int(np.prod(shape)) for shape in shapes.values()]).tolist()
        self.whole = torch.zeros(ends[-1], dtype=torch.int64, pin_memory=pinned)
        parts = {
            name: self.whole[begin:end].view(shape)
            for (name, shape), begin, end in zip(shapes.items(), [0, *ends], ends, strict=False)
        }
        # for the device: tensors; for the host: arrays, whose copies and lists take a fraction of the time
        self.tokens_S, self.segments_2N = parts["tokens"], parts["segments"]
        self.numbers_4, self.exchange_2R = parts["numbers"].numpy(), parts["exchange"].numpy()
        self.balance_2R, self.load_E = parts["balance"].numpy(), parts["load"].numpy()
        self.arriving_P, self.arriving_PRS = parts["arriving_P"].numpy(), parts["arriving"].numpy()
        self.replicas_N5 = parts["replicas"].numpy()
        homes_RS = homes_only(view.num_experts, num_ranks, view.num_slots - view.home_slots)
        self.slots_RS = torch.from_numpy(homes_RS)
        self.counts_RPE = torch.empty(num_ranks, tp_size, view.num_experts, dtype=torch.int64, pin_memory=pinned)


class DispatchPlanner:
    """Plans micro-batch after micro-batch for one rank and layer.

    Args:
        view: the group and this rank.
        pinned: whether the plans' segments travel to a GPU.
    """

    def __init__(self, view: RankView, *, pinned: bool = False) -> None:
        self.view, self._buffer = view, PlanBuffer(view, pinned=pinned)
        self._compiled = ops.is_compiled()

    def to_host(self, counts: torch.Tensor) -> torch.Tensor:
        """The counts `[R, P, E]` on the host, which waits for them; on the CPU they are there already."""
        view = self.view
        counts_RPE = counts.view(view.num_ranks, view.tp_size, view.num_experts)
        return counts_RPE if counts_RPE.is_cpu else self._buffer.counts_RPE.copy_(counts_RPE)

    def plan(self, counts_RPE: torch.Tensor, slots_RS: IntArray, exact: ExactOptions | None = None) -> DispatchPlan:
        """The plan for these counts.

        Args:
            counts_RPE: tokens of each source rank for each expert, int64, on the CPU.
            slots_RS: the slots; where replicas are planned from the counts, only the homes among them are used.
            exact: how to plan replicas from the counts, or None to use those of `slots_RS`.
        """
        if not self._compiled:
            return plan_in_steps(self.view, counts_RPE, slots_RS, exact)
        view, buffer, options = self.view, self._buffer, exact or _AS_GIVEN
        ops.plan_dispatch(
            counts_RPE,
            torch.from_numpy(slots_RS) if exact is None else buffer.slots_RS,  # whose homes stay as they are
            view.home_slots,
            view.num_nodes,
            view.rank,
            view.tp_rank,
            None if exact is None else options.used_slots,
            options.num_nodes,
            options.or_group,
            options.limit,
            price_tensor(options.price),
            buffer.whole,
        )
        # What outlives this micro-batch is copied: a few kilobytes, where the next plan would overwrite them.
        num_rows, num_replicas, num_used, num_own = buffer.numbers_4.tolist()
        sent_R, received_R = buffer.exchange_2R.tolist()
        homes_R, split_R = buffer.balance_2R.copy()
        return DispatchPlan(
            slots_RS=slots_RS if exact is None else buffer.slots_RS.numpy().copy(),
            num_rows=num_rows,
            sent_R=sent_R,
            received_R=received_R,
            arriving_P=torch.from_numpy(buffer.arriving_P.copy()),
            arriving_PRS=torch.from_numpy(buffer.arriving_PRS.copy()),
            tokens_S=buffer.tokens_S,
            segments_2N=buffer.segments_2N,
            has_replicas=num_replicas > 0,
            own_replicas=tuple(map(Replica._make, buffer.replicas_N5[:num_own].tolist())),
            load=MicroBatch(load_E=buffer.load_E.copy(), homes_R=homes_R, split_R=split_R, num_replicas=num_used),
        )


_AS_GIVEN = ExactOptions(used_slots=0)  # its numbers are not read


def plan_or_replan(
    planners: tuple[DispatchPlanner, DispatchPlanner],
    counts_RPE: torch.Tensor,
    slots_RS: IntArray,
    exact: ExactOptions,
    rule: ReplanOptions,
) -> DispatchPlan:
    """The plan with the replicas in `slots_RS`, or one with replicas planned anew, as the rule of `auto` has it.

    A layer that was planned anew has the slots in its load too.

    Args:
        planners: of the two plans, each of which lies in its planner's memory until the next one.
        counts_RPE: see `DispatchPlanner.plan`.
        slots_RS: homes, and the replicas from history.
        exact: how replicas are planned from the counts.
        rule: when.
    """
    view = planners[0].view
    kept = planners[0].plan(counts_RPE, slots_RS)

    def plan_anew() -> DispatchPlan:
        homes_RS = homes_only(view.num_experts, view.num_ranks, view.num_slots - view.home_slots)
        return planners[1].plan(counts_RPE, homes_RS, exact)

    anew = planned_anew(kept.busiest, kept.load.load_E, view.num_ranks, rule, plan_anew)
    if anew is None:
        return kept
    return replace(anew, load=replace(anew.load, replanned_RS=anew.slots_RS, before_tokens=kept.busiest))


def plan_in_steps(
    view: RankView, counts_RPE: torch.Tensor, slots_RS: IntArray, exact: ExactOptions | None = None
) -> DispatchPlan:
    """The twin of smartmoe::plan_dispatch; see `DispatchPlanner.plan` for the arguments."""
    counts_PRE = np.ascontiguousarray(counts_RPE.numpy().transpose(1, 0, 2))
    load_RE, home_slots = counts_PRE.sum(axis=0), view.home_slots
    # Step 1: the replicas that are planned for the sum of the counts.
    if exact is not None:
        used_RS = slots_RS[:, : home_slots + exact.used_slots]
        planned_RS = exact_slots(
            load_RE,
            used_RS,
            home_slots,
            num_nodes=exact.num_nodes,
            or_group=exact.or_group,
            limit=exact.limit,
            price=replace(exact.price, num_nodes=view.num_nodes),
        )
        slots_RS = with_empty_slots(planned_RS, view.num_slots - used_RS.shape[1])
    # Step 2: how many tokens each rank sends to each slot; each of the P ranks that share an expert splits its own.
    sent_PRRS = np.stack([split_tokens(each, slots_RS, home_slots, view.num_nodes) for each in counts_PRE])
    return plan_of_split(view, sent_PRRS, slots_RS)


def plan_of_split(view: RankView, sent_PRRS: IntArray, slots_RS: IntArray) -> DispatchPlan:
    """What concerns this rank of a split.

    Args:
        view: the group and this rank.
        sent_PRRS: tokens that each of the P ranks which share an expert sends, `[P, source rank, rank, slot]`.
        slots_RS: the slots.
    """
    home_slots = view.home_slots
    leaving_RS, arriving_PRS = sent_PRRS[view.tp_rank, view.rank], sent_PRRS[:, :, view.rank]
    taken_RS = sent_PRRS.sum(axis=(0, 1))
    filled_RS = slots_RS != EMPTY
    load_E = np.zeros(view.num_experts, dtype=np.int64)  # not by bincount, which sums in float64
    np.add.at(load_E, slots_RS[filled_RS], taken_RS[filled_RS])
    return DispatchPlan(
        slots_RS=slots_RS,
        num_rows=int(leaving_RS.sum()),
        sent_R=leaving_RS.sum(axis=1).tolist(),
        received_R=arriving_PRS[view.tp_rank].sum(axis=1).tolist(),
        arriving_P=torch.from_numpy(arriving_PRS.sum(axis=(1, 2))),
        arriving_PRS=torch.from_numpy(np.ascontiguousarray(arriving_PRS)),
        tokens_S=torch.from_numpy(arriving_PRS.sum(axis=(0, 1))),
        segments_2N=torch.from_numpy(np.stack(segment_shifts(leaving_RS, slots_RS))),
        has_replicas=bool(filled_RS[:, home_slots:].any()),
        own_replicas=replicas_of(slots_RS, home_slots, view.rank),
        load=MicroBatch(
            load_E=load_E,
            homes_R=load_E.reshape(view.num_ranks, -1).sum(axis=1),
            split_R=taken_RS.sum(axis=1),
            num_replicas=int((filled_RS & (taken_RS > 0))[:, home_slots:].sum()),
        ),
    )


def by_home(slots_RS: IntArray, home_slots: int) -> IntArray:
    """A slot table with every expert named by its home: expert e then has its home in slot e % S of rank e // S.

    Args:
        slots_RS: logical experts, EMPTY for none.
        home_slots: S.
    """
    home_E = np.argsort(slots_RS[:, :home_slots].ravel())
    return np.where(slots_RS == EMPTY, EMPTY, home_E[slots_RS])
