"""What the examples share: made-up data, a forward step, and Megatron's `pretrain` as each release calls it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDatasetConfig, MockGPTDataset
from megatron.core.enums import ModelType
from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
from megatron.training import arguments as megatron_arguments
from megatron.training import get_args, pretrain

Batch = dict[str, torch.Tensor]


def datasets(num_samples: list[int], vp_stage: int | None = None) -> Any:
    """Training, validation and test datasets of made-up tokens."""
    args = get_args()
    config = GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        split=args.split,
        tokenizer=build_tokenizer(args),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    return BlendedMegatronDatasetBuilder(MockGPTDataset, num_samples, lambda: True, config).build()


datasets.is_distributed = True  # type: ignore[attr-defined]  # every rank builds them


def forward_step(data: Iterator[Batch], model: Any) -> tuple[torch.Tensor, Any]:
    """One micro-batch through the model, without tensor, context or pipeline parallelism."""
    batch = {name: tensor.cuda() for name, tensor in next(data).items()}
    losses = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])
    return losses, partial(mean_loss, batch["loss_mask"])


def mean_loss(mask: torch.Tensor, losses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, Batch]:
    """Sum of the losses of the tokens that count, their number, and both for the log."""
    loss, number = torch.sum(losses.float() * mask), mask.sum().detach().to(torch.int)
    return loss, number, {"lm loss": torch.stack([loss.detach(), number.float()])}


def train(
    model_provider: Callable[..., torch.nn.Module], extra_args_provider: Callable[..., Any] | None = None
) -> None:
    """Train with Megatron's own loop, as a script of each release does it.

    Args:
        model_provider: builds the model of a pipeline stage.
        extra_args_provider: adds the user's flags to Megatron's parser.
    """
    if "cfg_container" not in inspect.signature(pretrain).parameters:  # up to 0.17
        kind = ModelType.encoder_or_decoder
        pretrain(datasets, model_provider, kind, forward_step, extra_args_provider=extra_args_provider)
        return
    from megatron.training.argument_utils import pretrain_cfg_container_from_args

    args = megatron_arguments.parse_and_validate_args(extra_args_provider=extra_args_provider)
    options = {
        "train_valid_test_dataset_provider": datasets,
        "model_provider": model_provider,
        "model_type": ModelType.encoder_or_decoder,
        "forward_step_func": forward_step,
    }
    pretrain(pretrain_cfg_container_from_args(args), **options)
