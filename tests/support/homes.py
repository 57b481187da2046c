"""Runs whose experts live elsewhere from the first step on: same model, other homes."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tests.support.ranks import run_ranks
from tests.support.training import TINY_MODEL, TINY_TRAINING, losses


def train_with_homes(
    run_dir: Path,
    world_size: int,
    data_flags: list[str],
    *flags: str,
    iterations: int,
    seed: int,
    move_weights: bool = True,
) -> list[float]:
    """Do what `training.train` does, with random homes in every layer from the start, drawn from `seed`.

    Args:
        move_weights: False leaves the weights where they were, which is wrong.
    """
    argv = [*TINY_MODEL, *TINY_TRAINING, *data_flags, "--train-iters", str(iterations), *flags]
    argv += ["--smartmoe-run-dir", str(run_dir)]
    run_ranks(_main, world_size, argv, seed, move_weights, log_dir=run_dir / "ranks")
    return losses(run_dir)


def _main(argv: list[str], seed: int, move_weights: bool) -> None:
    from megatron_smartmoe.adapter.hooks import Callback
    from megatron_smartmoe.adapter.pretrain import main

    class ScatterHomes(Callback):
        def on_start(self, run: Any) -> None:
            scatter_homes(run.layers, seed, move_weights)
            run.optimizer.reload_model_params()

    main(argv, callbacks=[ScatterHomes()])


def train_with_hot_experts(
    run_dir: Path, world_size: int, data_flags: list[str], *flags: str, iterations: int, hot: int
) -> None:
    """Do what `training.train` does, with the first experts of each layer chosen by most tokens, so that other homes
    would save time in every iteration."""
    argv = [*TINY_MODEL, *TINY_TRAINING, *data_flags, "--train-iters", str(iterations), *flags]
    run_ranks(
        _with_hot_experts, world_size, [*argv, "--smartmoe-run-dir", str(run_dir)], hot, log_dir=run_dir / "ranks"
    )


def _with_hot_experts(argv: list[str], hot: int) -> None:
    from megatron_smartmoe.adapter.hooks import Callback
    from megatron_smartmoe.adapter.pretrain import main

    class LongRows(Callback):
        def on_start(self, run: Any) -> None:
            if run.args.iteration:  # resumed: they are long already
                return
            for _, layer in run.layers:
                layer.router.weight.data[:hot] *= 10  # of either sign, so in every second token
            run.optimizer.reload_model_params()

    main(argv, callbacks=[LongRows()])


def scatter_homes(layers: Iterable[tuple[int, Any]], seed: int, move_weights: bool) -> None:
    """Give every layer random homes; before the first step weights are all there is to move."""
    import torch
    import torch.distributed as dist

    for number, layer in layers:
        num_experts = layer.config.num_moe_experts
        slot_of_expert_E = torch.randperm(num_experts, generator=torch.Generator().manual_seed(seed + number))
        layer.set_homes(slot_of_expert_E)
        if not move_weights:
            continue
        for weight in (layer.experts.weight1, layer.experts.weight2):
            parts = [torch.empty_like(weight.data) for _ in range(layer.ep_group.size())]
            dist.all_gather(parts, weight.data.contiguous(), group=layer.ep_group)
            weight.data.copy_(torch.cat(parts)[layer.experts.experts_in_slots])
