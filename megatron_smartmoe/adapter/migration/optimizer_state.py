"""Where Megatron's optimizers keep the state of a parameter: main weight, moments, and which rank holds which part.

Three optimizers, and chains of them, are supported. `FP32Optimizer`: state keyed by the parameter, which is its own
main weight. `Float16OptimizerWithFloat16Params`: an fp32 main weight per bf16/fp16 parameter, state keyed by it.
`DistributedOptimizer`: flat shards over the expert-data-parallel group, cut bucket by bucket without regard for
parameters; the shards of all ranks follow from the buffer's layout, which is equal on all expert-parallel ranks, so
no communication is needed. Any other optimizer or form of state is refused by its flag's name.

The tensors are looked up again for each migration, since loading a checkpoint replaces them. `step` is one number for
all parameters and does not move. Neither does the loss scale of fp16: moments and main weights are of unscaled
gradients.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.fp8_utils import is_float8tensor
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.layer_wise_optimizer import LayerWiseDistributedOptimizer
from megatron.core.optimizer.optimizer import (
    ChainedOptimizer,
    Float16OptimizerWithFloat16Params,
    FP32Optimizer,
    MegatronOptimizer,
)

from megatron_smartmoe.errors import CompatError, ConfigError

MAIN = "main"  # the name of the fp32 main weight among the states
_WAY_OUT = "Remove the flag, or set --smartmoe-homes off."


@dataclass(frozen=True, kw_only=True)
class ParameterState:
    """The optimizer's state of one parameter.

    Attributes:
        shards: elements [start, stop) of the flat parameter that each rank of `group_ranks` holds; None when every rank
            holds all of it.
        group_ranks: global ranks of the shards; None when every rank holds all of it.
        own_start: first element that this rank holds.
        tensors: flat views of what this rank holds, by name: `main` (16-bit parameters only), `exp_avg`, ...; empty
            before the first step, and where this rank holds nothing.
    """

    shards: tuple[tuple[int, int], ...] | None
    group_ranks: tuple[int, ...] | None
    own_start: int
    tensors: dict[str, torch.Tensor]


def check_optimizer(optimizer: MegatronOptimizer, model_chunks: Iterable[torch.nn.Module]) -> None:
    """Refuse optimizers and precisions whose expert state cannot be moved.

    Raises:
        ConfigError: the first of them; it names the flag.
    """
    for chunk in model_chunks:
        ddp = getattr(chunk, "ddp_config", None)
        if getattr(ddp, "use_megatron_fsdp", False) or type(chunk).__name__ == "TorchFullyShardedDataParallel":
            raise _refusal("--use-megatron-fsdp", True, "experts cannot move between ranks when FSDP shards the model")
        if any(is_float8tensor(parameter) for parameter in chunk.parameters()):
            raise _refusal("--fp8-param-gather", True, "experts whose weights are stored in fp8 cannot move yet")
    for one in _chained(optimizer):
        _check_one(one)


def _check_one(optimizer: Any) -> None:
    config = optimizer.config
    layer_wise = getattr(config, "use_layer_wise_distributed_optimizer", False)
    if layer_wise or isinstance(optimizer, LayerWiseDistributedOptimizer):
        rule = "the layer-wise optimizer gives whole parameters to single ranks"
        raise _refusal("--optimizer", config.optimizer, rule)
    if isinstance(getattr(optimizer, "optimizer", None), HybridDeviceOptimizer) or config.optimizer_cpu_offload:
        raise _refusal("--optimizer-cpu-offload", True, "the state of experts is kept on the CPU, in another order")
    if config.use_precision_aware_optimizer:
        rule = "its main weights and moments are kept scaled and in parts inside the fused optimizer"
        raise _refusal("--use-precision-aware-optimizer", True, rule)
    if not isinstance(optimizer, FP32Optimizer | Float16OptimizerWithFloat16Params | DistributedOptimizer):
        rule = f"{type(optimizer).__name__} is not an optimizer whose state can be moved"
        raise _refusal("--optimizer", config.optimizer, rule)


def _refusal(flag: str, value: object, rule: str) -> ConfigError:
    return ConfigError(flag, value, rule, _WAY_OUT)


def parameter_states(
    optimizer: MegatronOptimizer, parameters: Iterable[torch.nn.Parameter]
) -> dict[torch.nn.Parameter, ParameterState]:
    """The present state of this rank's parameters.

    Raises:
        CompatError: a parameter belongs to no optimizer, or its state has a shape that cannot be cut with it.
    """
    # Step 1: the optimizer of each tensor, and its gradient buffer in a distributed optimizer. Keyed by identity:
    # comparing tensors compares their elements.
    owners: dict[int, Any] = {}
    for one in _chained(optimizer):
        if isinstance(one, DistributedOptimizer):
            owners |= {id(p): (one, buffer) for buffer in one.buffers for p in buffer.param_index_map}
        else:
            owners |= {id(p): (one, None) for group in one.optimizer.param_groups for p in group["params"]}
    # Step 2: the state of each parameter, under its main weight where it has one
    states = {}
    for parameter in parameters:
        main = getattr(parameter, "main_param", None)
        main = parameter if main is None or id(parameter) in owners else main
        if id(main) not in owners:
            raise CompatError(f"no optimizer holds the expert parameter of shape {tuple(parameter.shape)}")
        one, buffer = owners[id(main)]
        if buffer is not None:
            states[parameter] = _sharded(one, buffer, parameter)
        else:
            tensors = _tensors(one, parameter, main)
            states[parameter] = ParameterState(shards=None, group_ranks=None, own_start=0, tensors=tensors)
    return states


def _chained(optimizer: MegatronOptimizer) -> Iterator[Any]:
    """The optimizers at the ends of the chain; those without parameters are left out."""
    if isinstance(optimizer, ChainedOptimizer) and not isinstance(optimizer, LayerWiseDistributedOptimizer):
        for one in optimizer.chained_optimizers:
            yield from _chained(one)
    elif not getattr(optimizer, "is_stub_optimizer", False):
        yield optimizer


def _sharded(optimizer: Any, buffer: Any, parameter: torch.nn.Parameter) -> ParameterState:
    """The state of a parameter in a distributed optimizer, which gives each rank an equal part of each bucket."""
    # Step 1: the overlap of the parameter's range in the buffer with each rank's part of its bucket
    start, stop, bucket_id = buffer.param_index_map[parameter]
    bucket = buffer.buckets[bucket_id]
    group = optimizer.data_parallel_group
    size = bucket.grad_data.numel() // group.size()
    shards = []
    for rank in range(group.size()):
        low, high = bucket.offset + rank * size, bucket.offset + (rank + 1) * size
        low, high = max(low, start), min(high, stop)
        shards.append((low - start, high - start) if low < high else (0, 0))
    own = shards[group.rank()]
    # Step 2: Megatron must have found the same range for this rank
    held = parameter in optimizer.model_param_gbuf_map
    found = (0, 0)
    if held:
        found_range = optimizer._get_model_param_range_map(parameter)["param"]
        found = (found_range.start, found_range.end)
    if own != found:
        raise CompatError(
            f"unexpected optimizer sharding: Megatron has elements {found[0]} to {found[1]} of a parameter on this "
            f"rank, expected {own[0]} to {own[1]}"
        )
    # Step 3: what this rank holds
    tensors = {}
    if held:
        group_index, order = optimizer.model_param_group_index_map[parameter]
        main = optimizer.optimizer.param_groups[group_index]["params"][order]
        tensors = _tensors(optimizer, parameter, main)
    return ParameterState(
        shards=tuple(shards),
        group_ranks=tuple(torch.distributed.get_process_group_ranks(group)),
        own_start=own[0],
        tensors=tensors,
    )


def _tensors(optimizer: Any, parameter: torch.nn.Parameter, main: torch.Tensor) -> dict[str, torch.Tensor]:
    """Flat views of the main weight (unless it is the parameter itself) and of the state of each of its elements."""
    tensors = {} if parameter.dtype == torch.float32 else {MAIN: main.detach().view(-1)}
    for name, value in optimizer.optimizer.state.get(main, {}).items():
        if not isinstance(value, torch.Tensor) or (name == "step" and value.numel() == 1):
            continue
        if value.numel() != main.numel() or not value.is_contiguous():
            raise CompatError(
                f"the optimizer's state {name!r} of an expert has {value.numel()} elements and the weight "
                f"{main.numel()}: it cannot be cut and moved with the expert"
            )
        tensors[name] = value.detach().view(-1)
    return tensors
