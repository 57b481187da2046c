"""The optimizer's settings in a checkpoint's common state, for one arrangement of experts or another.

Above expert parallelism 1 Megatron has two optimizers, the second for the experts, and its checkpoints list the
settings of both, numbered; at 1 there is one. The tensors of the state have the same keys either way, so a checkpoint
is turned from one form into the other by its settings alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_GROUPS = "param_groups"
_EXPERTS = "is_expert_parallel"


def rearranged(settings: Any, *, expert_ranks: int, expert_biases: bool) -> Any:
    """The settings for that many expert-parallel ranks.

    Args:
        settings: `optimizer` of the common state.
        expert_ranks: 1, or more.
        expert_biases: whether experts have parameters without weight decay.

    Raises:
        ValueError: they are of a form that is not known here.
    """
    is_chained = isinstance(settings, Mapping) and set(settings) == {0, 1}
    if is_chained == (expert_ranks > 1):
        _inner(settings[0] if is_chained else settings)
        return settings
    if is_chained:
        return settings[0]  # its groups are those of EP 1; the second optimizer's are copies of them
    groups = _inner(settings)[_GROUPS]
    of_experts = [
        {**group, _EXPERTS: True}
        for group in groups
        if not group.get("is_decoupled_lr") and (group.get("wd_mult") or expert_biases)
    ]
    return {0: settings, 1: _with_groups(settings, of_experts)}


def _inner(settings: Any) -> Mapping[str, Any]:
    """The mapping that has the groups."""
    found = settings
    if isinstance(found, Mapping) and _GROUPS not in found:
        found = found.get("optimizer")
    if not isinstance(found, Mapping) or not isinstance(found.get(_GROUPS), list):
        raise ValueError(f"its optimizer settings are a {type(settings).__name__} without param_groups")
    return found


def _with_groups(settings: Mapping[str, Any], groups: list[Any]) -> dict[str, Any]:
    if _GROUPS in settings:
        return {**settings, _GROUPS: groups}
    return {**settings, "optimizer": {**settings["optimizer"], _GROUPS: groups}}
