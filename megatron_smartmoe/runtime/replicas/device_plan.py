"""The plan of one micro-batch made where its counts are, on the GPU: the host reads what has become of it.

`smartmoe::exact_split` plans the replicas and splits the tokens; what follows from them (source ranks, sizes of the
exchange, this rank's segments) are a few dozen small operations on tensors of ranks x slots numbers. The host waits
once, as it does for the counts when it plans itself, and the segments need not travel back.

It is the plan of `dispatch_plan` to the last token, with three limits: ranks do not share experts, the group is one
node, and replicas are not left out because they do not pay. Replicas are those of the greedy pass, without the search
that the host adds where the pass leaves a rank above the mean.

Experts are numbered by their home: expert e is at home on rank e // S in home slot e % S. C counts all slots of the
group in the order (expert, rank), those without an expert behind them.
"""

from __future__ import annotations

import numpy as np
import torch

from megatron_smartmoe import ops
from megatron_smartmoe.runtime.replicas.dispatch_plan import DispatchPlan, ExactOptions, RankView
from megatron_smartmoe.runtime.replicas.split import replicas_of
from megatron_smartmoe.runtime.replicas.tally import MicroBatch
from megatron_smartmoe.spec.placement import EMPTY


class DevicePlanner:
    """Plans micro-batch after micro-batch for one rank and layer, where the counts are.

    Args:
        view: the group and this rank; one node, and one rank for each expert.
        pinned: whether the counts are on a GPU.
    """

    def __init__(self, view: RankView, *, pinned: bool) -> None:
        assert view.tp_size == view.num_nodes == 1, "a plan on the device is for one node and one rank for each expert"
        self.view, all_slots = view, view.num_ranks * view.num_slots
        self._sizes = [view.num_ranks, view.num_ranks, all_slots, all_slots, all_slots, view.num_experts]
        self._on_host = torch.empty(sum(self._sizes), dtype=torch.int64, pin_memory=pinned)

    def plan(self, counts_RE: torch.Tensor, exact: ExactOptions) -> DispatchPlan:
        """The plan for these counts, with replicas planned from them; see `DispatchPlanner.plan`."""
        return self.read(*self.start(counts_RE, exact))

    def start(self, counts_RE: torch.Tensor, exact: ExactOptions) -> tuple[torch.Tensor, torch.Tensor]:
        """The plan where the counts are. The host waits for nothing, and no shape depends on a count.

        Returns:
            The numbers that the host needs, for `read`; and `segments_3C`: this rank's segments as
            `split.segment_shifts` has them, lengths and shifts, and the slot of each, rank x slots of a rank + slot.
        """
        view, shape = self.view, (self.view.num_ranks, self.view.num_slots)
        counts_RE = counts_RE.view(view.num_ranks, view.num_experts)
        # Step 1: the replicas, and how many tokens each slot takes.
        slots_RS, tokens_RS = _slots_and_tokens(view, counts_RE, exact)
        # Step 2: the slots by expert, and what each rank sends to each of them.
        order_C = torch.argsort(torch.where(slots_RS < 0, view.num_experts, slots_RS).flatten(), stable=True)
        sent_RC = _sources(counts_RE, slots_RS.flatten()[order_C], tokens_RS.flatten()[order_C], order_C // shape[1])
        sent_RRS = torch.zeros_like(sent_RC).index_copy(1, order_C, sent_RC).view(-1, *shape)
        leaving_RS, arriving_RS = sent_RRS[view.rank], sent_RRS[:, view.rank]
        # Step 3: this rank's segments, as `split.segment_shifts` has them.
        length_C = sent_RC[view.rank]
        begin_C = (leaving_RS.flatten().cumsum(0) - leaving_RS.flatten())[order_C]
        segments_3C = torch.stack((length_C, begin_C - (length_C.cumsum(0) - length_C), order_C))
        # Step 4: what the host needs, in one piece.
        parts = (leaving_RS.sum(1), arriving_RS.sum(1), arriving_RS, slots_RS, tokens_RS, counts_RE.sum(0))
        return torch.cat([part.flatten() for part in parts]), segments_3C

    def read(self, numbers: torch.Tensor, segments_3C: torch.Tensor) -> DispatchPlan:
        """The plan on the host, which waits for its numbers; see `start`."""
        view = self.view
        self._on_host.copy_(numbers)
        sent_R, received_R, arriving, slots, tokens, load_E = torch.split(self._on_host.clone(), self._sizes)
        arriving_PRS = arriving.view(1, view.num_ranks, view.num_slots)
        slots_RS = slots.view(view.num_ranks, view.num_slots).numpy()
        tokens_RS = tokens.view(slots_RS.shape).numpy()
        spare_RK = slots_RS[:, view.home_slots :]
        return DispatchPlan(
            slots_RS=slots_RS,
            num_rows=int(sent_R.sum()),
            sent_R=sent_R.tolist(),
            received_R=received_R.tolist(),
            arriving_P=arriving_PRS.sum(dim=(1, 2)),
            arriving_PRS=arriving_PRS,
            tokens_S=arriving_PRS.sum(dim=(0, 1)),
            segments_2N=segments_3C[:2],
            has_replicas=bool((spare_RK != EMPTY).any()),
            own_replicas=replicas_of(slots_RS, view.home_slots, view.rank),
            load=MicroBatch(
                load_E=load_E.numpy(),
                homes_R=load_E.view(view.num_ranks, -1).sum(dim=1).numpy(),
                split_R=tokens_RS.sum(axis=1),
                num_replicas=int(np.count_nonzero(tokens_RS[:, view.home_slots :])),
            ),
        )


def _slots_and_tokens(
    view: RankView, counts_RE: torch.Tensor, exact: ExactOptions
) -> tuple[torch.Tensor, torch.Tensor]:
    """Expert in each slot and the tokens that it takes, `[R, S]` each."""
    used_RU, tokens_RU = ops.exact_split(counts_RE, exact.used_slots, exact.num_nodes)
    load_E = counts_RE.sum(0)
    homes_RH = load_E.view(view.num_ranks, -1)
    # homes that are balanced well enough get no replicas; compared as the host does, in float64
    busiest, tokens = homes_RH.sum(1).max() * view.num_ranks, load_E.sum()
    is_balanced = busiest.double() <= exact.limit * tokens.double()
    spare_RK = torch.where(is_balanced, EMPTY, used_RU[:, view.home_slots :])
    taken_RK = torch.where(is_balanced, 0, tokens_RU[:, view.home_slots :])
    homes_taken_RH = torch.where(is_balanced, homes_RH, tokens_RU[:, : view.home_slots])
    unused = (0, view.num_slots - used_RU.shape[1])
    slots_RS = torch.cat((used_RU[:, : view.home_slots], torch.nn.functional.pad(spare_RK, unused, value=EMPTY)), dim=1)
    return slots_RS, torch.cat((homes_taken_RH, torch.nn.functional.pad(taken_RK, unused)), dim=1)


def _sources(
    counts_RE: torch.Tensor, expert_C: torch.Tensor, tokens_C: torch.Tensor, rank_C: torch.Tensor
) -> torch.Tensor:
    """Tokens from each source rank to each slot, `[R, C]`: `placement.split.assign_sources` on one node.

    Args:
        counts_RE: tokens of source rank r for expert e.
        expert_C: expert of slot c, ascending; EMPTY behind all others.
        tokens_C: what slot c takes.
        rank_C: rank of slot c, ascending for each expert.
    """
    known_C = expert_C.clamp(min=0)
    # Step 1: tokens that are already on a host of their expert stay there.
    local_C = torch.minimum(counts_RE[rank_C, known_C], tokens_C)
    left_RE = counts_RE.index_put((rank_C, known_C), -local_C, accumulate=True)
    need_C, left_RC = tokens_C - local_C, left_RE[:, known_C]
    # Step 2: the others' supply and demand are laid end to end, expert by expert.
    supply_end_RC, end_C = left_RC.cumsum(0), need_C.cumsum(0)
    first_C = torch.searchsorted(known_C.where(expert_C >= 0, counts_RE.shape[1]), known_C)
    before_C = (end_C - need_C)[first_C]
    begin_C = end_C - need_C - before_C
    met_RC = torch.minimum(supply_end_RC, end_C - before_C) - torch.maximum(supply_end_RC - left_RC, begin_C)
    met_RC = torch.where(need_C > 0, met_RC.clamp(min=0), 0)
    return met_RC.index_put((rank_C, torch.arange(len(rank_C), device=rank_C.device)), local_C, accumulate=True)
