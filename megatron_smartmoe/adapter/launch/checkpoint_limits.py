"""What the checkpoint of a resumed run leaves open to `--parallel auto`: its optimizer state must fit.

Weights of torch_dist checkpoints can be loaded at any sizes. Optimizer state cannot: not across EP 1 and more than 1,
not into or out of the distributed optimizer, and, unless it was saved fully reshardable, at no other sizes at all.
"""

from __future__ import annotations

from argparse import Namespace
from dataclasses import replace

from megatron_smartmoe.adapter.flags import checkpoint_check
from megatron_smartmoe.planner.constraints import Constraints
from megatron_smartmoe.planner.space import SpaceOptions


def limits_of_checkpoint(args: Namespace, options: SpaceOptions) -> Constraints:
    """The launches of a space that can load the checkpoint; all of them where there is none.

    Args:
        args: parsed arguments; --load names the checkpoint.
        options: the space.
    """
    saved = _saved(args)
    if saved is None:
        return Constraints(options=options)
    sharded, parallel = bool(saved.use_distributed_optimizer), saved.expert_model_parallel_size > 1
    sizes: dict[str, int] = {}
    if sharded and not saved.dist_ckpt_optim_fully_reshardable:
        sizes = {
            "tp": saved.tensor_model_parallel_size,
            "pp": saved.pipeline_model_parallel_size,
            "ep": saved.expert_model_parallel_size,
            "etp": saved.expert_tensor_parallel_size or saved.tensor_model_parallel_size,
        }
    options = replace(
        options,
        distributed_optimizer=sharded,
        overlap_param_gather=options.overlap_param_gather and sharded,
        expert_parallel=parallel,
        fixed={**options.fixed, **sizes},
    )
    words = [f"{name.upper()} {size}" for name, size in sizes.items()] or ["EP > 1" if parallel else "EP 1"]
    words.append("a distributed optimizer" if sharded else "an optimizer that is not distributed")
    kept = f"{' and '.join(words)}, as in the checkpoint (pass --no-load-optim to change it)"
    return Constraints(options=options, given={"distributed_optimizer": sharded, **sizes}, kept=(kept,))


def _saved(args: Namespace) -> Namespace | None:
    """The arguments of the run whose optimizer state will be loaded, if any will."""
    folder = checkpoint_check.latest_checkpoint(args)
    if folder is None or args.finetune or args.no_load_optim:
        return None
    saved = checkpoint_check.saved_arguments(folder)
    return None if saved is None or getattr(saved, "no_save_optim", False) else saved
