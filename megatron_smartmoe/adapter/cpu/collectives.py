"""Facade group 3: the same collectives under gloo's rules.

NCCL's names and liberties become gloo's: the backend's name, split sizes that must be lists, lists of tensors that
must have equal shapes. What is sent, and in which order it is summed, stays as it was.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from megatron_smartmoe.adapter.cpu.devices import replace


def install() -> None:
    """Install every wrapper of this group, in `torch.distributed` and in the module that defines it."""
    wrappers = {
        "init_process_group": _init_process_group(dist.init_process_group),
        "new_group": _new_group(dist.new_group),
        "barrier": _barrier(dist.barrier),
        "all_to_all_single": _all_to_all_single(dist.all_to_all_single),
        "all_gather": _all_gather(dist.all_gather),
        "reduce_scatter": _reduce_scatter(dist.reduce_scatter),
    }
    replace(dist, **wrappers)
    replace(dist.distributed_c10d, **wrappers)


def _gloo_for_nccl(backend: str | None) -> str | None:
    return "gloo" if backend is not None and "nccl" in str(backend) else backend


def _init_process_group(call: Callable[..., Any]) -> Callable[..., Any]:
    """Backend nccl -> gloo; no device to bind the group to."""

    @functools.wraps(call)
    def init_process_group(backend: str | None = None, *args: Any, **kwargs: Any) -> None:
        kwargs.pop("device_id", None)
        call(_gloo_for_nccl(backend), *args, **kwargs)

    return init_process_group


def _new_group(call: Callable[..., Any]) -> Callable[..., Any]:
    """Backend nccl -> gloo; NCCL's `pg_options` (streams, CTAs) mean nothing to gloo."""

    @functools.wraps(call)
    def new_group(
        ranks: Any = None, timeout: Any = None, backend: Any = None, pg_options: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        kwargs.pop("device_id", None)
        return call(ranks, timeout, _gloo_for_nccl(backend), None, *args, **kwargs)

    return new_group


def _barrier(call: Callable[..., Any]) -> Callable[..., Any]:
    """`device_ids`, the GPU that NCCL uses for the barrier, is dropped."""

    @functools.wraps(call)
    def barrier(group: Any = None, async_op: bool = False, device_ids: Any = None) -> Any:
        return call(group=group, async_op=async_op)

    return barrier


def _all_to_all_single(call: Callable[..., Any]) -> Callable[..., Any]:
    """Split sizes must be lists of int.

    On a GPU Megatron's dispatcher copies them to the host as numpy arrays; a tensor that is on the host already is
    passed on as it is.
    """

    def as_list(sizes: Any) -> Any:
        return sizes.tolist() if isinstance(sizes, torch.Tensor) else sizes

    @functools.wraps(call)
    def all_to_all_single(
        output: Any, input: Any, output_split_sizes: Any = None, input_split_sizes: Any = None, *args: Any, **kw: Any
    ) -> Any:
        return call(output, input, as_list(output_split_sizes), as_list(input_split_sizes), *args, **kw)

    return all_to_all_single


def _same_shape(tensors: list[torch.Tensor]) -> bool:
    return len({tensor.shape for tensor in tensors}) == 1


def _members(group: Any) -> list[int]:
    return dist.get_process_group_ranks(group or dist.group.WORLD)


def _all_gather(call: Callable[..., Any]) -> Callable[..., Any]:
    """Unequal shapes: a broadcast from each member, as NCCL itself does."""

    @functools.wraps(call)
    def all_gather(tensor_list: Any, tensor: Any, group: Any = None, async_op: bool = False) -> Any:
        if _same_shape(tensor_list):
            return call(tensor_list, tensor, group=group, async_op=async_op)
        _refuse_async("all_gather", async_op)
        tensor_list[dist.get_rank(group)].copy_(tensor)
        for source, piece in zip(_members(group), tensor_list, strict=True):
            dist.broadcast(piece, source, group=group)
        return None

    return all_gather


def _reduce_scatter(call: Callable[..., Any]) -> Callable[..., Any]:
    """Unequal shapes: a reduce to each member, as NCCL itself does."""

    @functools.wraps(call)
    def reduce_scatter(
        output: Any, input_list: Any, op: Any = dist.ReduceOp.SUM, group: Any = None, async_op: bool = False
    ) -> Any:
        if _same_shape(input_list):
            return call(output, input_list, op=op, group=group, async_op=async_op)
        _refuse_async("reduce_scatter", async_op)
        me = dist.get_rank(group)
        for index, (target, piece) in enumerate(zip(_members(group), input_list, strict=True)):
            reduced = piece.clone()
            dist.reduce(reduced, target, op=op, group=group)
            if index == me:
                output.copy_(reduced)
        return None

    return reduce_scatter


def _refuse_async(name: str, async_op: bool) -> None:
    if async_op:
        raise NotImplementedError(f"asynchronous {name} of unequal shapes is not available on gloo")
