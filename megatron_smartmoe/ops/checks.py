"""Argument checks of the torch twins and the fake kernels.

The compiled kernels check for themselves, in csrc/checks.h, with the same rules and texts: torch.ops reaches them past
everything written in Python, and they must never read out of bounds. A test compares the two.
"""

from __future__ import annotations

import torch
from torch import Tensor

MAX_EXPERTS = 4096  # kMaxExperts of csrc/checks.h
MAX_SLOTS = 2048  # kMaxSlots
MAX_ROWS = 2**31 - 1  # kMaxRows: rows are int32
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def _dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def check_ids(ids: Tensor, name: str = "ids") -> None:
    """Raises RuntimeError, as the compiled op does, unless ids is int32 or int64."""
    if ids.dtype not in (torch.int32, torch.int64):
        way_out = f"Convert it with {name}.long()"
        raise RuntimeError(f"{name}.dtype = {_dtype_name(ids)}: it must be int32 or int64. {way_out}")


def check_num_experts(num_experts: int) -> None:
    """Raises RuntimeError, as the compiled op does, unless num_experts is in 1..MAX_EXPERTS."""
    if not 1 <= num_experts <= MAX_EXPERTS:
        way_out = "Pass the number of logical experts of the layer"
        raise RuntimeError(f"num_experts = {num_experts}: it must be in 1..{MAX_EXPERTS}. {way_out}")


def _check_int64(name: str, tensor: Tensor) -> None:
    if tensor.dtype != torch.int64:
        way_out = f"Convert it with {name}.long()"
        raise RuntimeError(f"{name}.dtype = {_dtype_name(tensor)}: it must be int64. {way_out}")


def check_split(counts_RE: Tensor, hosts_ER: Tensor) -> None:
    """Raises RuntimeError, as the compiled op does, unless the dtypes and shapes are those of min_max_split."""
    _check_int64("counts_RE", counts_RE)
    if hosts_ER.dtype != torch.bool:
        way_out = "Convert it with hosts_ER.bool()"
        raise RuntimeError(f"hosts_ER.dtype = {_dtype_name(hosts_ER)}: it must be bool. {way_out}")
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


def _check_shape(name: str, tensor: Tensor, ok: bool, rule: str, way_out: str) -> None:
    if not ok:
        raise RuntimeError(f"{name}.shape = {list(tensor.shape)}: it must be {rule}. {way_out}")


def _check_device(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    if tensor.device != other.device:
        rule = f"it must be {other.device}, as {other_name} has it"
        way_out = f"Convert it with {name}.to({other_name}.device)"
        raise RuntimeError(f"{name}.device = {tensor.device}: {rule}. {way_out}")


def _check_num_choices(name: str, tensor: Tensor) -> None:
    if tensor.numel() > MAX_ROWS:
        rule = f"it must have at most {MAX_ROWS} choices"
        raise RuntimeError(f"{name}.shape = {list(tensor.shape)}: {rule}. Split the micro-batch")


def check_dispatch_map(ids_TK: Tensor, slot_of_E: Tensor, num_slots: int) -> None:
    """Raises RuntimeError, as the compiled op does, unless dtypes, shapes and numbers are those of dispatch_map."""
    check_ids(ids_TK, "ids_TK")
    check_ids(slot_of_E, "slot_of_E")
    _check_shape("ids_TK", ids_TK, ids_TK.dim() == 2, "[T, K_top]", "Pass a row of expert ids per token")
    _check_num_choices("ids_TK", ids_TK)
    ok = slot_of_E.dim() == 1 and slot_of_E.numel() >= 1
    _check_shape("slot_of_E", slot_of_E, ok, "[E] with at least one expert", "Pass the slot of each logical expert")
    if not 1 <= num_slots <= MAX_SLOTS:
        way_out = "Pass the number of slots that slot_of_E points into"
        raise RuntimeError(f"num_slots = {num_slots}: it must be in 1..{MAX_SLOTS}. {way_out}")
    _check_device("slot_of_E", slot_of_E, "ids_TK", ids_TK)


def _check_rows(rows_TK: Tensor, name: str, tensor: Tensor) -> None:
    """The map of dispatch_map, beside the rows or tokens `tensor` that it is used on."""
    if rows_TK.dtype != torch.int32:
        way_out = "Pass the rows of dispatch_map, or convert it with rows_TK.int()"
        raise RuntimeError(f"rows_TK.dtype = {_dtype_name(rows_TK)}: it must be int32. {way_out}")
    _check_shape("rows_TK", rows_TK, rows_TK.dim() == 2, "[T, K_top]", "Pass the rows of dispatch_map")
    _check_num_choices("rows_TK", rows_TK)
    _check_device("rows_TK", rows_TK, name, tensor)


def _check_num_rows(num_rows: int) -> None:
    if not 0 <= num_rows <= MAX_ROWS:
        way_out = "Pass the sum of dispatch_map's tokens_S, or any larger number"
        raise RuntimeError(f"num_rows = {num_rows}: it must be in 0..{MAX_ROWS}. {way_out}")


def _check_float(name: str, tensor: Tensor) -> None:
    if tensor.dtype not in FLOATS:
        rule = "it must be float16, bfloat16, float32 or float64"
        raise RuntimeError(f"{name}.dtype = {_dtype_name(tensor)}: {rule}. Convert it with {name}.float()")


def check_permute(x_TH: Tensor, rows_TK: Tensor, num_rows: int) -> None:
    """Raises RuntimeError, as the compiled op does, unless dtypes, shapes and numbers are those of permute."""
    _check_shape("x_TH", x_TH, x_TH.dim() == 2, "[T, H]", "Pass a row per token")
    _check_rows(rows_TK, "x_TH", x_TH)
    num_tokens = x_TH.shape[0]
    rule = f"[T, K_top] with T = {num_tokens}, as x_TH has it"
    _check_shape("rows_TK", rows_TK, rows_TK.shape[0] == num_tokens, rule, "Pass the rows of the same tokens")
    _check_num_rows(num_rows)


def check_unpermute(y_NH: Tensor, rows_TK: Tensor, weights_TK: Tensor | None) -> None:
    """Raises RuntimeError, as the compiled op does, unless dtypes and shapes are those of unpermute."""
    _check_float("y_NH", y_NH)
    _check_shape("y_NH", y_NH, y_NH.dim() == 2, "[N, H]", "Pass the permuted rows")
    _check_num_rows(y_NH.shape[0])
    _check_rows(rows_TK, "y_NH", y_NH)
    if weights_TK is None:
        return
    if weights_TK.dtype not in (torch.float32, y_NH.dtype):
        rule = f"it must be float32, or {_dtype_name(y_NH)} as y_NH is"
        way_out = "Convert it with weights_TK.float()"
        raise RuntimeError(f"weights_TK.dtype = {_dtype_name(weights_TK)}: {rule}. {way_out}")
    rule = f"{list(rows_TK.shape)}, as rows_TK has it"
    _check_shape("weights_TK", weights_TK, weights_TK.shape == rows_TK.shape, rule, "Pass a weight per choice")
    _check_device("weights_TK", weights_TK, "y_NH", y_NH)


def check_unpermute_backward(grad_TH: Tensor, y_NH: Tensor, rows_TK: Tensor, weights_TK: Tensor) -> None:
    """Raises RuntimeError, as the compiled op does, unless dtypes and shapes are those of unpermute_backward."""
    check_unpermute(y_NH, rows_TK, weights_TK)
    if grad_TH.dtype != y_NH.dtype:
        rule = f"it must be {_dtype_name(y_NH)}, as y_NH is"
        way_out = "Convert it with grad_TH.to(y_NH.dtype)"
        raise RuntimeError(f"grad_TH.dtype = {_dtype_name(grad_TH)}: {rule}. {way_out}")
    expected = [rows_TK.shape[0], y_NH.shape[1]]
    rule = f"[T, H] = {expected}, as rows_TK and y_NH have it"
    _check_shape("grad_TH", grad_TH, list(grad_TH.shape) == expected, rule, "Pass the gradient of unpermute's result")
    _check_device("grad_TH", grad_TH, "y_NH", y_NH)
