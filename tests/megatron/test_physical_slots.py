"""What a dispatcher of physical slots is given, and what the experts are given by it.

Whatever imports Megatron runs in the one rank of `run_ranks`, where the facade is; it asserts there. That rank plans
for the group of `RANKS` ranks with counts that stand for those of the others.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.support.in_one_rank import run_in_one_rank

pytestmark = [pytest.mark.dist, pytest.mark.fast]

RANKS, EXPERTS, SPARE, TOP_K, TOKENS = 2, 8, 2, 3, 40
HOME_SLOTS, ALL_SLOTS = EXPERTS // RANKS, EXPERTS + RANKS * SPARE


class _Planner:
    """Plans as `LayerPlanner` does, with the counts of this rank for the others'."""

    def __init__(self) -> None:
        from megatron_smartmoe.runtime.replicas.dispatch_plan import RankView

        self.view = RankView(
            num_ranks=RANKS,
            tp_size=1,
            num_experts=EXPERTS,
            num_slots=HOME_SLOTS + SPARE,
            num_nodes=1,
            rank=1,
            tp_rank=0,
        )
        self.uses_replicas = True

    def start(self, tokens_E: torch.Tensor) -> Any:
        from megatron_smartmoe.runtime.replicas.layer_planner import StartedPlan

        return StartedPlan(awaited=tokens_E.view(1, 1, -1).expand(RANKS, 1, -1).contiguous(), segments_3C=None)

    def finish(self, started: Any) -> Any:
        from megatron_smartmoe.runtime.replicas.dispatch_plan import ExactOptions, plan_in_steps
        from megatron_smartmoe.runtime.replicas.split import homes_only

        counts_RPE = started.awaited
        homes_RS = homes_only(EXPERTS, RANKS, SPARE)
        self.last = plan_in_steps(self.view, counts_RPE, homes_RS, ExactOptions(used_slots=SPARE, limit=1.0))
        return self.last


def _config(**options: Any) -> Any:
    from megatron.core.transformer.transformer_config import TransformerConfig

    shape = {"num_layers": 1, "hidden_size": 16, "num_attention_heads": 2, "add_bias_linear": False}
    return TransformerConfig(**shape, num_moe_experts=EXPERTS, moe_router_topk=TOP_K, **options)


def _routed(capacity_factor: float | None = None, pads: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Probabilities and map of a skewed router, after dropping and padding by Megatron's function."""
    from megatron.core.transformer.moe.moe_utils import apply_router_token_dropping

    generator = torch.Generator().manual_seed(7)
    scores = torch.randn(TOKENS, EXPERTS, generator=generator) + 1.5 * (torch.arange(EXPERTS) < 2)
    chosen = torch.zeros(TOKENS, EXPERTS, dtype=torch.bool).scatter(1, scores.topk(TOP_K, dim=1).indices, True)
    probs = scores.softmax(dim=1) * chosen
    if capacity_factor is None:
        return probs, chosen
    dropped: tuple[torch.Tensor, torch.Tensor] = apply_router_token_dropping(
        probs, chosen, TOP_K, capacity_factor, pad_to_capacity=pads
    )
    return dropped


def every_choice_goes_to_a_slot_of_its_expert() -> None:
    """Each token's experts, by way of the slots that hold them, are what the router chose; so are gradients."""
    from megatron_smartmoe.adapter.moe.physical_slots import PhysicalSlots

    planner = _Planner()
    slots = PhysicalSlots(_config(), planner)  # type: ignore[arg-type]
    probs, chosen = _routed()
    probs.requires_grad_()
    slot_of_expert_E = torch.randperm(EXPERTS, generator=torch.Generator().manual_seed(1))
    wide_probs, wide = slots.translate(probs, chosen, slot_of_expert_E)
    expert_S = torch.from_numpy(planner.last.slots_RS.ravel())
    home_of = torch.zeros(ALL_SLOTS, EXPERTS).scatter(1, expert_S.clamp(min=0)[:, None], 1.0)  # slot -> its home
    assert torch.equal((wide.float() @ home_of)[:, slot_of_expert_E], chosen.float())
    assert torch.equal((wide_probs @ home_of)[:, slot_of_expert_E], probs)
    assert wide.sum(dim=1).tolist() == [TOP_K] * TOKENS
    assert not wide[:, expert_S < 0].any()
    assert wide.view(TOKENS, RANKS, -1)[:, :, HOME_SLOTS:].any(), "no replica got a token"
    sent_S = wide.sum(dim=0)
    assert sent_S.view(RANKS, -1).sum(dim=1).tolist() == planner.last.sent_R
    (wide_probs * torch.arange(1, 1 + ALL_SLOTS)).sum().backward()
    assert probs.grad is not None
    assert torch.equal(probs.grad != 0, chosen)


def padding_drops_what_megatron_drops() -> None:
    """The tokens that are dropped are those that Megatron drops; every slot has the capacity of an expert."""
    from megatron.core.transformer.moe.moe_utils import get_capacity

    from megatron_smartmoe.adapter.moe.physical_slots import PhysicalSlots

    factor = 1.0
    slots = PhysicalSlots(
        _config(moe_expert_capacity_factor=factor, moe_pad_expert_input_to_capacity=True),
        _Planner(),  # type: ignore[arg-type]
    )
    probs, chosen = _routed(factor, pads=True)
    kept, _ = _routed(factor)
    wide_probs, wide = slots.translate(probs, chosen, torch.arange(EXPERTS))
    torch.testing.assert_close(wide_probs.sum(dim=1), kept.sum(dim=1))
    assert (wide_probs != 0).sum() == (kept != 0).sum()
    assert not wide_probs[~wide].any()
    assert wide.sum(dim=0).tolist() == [get_capacity(TOKENS * TOP_K, EXPERTS, factor)] * ALL_SLOTS


def capacities_are_those_of_experts() -> None:
    """To the row, also where choices x factor is a whole number, and where floats are just beside one."""
    from megatron.core.transformer.moe.moe_utils import get_capacity

    from megatron_smartmoe.adapter.moe.physical_slots import PhysicalSlots

    differs = 0
    for factor in (0.8, 1.0, 1.1, 1.25, 1.3, EXPERTS / TOP_K):
        view = PhysicalSlots(_config(moe_expert_capacity_factor=factor), _Planner()).config  # type: ignore[arg-type]
        assert view.num_moe_experts == ALL_SLOTS
        for choices in range(TOP_K, 3000 * TOP_K, TOP_K):
            capacity = get_capacity(choices, EXPERTS, factor)
            assert get_capacity(choices, ALL_SLOTS, view.moe_expert_capacity_factor) == capacity
            differs += get_capacity(choices, ALL_SLOTS, factor * ALL_SLOTS / EXPERTS) != capacity
    assert differs > 0, "a plain number would do"


class _Dispatcher:
    """Stands for Megatron's: four rows for each slot."""

    def dispatch_postprocess(self, hidden_states: torch.Tensor, probs: torch.Tensor) -> Any:
        return hidden_states, torch.full((HOME_SLOTS + SPARE,), 4), probs

    def combine_preprocess(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states


def experts_get_no_rows_of_empty_slots() -> None:
    """Without replicas the experts get the rows of home slots, and the dispatcher gets zeros for the others."""
    from megatron_smartmoe.adapter.moe.physical_slots import with_slots

    dispatcher: Any = with_slots(_Dispatcher)()
    rows, weights = torch.ones(4 * (HOME_SLOTS + SPARE), 3), torch.ones(4 * (HOME_SLOTS + SPARE))
    for replicas, slots in ((True, HOME_SLOTS + SPARE), (False, HOME_SLOTS)):
        dispatcher.planner = SimpleNamespace(
            wire=SimpleNamespace(advance=lambda: None),
            uses_replicas=replicas,
            view=SimpleNamespace(home_slots=HOME_SLOTS),
        )
        got, tokens_S, got_weights = dispatcher.dispatch_postprocess(rows, weights)
        assert (len(got), len(got_weights), tokens_S.tolist()) == (4 * slots, 4 * slots, [4] * slots)
        back = dispatcher.combine_preprocess(got)
        assert len(back) == len(rows)
        assert back.sum() == got.sum()


CHECKS: tuple[Callable[[], None], ...] = (
    every_choice_goes_to_a_slot_of_its_expert,
    padding_drops_what_megatron_drops,
    capacities_are_those_of_experts,
    experts_get_no_rows_of_empty_slots,
)


def test_all(tmp_path: Path) -> None:
    run_in_one_rank(CHECKS, tmp_path)
