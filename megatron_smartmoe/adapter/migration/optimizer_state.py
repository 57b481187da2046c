"""Where Megatron's optimizers keep the state of a parameter: main weight, moments, and which rank holds which part.

Four optimizers, and chains of them, are supported. `FP32Optimizer`: state keyed by the parameter, which is its own
main weight. `Float16OptimizerWithFloat16Params`: an fp32 main weight per bf16/fp16 parameter, state keyed by it.
`DistributedOptimizer`: flat shards over the expert-data-parallel group, cut bucket by bucket without regard for
parameters; the shards of all ranks follow from the buffer's layout, which is equal on all expert-parallel ranks, so
no communication is needed. `LayerWiseDistributedOptimizer`: whole parameters, each on one rank of that group.
Any other optimizer or form of state is refused by its flag's name.

Inside a `DistributedOptimizer` the state may be kept in two more ways. `--use-precision-aware-optimizer`:
TransformerEngine's Adam keeps it under the 16-bit shard itself, main weights included (`master_param`, in full or as
the 16 bits that the bf16 weight lacks), moments in fp32 or bf16. Its fp16 and fp8 forms have one scale for a shard, in
which another expert's values would be rounded anew: they are refused. `--optimizer-cpu-offload`
(`HybridDeviceOptimizer`): a main weight per shard, on the CPU for a part of them, with its moments beside it.

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
_SCALED = "a scale is kept for a whole shard, and experts that move would be rounded by one another's"
_UNSCALED = (torch.float32, torch.bfloat16)
_WAY_OUT = "Remove the flag, or set --smartmoe-homes off."


@dataclass(frozen=True, kw_only=True)
class ParameterState:
    """The optimizer's state of one parameter.

    Attributes:
        shards: elements [start, stop) of the flat parameter that each rank of `group_ranks` holds; None when every rank
            holds all of it.
        group_ranks: global ranks of the shards; None when every rank holds all of it.
        own_start: first element that this rank holds.
        has_main: whether a main weight of 4 bytes an element is kept under the name `main`; the same on all ranks.
        tensors: flat views of what this rank holds, by name: `main`, `exp_avg`, ...; without moments before the first
            step, and empty where this rank holds nothing.
    """

    shards: tuple[tuple[int, int], ...] | None
    group_ranks: tuple[int, ...] | None
    own_start: int
    has_main: bool
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
    check_state_type(config)
    supported = (
        FP32Optimizer,
        Float16OptimizerWithFloat16Params,
        DistributedOptimizer,
        LayerWiseDistributedOptimizer,
    )
    if not isinstance(optimizer, supported):
        rule = f"{type(optimizer).__name__} is not an optimizer whose state can be moved"
        raise _refusal("--optimizer", config.optimizer, rule)


def check_state_type(config: Any) -> None:
    """Refuse what the precision-aware optimizer keeps with a scale.

    Args:
        config: Megatron's OptimizerConfig.

    Raises:
        ConfigError: the first of its types that has one.
    """
    if not config.use_precision_aware_optimizer or config.optimizer_cpu_offload:
        return
    for name in ("main_params_dtype", "exp_avg_dtype", "exp_avg_sq_dtype"):
        dtype = getattr(config, name)
        if dtype not in _UNSCALED:
            raise _refusal(f"--{name.replace('_', '-')}", str(dtype).removeprefix("torch."), _SCALED)


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
    on_rank: dict[int, tuple[Any, int]] = {}  # layer-wise optimizer and the rank that has the whole parameter
    for one in _chained(optimizer):
        if isinstance(one, LayerWiseDistributedOptimizer):
            of_ranks = enumerate(one.expt_dp_params_list or ())  # nothing where the group has one rank
            on_rank |= {id(p): (one, rank) for rank, of_rank in of_ranks for p in of_rank}
            parts = one.chained_optimizers
            owners |= {id(p): (part, None) for part in parts for g in part.optimizer.param_groups for p in g["params"]}
        elif isinstance(one, DistributedOptimizer):
            owners |= {id(p): (one, buffer) for buffer in one.buffers for p in buffer.param_index_map}
        else:
            owners |= {id(p): (one, None) for group in one.optimizer.param_groups for p in group["params"]}
    # Step 2: the state of each parameter, under its main weight where it has one
    states = {}
    for parameter in parameters:
        main = getattr(parameter, "main_param", None)
        main = parameter if main is None or id(parameter) in owners else main
        if id(parameter) in on_rank:
            layer_wise, rank = on_rank[id(parameter)]
            part = owners[id(main)][0] if id(main) in owners else None
            states[parameter] = _on_one_rank(layer_wise.expt_dp, rank, part, parameter, main)
            continue
        if id(main) not in owners:
            raise CompatError(f"no optimizer holds the expert parameter of shape {tuple(parameter.shape)}")
        one, buffer = owners[id(main)]
        if buffer is not None:
            states[parameter] = _sharded(one, buffer, parameter)
        else:
            states[parameter] = ParameterState(
                shards=None,
                group_ranks=None,
                own_start=0,
                has_main=_has_main(one, parameter),
                tensors=state_tensors(one, parameter, main),
            )
    return states


def _chained(optimizer: MegatronOptimizer) -> Iterator[Any]:
    """The optimizers at the ends of the chain; those without parameters are left out."""
    if isinstance(optimizer, ChainedOptimizer) and not isinstance(optimizer, LayerWiseDistributedOptimizer):
        for one in optimizer.chained_optimizers:
            yield from _chained(one)
    elif not getattr(optimizer, "is_stub_optimizer", False):
        yield optimizer


def keeps_in_its_own_way(optimizer: MegatronOptimizer) -> str:
    """The name of an optimizer that keeps main weights and moments in another way than fp32 beside the weights.

    Empty for the others. Such state moves, but is not comparable with that of another launch.
    """
    for one in _chained(optimizer):
        if isinstance(one, LayerWiseDistributedOptimizer):
            return "layer-wise optimizer"
        if one.config.use_precision_aware_optimizer:
            return "precision-aware optimizer"
    return ""


def _on_one_rank(
    group: torch.distributed.ProcessGroup, owner: int, part: Any, parameter: torch.nn.Parameter, main: torch.Tensor
) -> ParameterState:
    """The state of a parameter that one rank of the group has, whole."""
    held = group.rank() == owner
    if held != (part is not None):
        raise CompatError(f"the layer-wise optimizer's state of a parameter is not on rank {owner} of its group alone")
    return ParameterState(
        shards=tuple((0, parameter.numel() if rank == owner else 0) for rank in range(group.size())),
        group_ranks=tuple(torch.distributed.get_process_group_ranks(group)),
        own_start=0,
        has_main=parameter.dtype != torch.float32,
        tensors=state_tensors(part, parameter, main) if held else {},
    )


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
        tensors = state_tensors(optimizer, parameter, main)
    return ParameterState(
        shards=tuple(shards),
        group_ranks=tuple(torch.distributed.get_process_group_ranks(group)),
        own_start=own[0],
        has_main=_has_main(optimizer, parameter),
        tensors=tensors,
    )


def _has_main(optimizer: Any, parameter: torch.nn.Parameter) -> bool:
    """Whether the optimizer keeps a tensor of its own for the main weight, from the start and in fp32."""
    if isinstance(optimizer.optimizer, HybridDeviceOptimizer):
        return True
    return parameter.dtype != torch.float32 and not optimizer.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8


def state_tensors(optimizer: Any, parameter: torch.nn.Parameter, main: torch.Tensor) -> dict[str, torch.Tensor]:
    """Flat views of the main weight, where there is one beside the parameter, and of the state of each element."""
    inner = optimizer.optimizer
    state = dict(inner.state.get(main, {}))
    if isinstance(inner, HybridDeviceOptimizer):
        state.pop("master_param", None)  # the same tensor, which is there before the first step
        state = {MAIN: inner.param_to_inner_param[main], **state}
    elif _has_main(optimizer, parameter):
        state = {MAIN: main, **state}
    tensors = {}
    for name, value in state.items():
        if not isinstance(value, torch.Tensor) or (name == "step" and value.numel() == 1):
            continue
        if value.numel() != main.numel() or not value.is_contiguous():
            raise CompatError(
                f"the optimizer's state {name!r} of an expert has {value.numel()} elements and the weight "
                f"{main.numel()}: it cannot be cut and moved with the expert"
            )
        tensors[name] = value.detach().view(-1)
    return tensors
