"""What Megatron really allocates: parameters, gradient buffers and optimizer state of every rank of a short run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.support.ranks import run_ranks

MOCK_DATA = "--mock-data --tokenizer-type NullTokenizer".split()
TRAINING = (
    "--lr 1e-3 --lr-decay-style constant --eval-iters 0 --eval-interval 1000 --log-interval 1 --logging-level 40 "
    "--rerun-mode disabled --seed 1234 --num-workers 0 --train-iters 1 --smartmoe-rehearsal off"
).split()


def allocated(flags: list[str], world_size: int, log_dir: Path) -> list[dict[str, Any]]:
    """Train one iteration with `flags` and return what each rank holds afterwards."""
    argv = [*flags, *MOCK_DATA, *TRAINING]
    return run_ranks(_count, world_size, argv, log_dir=log_dir)


def _count(argv: list[str]) -> dict[str, Any]:
    from megatron.training import get_args
    from megatron.training.theoretical_memory_usage import compute_weight_and_optimizer_memory

    from megatron_smartmoe.adapter.hooks import Callback
    from megatron_smartmoe.adapter.pretrain import main

    held: dict[str, Any] = {}

    class Count(Callback):
        def on_start(self, run: Any) -> None:
            self.run = run

        def between_steps(self, iteration: int) -> None:
            held.update(_of_model(self.run.model_chunks), **_of_optimizer(self.run.optimizer))
            held["megatron_estimate_bytes"] = compute_weight_and_optimizer_memory(get_args())

    main(argv, callbacks=[Count()])
    return held


def _of_model(chunks: Any) -> dict[str, Any]:
    """Bytes behind parameters and main gradients, each storage once, and every parameter by name."""
    names = [
        [(name, param.numel(), not getattr(param, "allreduce", True)) for name, param in chunk.named_parameters()]
        for chunk in chunks
    ]
    params = [param for chunk in chunks for param in chunk.parameters()]
    return {
        "names": names,
        "param_bytes": _storage_bytes(param.data for param in params),
        "grad_bytes": _storage_bytes(param.main_grad for param in params),
    }


def _of_optimizer(optimizer: Any) -> dict[str, int]:
    """Bytes of fp32 main parameters (where they are not the model's own) and of the two Adam moments."""
    main, moments = [], []
    for inner in getattr(optimizer, "chained_optimizers", [optimizer]):
        for group in getattr(inner, "shard_fp32_from_float16_groups", None) or getattr(
            inner, "fp32_from_float16_groups", []
        ):
            main.extend(group)
        for state in inner.optimizer.state.values():
            moments.extend([state["exp_avg"], state["exp_avg_sq"]])
    return {
        "main_param_bytes": sum(t.numel() * t.element_size() for t in main),
        "moment_bytes": sum(t.numel() * t.element_size() for t in moments),
    }


def _storage_bytes(tensors: Any) -> int:
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())
