"""Adam where neither TransformerEngine nor apex is installed, in plain torch.

Megatron then falls back to `torch.optim.AdamW`, which keeps a `step` tensor per parameter. The distributed optimizer
supports two shapes of state only, one of them with `step` in the parameter group, and cannot load a checkpoint that it
saved with AdamW (`KeyError: 'step'`). This Adam has the same update and the state of apex's FusedAdam, so that
checkpoints work, on CPU and GPU alike, and are interchangeable with runs that have FusedAdam.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

type Tensors = list[torch.Tensor]


class TorchAdam(torch.optim.Optimizer):
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019) over torch's multi-tensor ops.

    Args:
        params: parameters or parameter groups, as for any torch optimizer.
        lr: learning rate.
        bias_correction: divide the moments by 1 - beta^t (Kingma and Ba 2015, algorithm 1).
        betas: decay of the two moments, per step.
        eps: added to the root of the second moment.
        adam_w_mode: weight decay is decoupled from the gradient; False adds it to the gradient.
        weight_decay: per step, times `lr` in adam_w_mode.
        capturable: must be False; CUDA graphs of the optimizer need FusedAdam.

    Raises:
        ValueError: `capturable` is True.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        adam_w_mode: bool = True,
        weight_decay: float = 0.0,
        capturable: bool = False,
    ) -> None:
        if capturable:
            raise ValueError("--optimizer-cuda-graph needs FusedAdam: install TransformerEngine or apex")
        defaults = {
            "lr": lr,
            "bias_correction": bias_correction,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
        }
        super().__init__(params, defaults)
        self.adam_w_mode = adam_w_mode

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient, in place."""
        loss = closure() if closure is not None else None
        for group in self.param_groups:
            if group["params"]:
                group["step"] = group.get("step", 0) + 1
                self._step_group(group)
        return loss

    def _step_group(self, group: dict[str, Any]) -> None:
        """Update a group's parameters that have a gradient, with state made at their first step."""
        params = [p for p in group["params"] if p.grad is not None]
        if not params:
            return
        for p in params:
            if not self.state[p]:
                self.state[p].update(exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
        grads = [p.grad for p in params]
        exp_avgs = [self.state[p]["exp_avg"] for p in params]
        exp_avg_sqs = [self.state[p]["exp_avg_sq"] for p in params]
        if _is_fusible(params, grads, exp_avgs, exp_avg_sqs) and group["bias_correction"]:
            self._step_fused(group, params, grads, exp_avgs, exp_avg_sqs)
        else:
            self._step_by_passes(group, params, grads, exp_avgs, exp_avg_sqs)

    def _step_fused(self, group: dict[str, Any], params: Tensors, grads: Tensors, ms: Tensors, vs: Tensors) -> None:
        """torch's own kernel, which reads and writes everything once and needs no memory beside it."""
        filled = [i for i, p in enumerate(params) if p.numel() > 0]
        if not filled:
            return
        params, grads, ms, vs = ([tensors[i] for i in filled] for tensors in (params, grads, ms, vs))
        beta1, beta2 = group["betas"]
        step = torch.full((), float(group["step"]), device=params[0].device)  # the kernel reads it and leaves it
        kernel = torch._fused_adamw_ if self.adam_w_mode else torch._fused_adam_
        kernel(
            params,
            grads,
            ms,
            vs,
            [],
            [step] * len(params),
            lr=group["lr"],
            beta1=beta1,
            beta2=beta2,
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            amsgrad=False,
            maximize=False,
        )

    def _step_by_passes(
        self, group: dict[str, Any], params: Tensors, grads: Tensors, exp_avgs: Tensors, exp_avg_sqs: Tensors
    ) -> None:
        """On the CPU, and for types that the kernel does not take: the same update in passes over all tensors."""
        beta1, beta2 = group["betas"]
        lr, decay, step = group["lr"], group["weight_decay"], group["step"]
        # Step 1: weight decay, on the parameters (AdamW) or as a part of the gradient (Adam with L2)
        if decay and self.adam_w_mode:
            torch._foreach_mul_(params, 1 - lr * decay)
        elif decay:
            grads = list(torch._foreach_add(grads, params, alpha=decay))
        # Step 2: the moments, m = beta1 m + (1 - beta1) g and v = beta2 v + (1 - beta2) g^2
        torch._foreach_lerp_(exp_avgs, grads, 1 - beta1)
        torch._foreach_mul_(exp_avg_sqs, beta2)
        torch._foreach_addcmul_(exp_avg_sqs, grads, grads, 1 - beta2)
        # Step 3: p = p - lr m' / (sqrt(v') + eps), with m' = m / correction1 and v' = v / correction2
        correction1, correction2 = (1 - beta1**step, 1 - beta2**step) if group["bias_correction"] else (1.0, 1.0)
        denominators = torch._foreach_sqrt(exp_avg_sqs)
        torch._foreach_div_(denominators, correction2**0.5)
        torch._foreach_add_(denominators, group["eps"])
        torch._foreach_addcdiv_(params, exp_avgs, denominators, -lr / correction1)


def _is_fusible(*lists: Tensors) -> bool:
    """Whether all tensors are what torch's fused kernel takes: on one GPU, of one type."""
    tensors = [tensor for tensors in lists for tensor in tensors]
    return all(t.is_cuda for t in tensors) and len({(t.device, t.dtype) for t in tensors}) == 1
