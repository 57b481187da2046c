"""Argument checks of the numpy twins of the host ops, `min_max_split` and `exact_replicas`.

The compiled ops check for themselves, in csrc/checks.h and csrc/cpu, in the same order and with the same texts; a test
compares the two. Which of the twins serves a run must not decide which mistakes it notices.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_smartmoe.errors import PlanError

MAX_TOKENS = 2**63 - 1  # kMaxTokens of csrc/checks.h: counts and their sums are int64


def check_split(counts_RE: NDArray[Any], hosts_ER: NDArray[Any]) -> None:
    """Check the arguments of `min_max_split`.

    Raises:
        PlanError: a dtype or shape is wrong, a count is negative, or the counts add up to more than int64 holds.
    """
    _check_dtype("counts_RE", counts_RE, np.int64)
    _check_dtype("hosts_ER", hosts_ER, np.bool_)
    ok, rule = counts_RE.ndim == 2 and counts_RE.shape[0] >= 1, "[R, E] with at least one rank"
    _check_shape("counts_RE", counts_RE, ok, rule, "Pass the counts of one layer, a row per source rank")
    expected = [counts_RE.shape[1], counts_RE.shape[0]]
    ok, rule = list(hosts_ER.shape) == expected, f"[E, R] = {expected}, as counts_RE has it"
    _check_shape("hosts_ER", hosts_ER, ok, rule, "Pass a row per expert")
    _check_counts("counts_RE", counts_RE)


def check_replicas(
    load_E: NDArray[Any], slots_RS: NDArray[Any], home_slots: int, num_nodes: int, trials: int = 0
) -> None:
    """Check the arguments of `exact_replicas`.

    Raises:
        PlanError: a dtype, shape or number is wrong, a load is negative, the loads add up to more than int64 holds, or
            an expert has no home or two.
    """
    _check_dtype("load_E", load_E, np.int64)
    _check_dtype("slots_RS", slots_RS, np.int64)
    way_out = "Pass the sum of the counts over the source ranks"
    _check_shape("load_E", load_E, load_E.ndim == 1, "[E]", way_out)
    ok, rule = slots_RS.ndim == 2 and slots_RS.shape[0] >= 1, "[R, S] with at least one rank"
    _check_shape("slots_RS", slots_RS, ok, rule, "Pass the slots of one layer, a row per rank")
    (num_ranks, num_slots), num_experts = slots_RS.shape, len(load_E)
    if home_slots < 0 or home_slots > num_slots or home_slots * num_ranks != num_experts:
        rule = f"it must be E / R = {num_experts} / {num_ranks}, and at most S = {num_slots}"
        raise PlanError(f"home_slots = {home_slots}: {rule}. Pass the number of homes of a rank")
    if num_nodes < 1 or num_ranks % num_nodes:
        rule = f"it must divide R = {num_ranks}"
        raise PlanError(f"num_nodes = {num_nodes}: {rule}. Pass the nodes that the ranks lie on")
    if trials < 0:
        raise PlanError(f"trials = {trials}: it must be at least 0. Pass 0 for no search")
    _check_counts("load_E", load_E)
    _check_homes(slots_RS, home_slots, num_experts)


def _check_dtype(name: str, array: NDArray[Any], dtype: type[np.generic]) -> None:
    expected = np.dtype(dtype).name
    if array.dtype != dtype:
        raise PlanError(f"{name}.dtype = {array.dtype}: it must be {expected}. Convert it to {expected}")


def _check_shape(name: str, array: NDArray[Any], ok: bool, rule: str, way_out: str) -> None:
    if not ok:
        raise PlanError(f"{name}.shape = {list(array.shape)}: it must be {rule}. {way_out}")


def _check_counts(name: str, counts: NDArray[Any]) -> None:
    """Numbers of tokens are not negative, and their sum is one too."""
    if counts.size == 0:
        return
    if counts.min() < 0:
        at = np.argwhere(counts < 0)[0].tolist()
        rule = "a number of tokens is at least 0. Pass counts of tokens"
        raise PlanError(f"{name}{at} = {int(counts[tuple(at)])}: {rule}")
    if int(counts.max()) > MAX_TOKENS // counts.size and sum(counts.ravel().tolist()) > MAX_TOKENS:
        rule = "the tokens of a layer must fit in int64. Pass counts of tokens"
        raise PlanError(f"{name} = counts that add up to more than {MAX_TOKENS}: {rule}")


def _check_homes(slots_RS: NDArray[Any], home_slots: int, num_experts: int) -> None:
    """Every expert has one home."""
    homes = slots_RS[:, :home_slots].ravel()
    if len(homes) == 0 or (homes.min() >= 0 and homes.max() < num_experts and np.bincount(homes).max() == 1):
        return
    seen: set[int] = set()
    for at, expert in enumerate(homes.tolist()):
        if not 0 <= expert < num_experts or expert in seen:
            rule = f"the homes must be each of the {num_experts} experts once. Pass a valid placement"
            raise PlanError(f"slots_RS[{at // home_slots}, {at % home_slots}] = {expert}: {rule}")
        seen.add(expert)
