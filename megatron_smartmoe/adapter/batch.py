"""What Megatron asks of an entry script: the forward step, and which pipeline stages hold the word embedding.

The forward step brings a micro-batch to its ranks, through the model, to a loss. It does what Megatron's
`pretrain_gpt.py` does for pretraining (that file is not in the wheel), on Megatron's own helpers for broadcasting over
tensor-parallel ranks and splitting over context-parallel ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from megatron.core import mpu
from megatron.core.models.gpt import GPTModel
from megatron.core.rerun_state_machine import get_rerun_state_machine
from megatron.core.transformer.multi_token_prediction import get_mtp_ranks, mtp_on_this_rank
from megatron.core.utils import (
    get_attr_wrapped_model,
    get_batch_on_this_cp_rank,
    get_batch_on_this_tp_rank,
    get_model_config,
)
from megatron.training import get_args, get_timers
from megatron.training.argument_utils import core_transformer_config_from_args
from megatron.training.utils import is_first_or_last_pipeline_stage

Batch = dict[str, torch.Tensor | None]
LossFunction = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]]

_FIELDS = ("tokens", "labels", "loss_mask", "position_ids", "attention_mask")
# Megatron's helpers look these up too; packed sequences are refused at start-up (flags/megatron_checks.py).
_ABSENT = ("cu_seqlens", "cu_seqlens_padded", "max_seqlen", "local_cp_size", "hybrid_cp_group")

SPIKY_LOSS_FACTOR = 10  # a loss this many times the largest so far is reported; Megatron's pretrain_gpt.py has 10 too


def embedding_ranks(pp_ranks: list[int]) -> list[int]:
    """Ranks of one pipeline group with the embedding: the first, the last when it is tied, and those of MTP layers."""
    ranks = {pp_ranks[0]}
    if len(pp_ranks) > 1:
        args = get_args()
        if not args.untie_embeddings_and_output_weights:
            ranks.add(pp_ranks[-1])
        ranks.update(get_mtp_ranks(pp_ranks, core_transformer_config_from_args(args)))
    return sorted(ranks)


def get_batch(data_iterator: Iterator[Batch], model: GPTModel) -> Batch:
    """This rank's part of the next micro-batch.

    Returns:
        `tokens`, `labels`, `position_ids` int64 and `loss_mask` float `[micro_batch, seq / CP]`, each None where this
        pipeline stage does not need it.
    """
    args, config = get_args(), get_model_config(model)
    vp_stage = get_attr_wrapped_model(model, "vp_stage")
    has_mtp = mtp_on_this_rank(config.pipeline_model_parallel_layout, config.mtp_num_layers, False, vp_stage)
    if not is_first_or_last_pipeline_stage(vp_stage) and not has_mtp:
        return dict.fromkeys(_FIELDS)
    tp_rank = mpu.get_tensor_model_parallel_rank()
    batch: Batch = {}
    if tp_rank == 0:  # the data loader runs on the first tensor-parallel rank only
        loaded = next(data_iterator)
        batch = dict.fromkeys((*_FIELDS, *_ABSENT))
        for key in _FIELDS:
            if (tensor := loaded.get(key)) is not None:
                batch[key] = tensor.cuda(non_blocking=True)
    batch = get_batch_on_this_tp_rank(
        batch,
        has_cu_seqlens=False,
        is_hybrid_cp=False,
        create_attention_mask_in_dataloader=args.create_attention_mask_in_dataloader,
        broadcast_src_rank=mpu.get_tensor_model_parallel_src_rank(),
        broadcast_group=mpu.get_tensor_model_parallel_group(),
        cp_size=args.context_parallel_size,
        tp_rank=tp_rank,
        micro_batch_size=args.micro_batch_size if model.training else args.eval_micro_batch_size,
        seq_length=args.seq_length,
        mtp_on_this_rank=has_mtp,
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        is_pipeline_first_stage=mpu.is_pipeline_first_stage(),
        is_pipeline_last_stage=mpu.is_pipeline_last_stage(),
    )
    batch = get_batch_on_this_cp_rank(batch, is_hybrid_cp=False, cp_group=mpu.get_context_parallel_group())
    return batch


def loss_func(
    loss_mask: torch.Tensor | None, output: torch.Tensor, model: GPTModel | None = None
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Sum of the per-token losses, the number of tokens in it, and both for the log.

    Args:
        loss_mask: `[micro_batch, seq]`, 1 where a token counts; there on the stages that compute a loss.
        output: per-token losses of the same shape.
        model: unused; Megatron's hook for distillation.
    """
    assert loss_mask is not None, "the last pipeline stage reads the loss mask"
    losses, mask = output.view(-1).float(), loss_mask.view(-1).float()
    loss = torch.sum(losses * mask)
    num_tokens = mask.sum().detach().to(torch.int)
    _validate(loss)
    return loss, num_tokens, {"lm loss": torch.cat([loss.detach().view(1), num_tokens.view(1)])}


def _validate(loss: torch.Tensor) -> None:
    """Hand the loss to Megatron's re-run machine, which stops (or re-runs) on NaN, infinity and spikes as flagged."""
    args, machine = get_args(), get_rerun_state_machine()
    if args.check_for_nan_in_loss_and_grad:
        for name, is_bad in (("NaN", torch.isnan), ("Inf", torch.isinf)):
            machine.validate_result(
                result=loss,
                rejection_func=is_bad,
                message=f"found {name} in local forward loss calculation",
                tolerance=0.0,  # the forward pass is deterministic
                fatal=True,
            )
    if args.check_for_spiky_loss:
        machine.validate_result(
            result=loss,
            rejection_func=partial(machine.is_unexpectedly_large, threshold=SPIKY_LOSS_FACTOR, context="loss"),
            message="Spiky loss",
            tolerance=0.0,
            fatal=False,
        )


def forward_step(
    data_iterator: Iterator[Batch], model: GPTModel, return_schedule_plan: bool = False
) -> tuple[Any, LossFunction]:
    """One micro-batch through the model; `return_schedule_plan` is asked by --overlap-moe-expert-parallel-comm."""
    timers = get_timers()
    timers("batch-generator", log_level=2).start()
    batch = get_batch(data_iterator, model)
    timers("batch-generator").stop()
    inputs = (batch["tokens"], batch["position_ids"], batch["attention_mask"])
    targets = {"labels": batch["labels"], "loss_mask": batch["loss_mask"]}
    output = model.build_schedule_plan(*inputs, **targets) if return_schedule_plan else model(*inputs, **targets)
    return output, partial(loss_func, batch["loss_mask"], model=model)
