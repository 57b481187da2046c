"""A training loop of one's own, with Megatron's model and optimizer: the loop itself says where it is."""

from __future__ import annotations

import megatron_smartmoe

megatron_smartmoe.enable()

from collections.abc import Iterator

import torch
import torch.distributed as dist
from megatron.core import mpu
from megatron.core.distributed import finalize_model_grads
from megatron.core.num_microbatches_calculator import get_num_microbatches
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import get_model_config
from megatron.training.arguments import parse_and_validate_args
from megatron.training.initialize import initialize_megatron
from megatron.training.training import get_megatron_optimizer_config, get_model
from mock_gpt import Batch, datasets, forward_step
from own_provider import add_own_arguments, model_provider


def micro_batches(num_samples: int) -> Iterator[Batch]:
    """This data-parallel rank's part of the training samples, one at a time."""
    training, _, _ = datasets([num_samples, 0, 0])
    for index in range(mpu.get_data_parallel_rank(), num_samples, mpu.get_data_parallel_world_size()):
        sample = training[index]
        yield {name: torch.as_tensor(value).unsqueeze(0) for name, value in sample.items()}


def mean(reduced: list[Batch]) -> torch.Tensor:
    """The mean loss over micro-batches and data-parallel ranks."""
    total = torch.stack([each["lm loss"] for each in reduced]).sum(dim=0)
    dist.all_reduce(total, group=mpu.get_data_parallel_group(with_context_parallel=True))
    return total[0] / total[1]


def main() -> None:
    """Train, and print the loss of every iteration."""
    args = parse_and_validate_args(extra_args_provider=add_own_arguments)
    args.check_for_nan_in_loss_and_grad = False  # which belongs to Megatron's own loop
    initialize_megatron()
    model = get_model(model_provider)
    config, _ = get_megatron_optimizer_config(args)
    optimizer = get_megatron_optimizer(config, model)
    model_config = get_model_config(model[0])
    model_config.grad_scale_func, model_config.finalize_model_grads_func = optimizer.scale_loss, finalize_model_grads
    batches = micro_batches(args.train_iters * args.global_batch_size)

    with megatron_smartmoe.session(model, optimizer) as balanced:
        for iteration in range(1, args.train_iters + 1):
            balanced.before_step(iteration)
            model[0].zero_grad_buffer()
            optimizer.zero_grad()
            reduced = get_forward_backward_func()(
                forward_step_func=forward_step,
                data_iterator=batches,
                model=model,
                num_microbatches=get_num_microbatches(),
                seq_length=args.seq_length,
                micro_batch_size=args.micro_batch_size,
                forward_only=False,
            )
            optimizer.step()
            losses = {"lm loss": mean(reduced)}
            balanced.step(iteration, losses)
            if dist.get_rank() == 0:
                print(f"iteration {iteration} | lm loss: {losses['lm loss'].item():.9f}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
