"""What a run leaves for people and programs: metrics.jsonl while it trains, and the numbers of its summary.

The recorder listens to Megatron's `train_step` and `evaluate` and to the step hook. It never synchronises the device
more often than Megatron's own log does: losses stay on the device until `--log-interval` asks for them.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.utils import unwrap_model
from megatron.training import get_args
from megatron.training.utils import is_last_rank, is_rank0

from megatron_smartmoe.adapter.hooks import after, before
from megatron_smartmoe.adapter.moe.routers import count_tokens, moe_layers
from megatron_smartmoe.runtime.counts import ExpertCounts

LOAD_WINDOW_ITERATIONS = 50  # the summary's load per expert is that of the last this many iterations


class Recorder:
    """Listens to one training run.

    Args:
        run_dir: where metrics.jsonl goes (written by the last rank, which has the loss), or None for nowhere.
    """

    def __init__(self, run_dir: Path | None) -> None:
        self.run_dir = run_dir
        self._metrics = run_dir / "metrics.jsonl" if run_dir is not None else None
        self._loss: dict[str, torch.Tensor] = {}
        self._last_logged = (0, time.perf_counter())
        self.counts: ExpertCounts | None = None
        self.moe_layer_numbers: list[int] = []
        self.first_iteration: int | None = None
        self.iteration = 0
        self.train: dict[str, float] = {}
        self.evaluated: dict[str, dict[str, float]] = {}  # "validation" or "test" -> losses
        self._split = "validation"
        self.step_seconds: list[float] = []

    def listen(self) -> None:
        """Hook every method below to the function of Megatron's loop that it follows."""
        import megatron.training.training as training

        after(training, "setup_model_and_optimizer", self.on_model)
        after(training, "train_step", self.on_train_step)
        after(training, "post_training_step_callbacks", self.on_step_end)
        after(training, "evaluate", self.on_evaluate)
        before(training, "evaluate_and_print_results", self.on_split)
        after(training, "save_checkpoint_and_time", self.on_save)

    def on_model(self, result: tuple[list[torch.nn.Module], Any, Any], *args: Any, **kwargs: Any) -> None:
        """After `setup_model_and_optimizer`: put counters on the routers."""
        options = get_args()
        if options.num_experts is not None:
            chunks = unwrap_model(result[0])
            num_layers = options.num_layers + (options.mtp_num_layers or 0)
            self.counts = ExpertCounts(num_layers, options.num_experts, torch.cuda.current_device())
            self.moe_layer_numbers = sorted(number for number, _ in moe_layers(chunks))
            count_tokens(chunks, self.counts)

    def on_train_step(self, result: tuple[Any, ...], *args: Any, **kwargs: Any) -> None:
        """After `train_step`: keep the step's losses (tensors, on the last pipeline stage)."""
        self._loss = result[0]

    def on_step_end(self, result: Any, *args: Any, **kwargs: Any) -> None:
        """After `post_training_step_callbacks`: write a line of metrics when Megatron logs."""
        options, iteration = get_args(), args[3]
        self.iteration = iteration
        self.first_iteration = self.first_iteration or iteration
        if self.counts is not None and iteration == options.train_iters - LOAD_WINDOW_ITERATIONS:
            self.counts.reset()
        if iteration % options.log_interval == 0 or iteration == self.first_iteration:
            self._log(iteration, options.global_batch_size * options.seq_length)

    def _log(self, iteration: int, tokens_per_step: int) -> None:
        self.train = {key: float(value) for key, value in self._loss.items()}  # waits for the device
        last_iteration, last_time = self._last_logged
        now = time.perf_counter()
        self._last_logged = (iteration, now)
        seconds = (now - last_time) / max(1, iteration - last_iteration)
        if iteration == self.first_iteration:  # contains start-up
            self._write({"iteration": iteration, **self.train})
            return
        self.step_seconds.append(seconds)
        speed = {"seconds_per_step": round(seconds, 6), "tokens_per_second": round(tokens_per_step / seconds, 1)}
        self._write({"iteration": iteration, **self.train, **speed})

    def on_save(self, *args: Any, **kwargs: Any) -> None:
        """After a checkpoint: tell the batch script (scripts/pretrain_gpt_moe.slurm) that the run can be continued."""
        marker = os.environ.get("SMARTMOE_TO_BE_CONTINUED")
        if marker and is_rank0():
            Path(marker).touch()

    def on_split(self, prefix: str, *args: Any, **kwargs: Any) -> None:
        """Before `evaluate_and_print_results`: its prefix is the only thing that tells test from validation."""
        self._split = "test" if "test set" in prefix else "validation"

    def on_evaluate(self, result: tuple[dict[str, torch.Tensor] | None, Any, bool], *args: Any, **kwargs: Any) -> None:
        """After `evaluate`: keep the losses; the time it took is not training time."""
        if result[0]:
            losses = {key: float(value) for key, value in result[0].items()}
            self.evaluated[self._split] = losses
            self._write({"iteration": self.iteration, self._split: losses})
        self._last_logged = (self._last_logged[0], time.perf_counter())

    def _write(self, line: dict[str, Any]) -> None:
        if self._metrics is not None and is_last_rank():
            with self._metrics.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")

    def gather(self) -> dict[str, Any]:
        """The losses of the last rank and the load of every layer, on every rank. A collective call."""
        known: list[Any] = [{"train": self.train, "step_seconds": self.step_seconds, **self.evaluated}]
        dist.broadcast_object_list(known, src=dist.get_world_size() - 1)
        load = self.counts.reduced() if self.counts is not None else torch.zeros(0, 0)
        return {"iteration": self.iteration or get_args().iteration, "load_LE": load.tolist(), **known[0]}
