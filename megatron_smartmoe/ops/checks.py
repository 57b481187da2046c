"""Argument checks of the torch twins and the fake kernels.

The compiled kernels check for themselves, in csrc/checks.h, with the same rules and texts: torch.ops reaches them past
everything written in Python, and they must never read out of bounds. A test compares the two.
"""

from __future__ import annotations

import torch
from torch import Tensor

MAX_EXPERTS = 4096  # kMaxExperts of csrc/checks.h


def check_ids(ids: Tensor) -> None:
    """Raises RuntimeError, as the compiled op does, unless ids is int32 or int64."""
    if ids.dtype not in (torch.int32, torch.int64):
        dtype = str(ids.dtype).removeprefix("torch.")
        raise RuntimeError(f"ids.dtype = {dtype}: it must be int32 or int64. Convert it with ids.long()")


def check_num_experts(num_experts: int) -> None:
    """Raises RuntimeError, as the compiled op does, unless num_experts is in 1..MAX_EXPERTS."""
    if not 1 <= num_experts <= MAX_EXPERTS:
        way_out = "Pass the number of logical experts of the layer"
        raise RuntimeError(f"num_experts = {num_experts}: it must be in 1..{MAX_EXPERTS}. {way_out}")


def _check_int64(name: str, tensor: Tensor) -> None:
    if tensor.dtype != torch.int64:
        dtype = str(tensor.dtype).removeprefix("torch.")
        raise RuntimeError(f"{name}.dtype = {dtype}: it must be int64. Convert it with {name}.long()")


def check_split(counts_RE: Tensor, hosts_ER: Tensor) -> None:
    """Raises RuntimeError, as the compiled op does, unless the dtypes and shapes are those of min_max_split."""
    _check_int64("counts_RE", counts_RE)
    if hosts_ER.dtype != torch.bool:
        dtype = str(hosts_ER.dtype).removeprefix("torch.")
        raise RuntimeError(f"hosts_ER.dtype = {dtype}: it must be bool. Convert it with hosts_ER.bool()")
    if counts_RE.dim() != 2 or counts_RE.shape[0] < 1:
        way_out = "Pass the counts of one layer, a row per source rank"
        raise RuntimeError(
            f"counts_RE.shape = {list(counts_RE.shape)}: it must be [R, E] with at least one rank. {way_out}"
        )
    num_ranks, num_experts = counts_RE.shape
    if hosts_ER.dim() != 2 or hosts_ER.shape[0] != num_experts or hosts_ER.shape[1] != num_ranks:
        rule = f"it must be [E, R] = [{num_experts}, {num_ranks}], as counts_RE has it"
        raise RuntimeError(f"hosts_ER.shape = {list(hosts_ER.shape)}: {rule}. Pass a row per expert")


def check_replicas(load_E: Tensor, slots_RS: Tensor, home_slots: int, num_nodes: int) -> None:
    """Raises RuntimeError, as the compiled op does, unless dtypes, shapes and numbers are those of exact_replicas."""
    _check_int64("load_E", load_E)
    _check_int64("slots_RS", slots_RS)
    if load_E.dim() != 1:
        way_out = "Pass the sum of the counts over the source ranks"
        raise RuntimeError(f"load_E.shape = {list(load_E.shape)}: it must be [E]. {way_out}")
    if slots_RS.dim() != 2 or slots_RS.shape[0] < 1:
        way_out = "Pass the slots of one layer, a row per rank"
        raise RuntimeError(
            f"slots_RS.shape = {list(slots_RS.shape)}: it must be [R, S] with at least one rank. {way_out}"
        )
    (num_experts,), (num_ranks, num_slots) = load_E.shape, slots_RS.shape
    if home_slots < 0 or home_slots > num_slots or home_slots * num_ranks != num_experts:
        rule = f"it must be E / R = {num_experts} / {num_ranks}, and at most S = {num_slots}"
        raise RuntimeError(f"home_slots = {home_slots}: {rule}. Pass the number of homes of a rank")
    if num_nodes < 1 or num_ranks % num_nodes != 0:
        way_out = "Pass the nodes that the ranks lie on"
        raise RuntimeError(f"num_nodes = {num_nodes}: it must divide R = {num_ranks}. {way_out}")
