"""Argument checks of the torch twins.

The compiled kernels check for themselves, in csrc/checks.h, in the same order and with the same texts: torch.ops calls
them without passing through Python, and they must never read out of bounds. A test compares the two. Fake kernels check
nothing: what they let pass is refused when the op runs.
"""

from __future__ import annotations

import torch
from torch import Tensor

MAX_SLOTS = 2048  # kMaxSlots of csrc/checks.h
MAX_ROWS = 2**31 - 1  # kMaxRows: rows are int32
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_dispatch_map(ids_TK: Tensor, slot_of_E: Tensor, num_slots: int) -> None:
    """Raises RuntimeError, as the compiled op does, unless dtypes, shapes and numbers are those of dispatch_map."""
    for name, ids in (("ids_TK", ids_TK), ("slot_of_E", slot_of_E)):
        _check_dtype(name, ids, (torch.int32, torch.int64), "int32 or int64", f"Convert it with {name}.long()")
    _check_shape("ids_TK", ids_TK, ids_TK.dim() == 2, "[T, K_top]", "Pass a row of expert ids per token")
    _check_num_choices("ids_TK", ids_TK)
    ok = slot_of_E.dim() == 1 and slot_of_E.numel() >= 1
    _check_shape("slot_of_E", slot_of_E, ok, "[E] with at least one expert", "Pass the slot of each logical expert")
    way_out = "Pass the number of slots that slot_of_E points into"
    _require(1 <= num_slots <= MAX_SLOTS, f"num_slots = {num_slots}", f"be in 1..{MAX_SLOTS}", way_out)
    _check_device("slot_of_E", slot_of_E, "ids_TK", ids_TK)


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
    rule, way_out = f"float32, or {_dtype_name(y_NH)} as y_NH is", "Convert it with weights_TK.float()"
    _check_dtype("weights_TK", weights_TK, (torch.float32, y_NH.dtype), rule, way_out)
    rule = f"{list(rows_TK.shape)}, as rows_TK has it"
    _check_shape("weights_TK", weights_TK, weights_TK.shape == rows_TK.shape, rule, "Pass a weight per choice")
    _check_device("weights_TK", weights_TK, "y_NH", y_NH)


def check_unpermute_backward(grad_TH: Tensor, y_NH: Tensor, rows_TK: Tensor, weights_TK: Tensor) -> None:
    """Raises RuntimeError, as the compiled op does, unless dtypes and shapes are those of unpermute_backward."""
    check_unpermute(y_NH, rows_TK, weights_TK)
    rule, way_out = f"{_dtype_name(y_NH)}, as y_NH is", "Convert it with grad_TH.to(y_NH.dtype)"
    _check_dtype("grad_TH", grad_TH, (y_NH.dtype,), rule, way_out)
    expected = [rows_TK.shape[0], y_NH.shape[1]]
    rule = f"[T, H] = {expected}, as rows_TK and y_NH have it"
    _check_shape("grad_TH", grad_TH, list(grad_TH.shape) == expected, rule, "Pass the gradient of unpermute's result")
    _check_device("grad_TH", grad_TH, "y_NH", y_NH)


def check_swiglu(inner_NG: Tensor, probs_N: Tensor) -> None:
    """Raises RuntimeError, as the compiled op does, unless dtypes and shapes are those of swiglu."""
    _check_float("inner_NG", inner_NG)
    ok = inner_NG.dim() == 2 and inner_NG.shape[1] % 2 == 0
    _check_shape("inner_NG", inner_NG, ok, "[N, 2 F]", "Pass the gate's columns, then those of the linear part")
    field, rule = f"inner_NG.shape = {list(inner_NG.shape)}", f"have at most {MAX_ROWS} rows"
    _require(inner_NG.shape[0] <= MAX_ROWS, field, rule, "Split the micro-batch")
    rule, way_out = f"float32, or {_dtype_name(inner_NG)} as inner_NG is", "Convert it with probs_N.float()"
    _check_dtype("probs_N", probs_N, (torch.float32, inner_NG.dtype), rule, way_out)
    expected = [inner_NG.shape[0]]
    rule = f"[N] = {expected}, as inner_NG has it"
    _check_shape("probs_N", probs_N, list(probs_N.shape) == expected, rule, "Pass a probability per row")
    _check_device("probs_N", probs_N, "inner_NG", inner_NG)


def check_swiglu_backward(grad_NF: Tensor, inner_NG: Tensor, probs_N: Tensor) -> None:
    """Raises RuntimeError, as the compiled op does, unless dtypes and shapes are those of swiglu_backward."""
    check_swiglu(inner_NG, probs_N)
    rule, way_out = f"{_dtype_name(inner_NG)}, as inner_NG is", "Convert it with grad_NF.to(inner_NG.dtype)"
    _check_dtype("grad_NF", grad_NF, (inner_NG.dtype,), rule, way_out)
    expected = [inner_NG.shape[0], inner_NG.shape[1] // 2]
    rule = f"[N, F] = {expected}, as inner_NG has it"
    _check_shape("grad_NF", grad_NF, list(grad_NF.shape) == expected, rule, "Pass the gradient of swiglu's result")
    _check_device("grad_NF", grad_NF, "inner_NG", inner_NG)


def check_empty_groups(grad_SMK: Tensor, ends_S: Tensor) -> None:
    """Raises RuntimeError, as the compiled op does, unless dtypes and shapes are those of zero_empty_groups."""
    ok = grad_SMK.dim() == 3 and grad_SMK.is_contiguous()
    way_out = "Pass the gradient of the weights of all groups"
    _check_shape("grad_SMK", grad_SMK, ok, "[S, M, K], contiguous", way_out)
    _check_dtype("ends_S", ends_S, (torch.int32,), "int32", "Convert it with ends_S.int()")
    expected = [grad_SMK.shape[0]]
    rule = f"[S] = {expected}, as grad_SMK has it, contiguous"
    ok = list(ends_S.shape) == expected and ends_S.is_contiguous()
    _check_shape("ends_S", ends_S, ok, rule, "Pass where the rows of each group end")
    _check_device("ends_S", ends_S, "grad_SMK", grad_SMK)


def check_permute_weighted(x_TH: Tensor, weights_TK: Tensor, rows_TK: Tensor, num_rows: int) -> None:
    """Raises RuntimeError, as the compiled op does, unless dtypes and shapes are those of permute_weighted."""
    check_permute(x_TH, rows_TK, num_rows)
    _check_float("weights_TK", weights_TK)
    rule = f"{list(rows_TK.shape)}, as rows_TK has it"
    _check_shape("weights_TK", weights_TK, weights_TK.shape == rows_TK.shape, rule, "Pass a weight per choice")
    _check_device("weights_TK", weights_TK, "x_TH", x_TH)


def check_permute_joined(x_TH: Tensor, more_TH: Tensor, rows_TK: Tensor, num_rows: int) -> None:
    """Raises RuntimeError, as the compiled op does, unless dtypes, shapes and numbers are those of permute_joined."""
    _check_shape("x_TH", x_TH, x_TH.dim() == 2, "[T, H]", "Pass a row per token")
    rule, way_out = f"{_dtype_name(x_TH)}, as x_TH is", "Convert it with more_TH.to(x_TH.dtype)"
    _check_dtype("more_TH", more_TH, (x_TH.dtype,), rule, way_out)
    ok = more_TH.dim() == 2 and more_TH.shape[1] == x_TH.shape[1]
    rule = f"[T, H] with H = {x_TH.shape[1]}, as x_TH has it"
    _check_shape("more_TH", more_TH, ok, rule, "Pass rows of the same size")
    _check_device("more_TH", more_TH, "x_TH", x_TH)
    _check_rows(rows_TK, "x_TH", x_TH)
    num_tokens = x_TH.shape[0] + more_TH.shape[0]
    rule = f"[T, K_top] with T = {num_tokens}, as x_TH and more_TH have it"
    _check_shape("rows_TK", rows_TK, rows_TK.shape[0] == num_tokens, rule, "Pass the rows of the same tokens")
    _check_num_rows(num_rows)


def check_permute_packed(
    x_TH: Tensor,
    weights_TK: Tensor,
    more_TH: Tensor | None,
    more_weights_TK: Tensor | None,
    rows_TK: Tensor,
    num_rows: int,
) -> None:
    """Raises RuntimeError, as the compiled op does, unless dtypes, shapes and numbers are those of permute_packed."""
    both = (more_TH is None) == (more_weights_TK is None)
    _require(both, "more_TH, more_weights_TK: one is missing", "be both there or both None", "Pass the other one too")
    if more_TH is not None:
        check_permute_joined(x_TH, more_TH, rows_TK, num_rows)
    else:
        check_permute(x_TH, rows_TK, num_rows)
    _check_float("x_TH", x_TH)
    _check_float("weights_TK", weights_TK)
    _check_weights_of("weights_TK", weights_TK, "x_TH", x_TH, rows_TK)
    if more_TH is None or more_weights_TK is None:
        return
    rule, way_out = (
        f"{_dtype_name(weights_TK)}, as weights_TK is",
        "Convert it with more_weights_TK.to(weights_TK.dtype)",
    )
    _check_dtype("more_weights_TK", more_weights_TK, (weights_TK.dtype,), rule, way_out)
    _check_weights_of("more_weights_TK", more_weights_TK, "more_TH", more_TH, rows_TK)


def _check_weights_of(name: str, weights_TK: Tensor, rows_name: str, x_TH: Tensor, rows_TK: Tensor) -> None:
    expected = [x_TH.shape[0], rows_TK.shape[1]]
    rule = f"[T, K_top] = {expected}, as {rows_name} and rows_TK have it"
    _check_shape(name, weights_TK, list(weights_TK.shape) == expected, rule, "Pass a weight per choice")
    _check_device(name, weights_TK, "x_TH", x_TH)


def check_permute_weighted_backward(grad_NH: Tensor, grad_N: Tensor, rows_TK: Tensor) -> None:
    """Raises RuntimeError, as the compiled op does, unless dtypes and shapes are those of its gradient."""
    _check_float("grad_NH", grad_NH)
    _check_shape("grad_NH", grad_NH, grad_NH.dim() == 2, "[N, H]", "Pass the gradient of the permuted rows")
    _check_num_rows(grad_NH.shape[0])
    _check_rows(rows_TK, "grad_NH", grad_NH)
    _check_float("grad_N", grad_N)
    expected = [grad_NH.shape[0]]
    rule, way_out = f"[N] = {expected}, as grad_NH has it", "Pass the gradient of the permuted weights"
    _check_shape("grad_N", grad_N, list(grad_N.shape) == expected, rule, way_out)
    _check_device("grad_N", grad_N, "grad_NH", grad_NH)


def check_chosen_experts(routing_map_TE: Tensor, probs_TE: Tensor, top_k: int) -> None:
    """Raises RuntimeError, as the compiled op does, unless dtypes, shapes and numbers are those of chosen_experts."""
    way_out = "Convert it with routing_map_TE.bool()"
    _check_dtype("routing_map_TE", routing_map_TE, (torch.bool,), "bool", way_out)
    way_out = "Pass which experts each token chose"
    _check_shape("routing_map_TE", routing_map_TE, routing_map_TE.dim() == 2, "[T, E]", way_out)
    _check_num_choices("routing_map_TE", routing_map_TE)
    _check_float("probs_TE", probs_TE)
    rule = f"{list(routing_map_TE.shape)}, as routing_map_TE has it"
    ok = probs_TE.shape == routing_map_TE.shape
    _check_shape("probs_TE", probs_TE, ok, rule, "Pass a probability per token and expert")
    _check_device("probs_TE", probs_TE, "routing_map_TE", routing_map_TE)
    way_out = "Pass the number of experts that a token chooses"
    _require(1 <= top_k <= MAX_SLOTS, f"top_k = {top_k}", f"be in 1..{MAX_SLOTS}", way_out)


def check_chosen_experts_backward(grad_TK: Tensor, ids_TK: Tensor, num_experts: int) -> None:
    """Raises RuntimeError, as the compiled op does, unless dtypes, shapes and numbers are those of its gradient."""
    _check_float("grad_TK", grad_TK)
    _check_dtype("ids_TK", ids_TK, (torch.int32,), "int32", "Convert it with ids_TK.int()")
    _check_shape("ids_TK", ids_TK, ids_TK.dim() == 2, "[T, K_top]", "Pass the ids of chosen_experts")
    _check_num_choices("ids_TK", ids_TK)
    rule = f"{list(ids_TK.shape)}, as ids_TK has it"
    _check_shape("grad_TK", grad_TK, grad_TK.shape == ids_TK.shape, rule, "Pass the gradient of the weights")
    _check_device("grad_TK", grad_TK, "ids_TK", ids_TK)
    field = f"num_experts = {num_experts}"
    _require(0 <= num_experts <= MAX_ROWS, field, f"be in 0..{MAX_ROWS}", "Pass the number of experts")


def check_chunk_rows(counts_QS: Tensor, num_rows: int) -> None:
    """Raises RuntimeError, as the compiled op does, unless dtypes, shapes and numbers are those of chunk_rows."""
    _check_dtype("counts_QS", counts_QS, (torch.int64,), "int64", "Convert it to int64")
    way_out = "Pass the rows that arrive from each source for each slot"
    _check_shape("counts_QS", counts_QS, counts_QS.dim() == 2, "[Q, S]", way_out)
    _check_num_choices("counts_QS", counts_QS)
    _check_num_rows(num_rows)


def _require(ok: bool, field: str, rule: str, way_out: str) -> None:
    if not ok:
        raise RuntimeError(f"{field}: it must {rule}. {way_out}")


def _dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _check_dtype(name: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...], rule: str, way_out: str) -> None:
    _require(tensor.dtype in dtypes, f"{name}.dtype = {_dtype_name(tensor)}", f"be {rule}", way_out)


def _check_float(name: str, tensor: Tensor) -> None:
    _check_dtype(name, tensor, FLOATS, "float16, bfloat16, float32 or float64", f"Convert it with {name}.float()")


def _check_shape(name: str, tensor: Tensor, ok: bool, rule: str, way_out: str) -> None:
    _require(ok, f"{name}.shape = {list(tensor.shape)}", f"be {rule}", way_out)


def _check_device(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    rule, way_out = f"be {other.device}, as {other_name} has it", f"Convert it with {name}.to({other_name}.device)"
    _require(tensor.device == other.device, f"{name}.device = {tensor.device}", rule, way_out)


def _check_num_choices(name: str, tensor: Tensor) -> None:
    rule = f"have at most {MAX_ROWS} choices"
    _require(tensor.numel() <= MAX_ROWS, f"{name}.shape = {list(tensor.shape)}", rule, "Split the micro-batch")


def _check_rows(rows_TK: Tensor, name: str, tensor: Tensor) -> None:
    """Checks the rows of dispatch_map, which must lie on the device of the rows or tokens `tensor`."""
    way_out = "Pass the rows of dispatch_map, or convert it with rows_TK.int()"
    _check_dtype("rows_TK", rows_TK, (torch.int32,), "int32", way_out)
    _check_shape("rows_TK", rows_TK, rows_TK.dim() == 2, "[T, K_top]", "Pass the rows of dispatch_map")
    _check_num_choices("rows_TK", rows_TK)
    _check_device("rows_TK", rows_TK, name, tensor)


def _check_num_rows(num_rows: int) -> None:
    way_out = "Pass the sum of dispatch_map's tokens_S, or any larger number"
    _require(0 <= num_rows <= MAX_ROWS, f"num_rows = {num_rows}", f"be in 0..{MAX_ROWS}", way_out)
