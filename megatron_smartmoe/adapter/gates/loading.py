"""Checkpoints of other gates: what a gate's router has and a checkpoint lacks starts as it was initialised."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core.dist_checkpointing import load_tensors_metadata
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace, nested_values
from megatron.core.dist_checkpointing.mapping import LocalNonpersistentObject, ShardedTensor

from megatron_smartmoe.adapter.gates.table import parameter_names


def around_load(load: Callable[..., Any]) -> Callable[..., Any]:
    """Around Megatron's `dist_checkpointing.load`, which ends in an error where a checkpoint lacks a parameter.

    That the optimizer's state fits was checked before (`flags.checkpoint_check`).
    """

    @functools.wraps(load)
    def load_what_is_there(sharded_state_dict: Any, checkpoint_dir: str, *args: Any, **kwargs: Any) -> Any:
        wanted = {value.key for value in nested_values(sharded_state_dict) if _is_of_gate(value)}
        absent = wanted - set(load_tensors_metadata(checkpoint_dir)) if wanted else wanted
        if absent:
            dict_list_map_inplace(functools.partial(_kept, absent), sharded_state_dict)
            if dist.get_rank() == 0:
                names = ", ".join(sorted({key.rpartition(".")[2] for key in absent}))
                print(
                    f" smartmoe: checkpoint {Path(checkpoint_dir).name} was saved with another gate and has no {names} "
                    "of the routers: training starts with the initial values",
                    flush=True,
                )
        return load(sharded_state_dict, checkpoint_dir, *args, **kwargs)

    return load_what_is_there


def _is_of_gate(value: object) -> bool:
    return isinstance(value, ShardedTensor) and value.key.rpartition(".router.")[2] in parameter_names()


def _kept(absent: set[str], value: Any) -> Any:
    """What a model's parameter is loaded from: itself, where the checkpoint has none."""
    return LocalNonpersistentObject(value.data) if _is_of_gate(value) and value.key in absent else value
