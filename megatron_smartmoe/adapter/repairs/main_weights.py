"""Optimizer state that does not belong to the weights beside it is refused before training continues.

Checkpoints that were saved with the fault that `bucket_padding` repairs stay on disk. They load without complaint, and
the next optimizer step replaces the weights by what was saved as main weights: other parameters' values, and zeros.
Every save writes the weights as the rounded main weights, so a whole checkpoint can be told from a damaged one: its
main weights, rounded to the type of the weights, are the weights. Moments were shifted with them, by the same offset.

The comparison takes place between the two loads, when the model holds the saved weights and the main weights are still
apart. That way it also covers fp32 parameters, whose main weights are the parameters themselves. Each rank compares its
own shards, a small part of the time that loading takes.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist

from megatron_smartmoe.errors import EXIT_CONFIG_ERROR, ConfigError

LOAD_METHOD = "load_parameter_state_from_fully_reshardable"  # of DistributedOptimizer
ROUNDINGS = (torch.float32, torch.bfloat16, torch.float16)  # types that the saved weights may have had


class MainWeightsCheck:
    """Compares what is loaded on this rank, and refuses the checkpoint on all ranks alike.

    Attributes:
        mismatch: the first parameter of this rank whose main weights are not its weights.
        skipped: number of parameters that could not be compared.
    """

    def __init__(self) -> None:
        self.mismatch: str | None = None
        self.skipped = 0

    def around_load_state(self, load: Callable[..., Any]) -> Callable[..., Any]:
        """Around the method of `LOAD_METHOD`: compare first."""

        @functools.wraps(load)
        def compare_and_load(optimizer: Any, state_dict: dict[int, dict[str, torch.Tensor]]) -> Any:
            for parameter, main, weight in _shards(optimizer, state_dict):
                if not _is_comparable(optimizer, parameter):
                    self.skipped += 1
                elif self.mismatch is None and _differ(main, weight):
                    self.mismatch = _name(optimizer, parameter)
            return load(optimizer, state_dict)

        return compare_and_load

    def around_load_checkpoint(self, load_checkpoint: Callable[..., Any]) -> Callable[..., Any]:
        """Around the training loop's `load_checkpoint`: what any rank found ends all ranks.

        Raises:
            SystemExit: the main weights of a parameter are not its weights; rank 0 has printed the error.
        """

        @functools.wraps(load_checkpoint)
        def load_and_check(*args: Any, **kwargs: Any) -> Any:
            from megatron.training import get_args

            self.mismatch, self.skipped = None, 0
            result = load_checkpoint(*args, **kwargs)
            found: list[tuple[str | None, int]] = [(None, 0)] * dist.get_world_size()
            dist.all_gather_object(found, (self.mismatch, self.skipped))
            is_rank_0 = dist.get_rank() == 0
            for rank, (mismatch, _) in enumerate(found):
                if mismatch is not None:
                    if is_rank_0:
                        error = _refusal(get_args().load, result[0], mismatch, rank)
                        print(f"\nerror: {error}\n", file=sys.stderr, flush=True)
                    raise SystemExit(EXIT_CONFIG_ERROR)
            skipped = sum(count for _, count in found)
            if skipped and is_rank_0 and _could_be_damaged(get_args()):
                print(_note(result[0], skipped), flush=True)
            return result

        return load_and_check


def _shards(optimizer: Any, state_dict: dict[int, Any]) -> Iterator[tuple[torch.nn.Parameter, Any, Any]]:
    """Each parameter that this rank holds a shard of, with the shard of its main weights and of its weights.

    Megatron numbers the saved state by the order of all parameters in all buffers.
    """
    parameters = [parameter for buffer in optimizer.buffers for parameter in buffer.param_index_map]
    for number, parameter in enumerate(parameters):
        if parameter in optimizer.model_param_gbuf_map:
            held = optimizer._get_model_param_range_map(parameter)["param"]
            state = state_dict[number]
            main = state["param"] if "param" in state else state["fp32_param"]
            yield parameter, main.flatten()[held.start : held.end], parameter.detach().flatten()[held.start : held.end]


def _is_comparable(optimizer: Any, parameter: torch.nn.Parameter) -> bool:
    """Whether the weights are the rounded main weights, and the main weights are saved as such.

    Not so: weights in fp8 or fp4 (scaled as well as rounded), the precision-aware optimizer's main weights in 16 bits
    or as what bf16 cuts off, and --qk-clip, which scales weights and main weights each for itself.
    """
    from megatron.core.fp8_utils import is_float8tensor

    config = optimizer.config
    is_plain = parameter.dtype in ROUNDINGS and not is_float8tensor(parameter) and type(parameter.data) is torch.Tensor
    is_main_fp32 = not config.use_precision_aware_optimizer or (
        config.main_params_dtype == torch.float32 and not (config.bf16 and config.store_param_remainders)
    )
    clips = any(getattr(chunk.config, "qk_clip", False) for chunk in optimizer.model_chunks)
    return is_plain and is_main_fp32 and not clips


def _differ(main: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether main weights are not those of `weight`, whatever type the weights were saved in.

    A run may resume in another type than it was saved in: weights of a bf16 run then come to an fp32 one rounded.
    """
    main, weight = main.detach().cpu(), weight.cpu()
    for saved_type in ROUNDINGS:
        rounded = main.to(saved_type).to(weight.dtype)
        if torch.equal(rounded, weight) or torch.allclose(rounded, weight, rtol=0, atol=0, equal_nan=True):
            return False
    return True


def _name(optimizer: Any, parameter: torch.nn.Parameter) -> str:
    """The parameter's name in the model, without the wrappers around it."""
    for chunk in optimizer.model_chunks:
        for name, candidate in chunk.named_parameters():
            if candidate is parameter:
                return str(name).replace("module.", "")
    return f"a parameter of shape {tuple(parameter.shape)}"


def _refusal(load: str, iteration: int, mismatch: str, rank: int) -> ConfigError:
    rule = (
        f"the optimizer state of iteration {iteration} is damaged: the main weights of {mismatch} on rank {rank} do "
        "not round to its saved weights. megatron-core up to 0.19.2 saves it like that from several gradient buckets "
        "(--dist-ckpt-optim-fully-reshardable with --overlap-grad-reduce); the saved weights themselves are right"
    )
    way_out = (
        "Pass --no-load-optim to resume from the weights with new main weights and moments, or --ckpt-step N for an "
        "iteration that was saved without one of these flags."
    )
    return ConfigError("--load", load, rule, way_out)


def _could_be_damaged(args: argparse.Namespace) -> bool:
    """Whether it was saved from several buckets: overlapped reduction, or tied embeddings in a bucket of their own."""
    from megatron_smartmoe.adapter.flags.checkpoint_check import latest_checkpoint, saved_arguments

    folder = latest_checkpoint(args)
    saved = saved_arguments(folder) if folder is not None else None
    if saved is None:
        return True
    is_tied = not getattr(saved, "untie_embeddings_and_output_weights", False)
    return bool(getattr(saved, "overlap_grad_reduce", True) or (is_tied and saved.pipeline_model_parallel_size > 1))


def _note(iteration: int, skipped: int) -> str:
    return (
        f"smartmoe: checkpoint of iteration {iteration}: main weights and moments of {skipped} parameter shards "
        "were not compared with the weights, which fp8 weights, --use-precision-aware-optimizer and --qk-clip do not "
        "allow. If megatron-core up to 0.19.2 saved them without smartmoe, pass --no-load-optim to be safe."
    )
