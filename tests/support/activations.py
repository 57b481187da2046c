"""What autograd really keeps: bytes that wait for the backward pass after one micro-batch on every rank of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from weakref import WeakSet

from tests.support.allocation import MOCK_DATA, TRAINING
from tests.support.ranks import run_ranks


def kept(flags: list[str], world_size: int, log_dir: Path) -> list[dict[str, Any]]:
    """Train one iteration with `flags` and count the first micro-batch of each model chunk on each rank.

    Returns:
        For each rank `bytes`, of the storages that autograd holds when the forward pass ends, parameters left out;
        `expert_rows`, that its experts were given, all layers together; `megatron_estimate_bytes`, that
        Megatron reports for one micro-batch.
    """
    return run_ranks(_count, world_size, [*flags, *MOCK_DATA, *TRAINING], log_dir=log_dir)


def _count(argv: list[str]) -> dict[str, Any]:
    import torch
    from megatron.core.pipeline_parallel import schedules
    from megatron.training import get_args
    from megatron.training.theoretical_memory_usage import NUM_BYTES_IN_MEGABYTE, report_theoretical_memory

    from megatron_smartmoe.adapter.hooks import rebind
    from megatron_smartmoe.adapter.pretrain import main

    found: dict[str, Any] = {"bytes": 0, "expert_rows": 0}
    seen: list[torch.nn.Module] = []

    def wrap(forward_step: Any) -> Any:
        def wrapper(step_func: Any, data_iterator: Any, chunk: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
            call = (step_func, data_iterator, chunk, *args)
            if any(one is chunk for one in seen):
                return forward_step(*call, **kwargs)
            seen.append(chunk)
            held: WeakSet[_Held] = WeakSet()
            hooks = [module.register_forward_pre_hook(_rows_into(found)) for module in _experts(chunk)]
            with torch.autograd.graph.saved_tensors_hooks(lambda tensor: _Held(tensor, held), lambda one: one.tensor):
                result = forward_step(*call, **kwargs)
            for hook in hooks:
                hook.remove()
            found["bytes"] += _bytes(held, chunk)
            return result

        return wrapper

    rebind(schedules, "forward_step", wrap)
    main(argv)
    found["megatron_estimate_bytes"] = report_theoretical_memory(get_args(), 1)[1] * NUM_BYTES_IN_MEGABYTE
    return found


class _Held:
    """A tensor in autograd's hands: dead when the node that keeps it is."""

    def __init__(self, tensor: Any, all_of_them: WeakSet[_Held]) -> None:
        self.tensor = tensor
        all_of_them.add(self)


def _experts(chunk: Any) -> list[Any]:
    return [module for name, module in chunk.named_modules() if name.endswith("mlp.experts")]


def _rows_into(found: dict[str, Any]) -> Any:
    def hook(_: Any, inputs: tuple[Any, ...]) -> None:
        found["expert_rows"] += inputs[0].shape[0]

    return hook


def _bytes(held: WeakSet[_Held], chunk: Any) -> int:
    """Each storage once, whatever views of it are kept; a parameter's is none of autograd's."""
    params = {param.data.untyped_storage().data_ptr() for param in chunk.parameters()}
    storages = {one.tensor.untyped_storage().data_ptr(): one.tensor.untyped_storage().nbytes() for one in held}
    return sum(size for pointer, size in storages.items() if pointer not in params)
