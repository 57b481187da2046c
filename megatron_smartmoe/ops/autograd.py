"""Gradients of the ops that have one, in the form that torch.library.register_autograd takes, by the op's name.

permute and unpermute are each other's gradient. Only a weighted unpermute needs an op of its own, which reads each row
once for both gradients. Sums over a token's choices go in the order of the choices here as well, so a gradient does not
depend on where the experts live.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_smartmoe.ops import packed


def _save_permute(ctx: Any, inputs: tuple[Tensor, Tensor, int], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])


def _permute_backward(ctx: Any, grad_NH: Tensor) -> tuple[Tensor, None, None]:
    (rows_TK,) = ctx.saved_tensors
    return torch.ops.smartmoe.unpermute(grad_NH, rows_TK, None), None, None


def _save_unpermute(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:
    y_NH, rows_TK, weights_TK = inputs
    ctx.num_rows = y_NH.shape[0]
    # without weights the gradient needs no row of y_NH: the activations are not kept alive
    ctx.save_for_backward(*((rows_TK,) if weights_TK is None else (rows_TK, y_NH, weights_TK)))


def _unpermute_backward(ctx: Any, grad_TH: Tensor) -> tuple[Tensor, None, Tensor | None]:
    rows_TK, *weighted = ctx.saved_tensors
    if not weighted:
        return torch.ops.smartmoe.permute(grad_TH, rows_TK, ctx.num_rows), None, None
    y_NH, weights_TK = weighted
    grad_NH, grad_TK = torch.ops.smartmoe.unpermute_backward(grad_TH, y_NH, rows_TK, weights_TK)
    return grad_NH, None, grad_TK


def _save_swiglu(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _swiglu_backward(ctx: Any, grad_NF: Tensor) -> tuple[Tensor, Tensor]:
    grads: tuple[Tensor, Tensor] = torch.ops.smartmoe.swiglu_backward(grad_NF, *ctx.saved_tensors)
    return grads


def _save_permute_weighted(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, int], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(inputs[2])


def _permute_weighted_backward(ctx: Any, grad_NH: Tensor, grad_N: Tensor) -> tuple[Tensor, Tensor, None, None]:
    (rows_TK,) = ctx.saved_tensors
    grad_TH, grad_TK = torch.ops.smartmoe.permute_weighted_backward(grad_NH, grad_N, rows_TK)
    return grad_TH, grad_TK, None, None


def _save_permute_packed(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x_TH, weights_TK, _, _, rows_TK, _ = inputs
    ctx.num_tokens, ctx.parts = x_TH.shape[0], (x_TH.shape[1], weights_TK.dtype)
    ctx.save_for_backward(rows_TK)


def _permute_packed_backward(ctx: Any, grad_NP: Tensor) -> tuple[Tensor | None, ...]:
    (rows_TK,) = ctx.saved_tensors
    grads = torch.ops.smartmoe.permute_weighted_backward(*packed.views(grad_NP, *ctx.parts), rows_TK)
    if ctx.num_tokens == rows_TK.shape[0]:
        return *grads, None, None, None, None
    (grad_TH, more_TH), (grad_TK, more_TK) = (each.tensor_split([ctx.num_tokens]) for each in grads)
    return grad_TH, grad_TK, more_TH, more_TK, None, None


def _save_chosen_experts(ctx: Any, inputs: tuple[Tensor, Tensor, int], output: tuple[Tensor, Tensor]) -> None:
    ctx.num_experts = inputs[0].shape[1]
    ctx.save_for_backward(output[0])
    ctx.mark_non_differentiable(output[0])


def _chosen_experts_backward(ctx: Any, _: None, grad_TK: Tensor) -> tuple[None, Tensor, None]:
    (ids_TK,) = ctx.saved_tensors
    return None, torch.ops.smartmoe.chosen_experts_backward(grad_TK, ids_TK, ctx.num_experts), None


FORMULAS = {
    "permute": (_permute_backward, _save_permute),
    "unpermute": (_unpermute_backward, _save_unpermute),
    "swiglu": (_swiglu_backward, _save_swiglu),
    "permute_weighted": (_permute_weighted_backward, _save_permute_weighted),
    "permute_packed": (_permute_packed_backward, _save_permute_packed),
    "chosen_experts": (_chosen_experts_backward, _save_chosen_experts),
}
