"""A package that stands for DeepEP 1.2.1 and HybridEP on CPU ranks: what their buffers do, over gloo.

Semantics only: no GPU, no streams, no speed. Megatron's flex dispatcher, its managers and its autograd functions are
the real ones and call it through the packages' own names. Signatures are those of `deep_ep.Buffer` in DeepEP v1.2.1
(deep_ep/buffer.py) and of `HybridEPBuffer` as Megatron calls it.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from tests.support.ranks import run_ranks
from tests.support.training import TINY_MODEL, TINY_TRAINING, losses

_REBOUND = "fused_dispatch fused_combine set_deepep_num_sms hybrid_ep_dispatch hybrid_ep_combine".split()


def train_with_deep_ep(
    run_dir: Path, world_size: int, data_flags: list[str], *flags: str, iterations: int
) -> list[float]:
    """Do what `training.train` does, where DeepEP and HybridEP seem to be installed."""
    argv = [*TINY_MODEL, *TINY_TRAINING, *data_flags, "--train-iters", str(iterations), *flags]
    run_ranks(_main, world_size, [*argv, "--smartmoe-run-dir", str(run_dir)], log_dir=run_dir / "ranks")
    return losses(run_dir)


def _main(argv: list[str]) -> None:
    from megatron.core.transformer.moe import fused_a2a, token_dispatcher

    from megatron_smartmoe.adapter.pretrain import main

    package, utils = ModuleType("deep_ep"), ModuleType("deep_ep.utils")
    vars(package).update(Buffer=Buffer, HybridEPBuffer=HybridEPBuffer)
    vars(utils).update(EventHandle=EventHandle, EventOverlap=EventOverlap)
    with mock.patch.dict(sys.modules, {"deep_ep": package, "deep_ep.utils": utils}):
        importlib.reload(fused_a2a)
    with mock.patch.multiple(token_dispatcher, **{name: getattr(fused_a2a, name) for name in _REBOUND}):
        main(argv)


class EventHandle:
    """An event: there are no streams here."""


class EventOverlap:
    """An event that has come already."""

    def __init__(self, event: EventHandle | None = None) -> None:
        self.event = event

    def current_stream_wait(self) -> None:
        """Everything is done when it returns."""


def _exchange(rows: Tensor, sent_R: list[int], group: dist.ProcessGroup) -> tuple[Tensor, list[int]]:
    """Send rows, sorted by target, and return what arrives, by source, and the rows from each."""
    sizes = torch.tensor(sent_R)
    received = torch.empty_like(sizes)
    dist.all_to_all_single(received, sizes, group=group)
    arrived = rows.new_empty((int(received.sum()), *rows.shape[1:]))
    dist.all_to_all_single(arrived, rows.contiguous(), received.tolist(), sent_R, group=group)
    return arrived, received.tolist()


def _rows_of(goes_TR: Tensor) -> tuple[Tensor, list[int]]:
    """The tokens to send, by target rank, then token, and how many go to each."""
    return goes_TR.T.nonzero()[:, 1], goes_TR.sum(dim=0).tolist()


class Buffer:
    """DeepEP's: a token goes to a rank once, with the experts that it chose there."""

    num_sms = 20

    def __init__(self, group: dist.ProcessGroup, num_nvl_bytes: int = 0, num_rdma_bytes: int = 0) -> None:
        self.group, self.num_nvl_bytes, self.num_rdma_bytes = group, num_nvl_bytes, num_rdma_bytes

    @staticmethod
    def set_num_sms(new_num_sms: int) -> None:
        """Only even numbers, as DeepEP wants."""
        assert new_num_sms % 2 == 0
        Buffer.num_sms = new_num_sms

    @staticmethod
    def get_dispatch_config(num_ranks: int) -> Any:
        """Sizes that nobody here needs."""
        return SimpleNamespace(
            get_nvl_buffer_size_hint=lambda hidden_bytes, ranks: hidden_bytes * ranks,
            get_rdma_buffer_size_hint=lambda hidden_bytes, ranks: 0,
        )

    get_combine_config = get_dispatch_config

    def get_dispatch_layout(
        self,
        topk_idx: Tensor,
        num_experts: int,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[Tensor, None, Tensor, Tensor, EventOverlap]:
        """Tokens for each rank and expert, and which rank a token goes to."""
        assert topk_idx.dtype == torch.int64
        assert topk_idx.is_contiguous()
        assert num_experts % self.group.size() == 0
        chosen = torch.zeros(len(topk_idx), num_experts + 1, dtype=torch.bool)
        chosen = chosen.scatter(1, topk_idx.where(topk_idx >= 0, num_experts), True)[:, :-1]
        goes_TR = chosen.view(len(topk_idx), self.group.size(), -1).any(dim=2)
        return goes_TR.sum(0).int(), None, chosen.sum(0).int(), goes_TR, EventOverlap()

    def dispatch(
        self,
        x: Tensor,
        handle: Any = None,
        num_tokens_per_rank: Tensor | None = None,
        num_tokens_per_rdma_rank: Tensor | None = None,
        is_token_in_rank: Tensor | None = None,
        num_tokens_per_expert: Tensor | None = None,
        topk_idx: Tensor | None = None,
        topk_weights: Tensor | None = None,
        expert_alignment: int = 1,
        num_worst_tokens: int = 0,
        config: Any = None,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[Tensor, Tensor | None, Tensor | None, list[int] | None, Any, EventOverlap]:
        """Rows of all sources; experts of this rank are numbered from 0, others are -1."""
        if handle is not None:
            assert topk_idx is None
            assert topk_weights is None
            token_N, sent_R, _, _ = handle
            return _exchange(x[token_N], sent_R, self.group)[0], None, None, None, None, EventOverlap()
        assert topk_idx is not None
        assert topk_weights is not None
        assert num_tokens_per_expert is not None
        assert is_token_in_rank is not None
        assert topk_weights.dtype == torch.float32
        token_N, sent_R = _rows_of(is_token_in_rank)
        rows, received_R = _exchange(x[token_N], sent_R, self.group)
        local = len(num_tokens_per_expert) // self.group.size()
        ids, _ = _exchange(topk_idx[token_N], sent_R, self.group)
        weights, _ = _exchange(topk_weights[token_N], sent_R, self.group)
        ids = ids - self.group.rank() * local
        ids = ids.where((ids >= 0) & (ids < local), -1)
        weights = weights.where(ids >= 0, 0)
        counts = torch.bincount(ids[ids >= 0], minlength=local).tolist()
        return rows, ids, weights, counts, (token_N, sent_R, received_R, len(x)), EventOverlap()

    def combine(
        self,
        x: Tensor,
        handle: Any,
        topk_weights: Tensor | None = None,
        bias: Any = None,
        config: Any = None,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[Tensor, Tensor | None, EventOverlap]:
        """Each token's rows, added up; and its weights."""
        token_N, _, received_R, num_tokens = handle

        def back(rows: Tensor) -> Tensor:
            arrived, _ = _exchange(rows, received_R, self.group)
            return rows.new_zeros(num_tokens, rows.shape[1]).index_add_(0, token_N, arrived)

        return back(x), None if topk_weights is None else back(topk_weights), EventOverlap()


class HybridEPBuffer:
    """HybridEP's: rows arrive sorted by expert, a row for each choice."""

    def __init__(
        self,
        group: dist.ProcessGroup,
        hidden_dim: int,
        max_num_of_tokens_per_rank: int,
        num_local_experts: int,
        use_fp8: bool = False,
        num_sms_dispatch_api: int | None = None,
        num_sms_combine_api: int | None = None,
        num_blocks_permute: int | None = None,
        num_blocks_unpermute: int | None = None,
        num_sms_preprocessing_api: int = 108,
    ) -> None:
        assert num_local_experts * group.size() % 4 == 0  # its kernels read that many floats as vectors
        self.group = group

    def dispatch_with_permute(
        self,
        *,
        hidden: Tensor,
        routing_map: Tensor | None = None,
        probs: Tensor | None = None,
        scaling_factor: Tensor | None = None,
        num_of_experts_per_rank: int | None = None,
        pad_multiple: int | None = None,
        num_permuted_tokens: int | None = None,
        non_blocking: bool = False,
        handle: Any = None,
    ) -> tuple[Tensor, Tensor | None, None, Tensor | None, Any]:
        """Rows sorted by expert, then source, then token."""
        weights, tokens_S = None, None
        if handle is None:
            assert routing_map is not None
            assert routing_map.dtype == torch.bool
            assert num_of_experts_per_rank is not None
            expert_N, token_N = routing_map.T.nonzero(as_tuple=True)
            sent_R = routing_map.view(len(hidden), self.group.size(), -1).sum(dim=(0, 2)).tolist()
            experts, received_R = _exchange(expert_N, sent_R, self.group)
            order_N = torch.argsort(experts, stable=True)
            tokens_S = torch.bincount(experts % num_of_experts_per_rank, minlength=num_of_experts_per_rank)
            handle = (token_N, expert_N, sent_R, received_R, order_N, routing_map.shape)
        token_N, expert_N, sent_R, _, order_N, _ = handle
        if probs is not None:
            assert probs.dtype == torch.float32
            weights = _exchange(probs[token_N, expert_N], sent_R, self.group)[0][order_N]
        rows = _exchange(hidden[token_N], sent_R, self.group)[0][order_N]
        assert num_permuted_tokens is None or len(rows) == num_permuted_tokens, "rows that do not fit"
        return rows, weights, None, tokens_S, handle

    def combine_with_unpermute(
        self, *, hidden: Tensor, probs: Tensor | None = None, handle: Any = None, pad_multiple: int | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Each token's rows, added up; and its weights by expert."""
        token_N, expert_N, _, received_R, order_N, shape = handle
        arrived = _exchange(torch.empty_like(hidden).index_copy_(0, order_N, hidden), received_R, self.group)[0]
        combined = hidden.new_zeros(shape[0], hidden.shape[1]).index_add_(0, token_N, arrived)
        if probs is None:
            return combined, None
        weights = _exchange(torch.empty_like(probs).index_copy_(0, order_N, probs), received_R, self.group)[0]
        wide = probs.new_zeros(shape)
        wide[token_N, expert_N] = weights
        return combined, wide
