"""What a run leaves for people and programs: metrics.jsonl while it trains, and the summary when it ends.

The device is never synchronised more often than by Megatron's own log: losses stay on the device until
`--log-interval` asks for them.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_smartmoe.adapter.hooks import Callback, Order
from megatron_smartmoe.adapter.launch import batch_job
from megatron_smartmoe.adapter.moe.routers import count_tokens
from megatron_smartmoe.adapter.records import data_text, summary
from megatron_smartmoe.adapter.records.account import StepAccount
from megatron_smartmoe.adapter.run import Run
from megatron_smartmoe.adapter.run_files import write_text
from megatron_smartmoe.runtime.counts import ExpertCounts

_RECENT_STEPS = 50  # whose longest is what the next one may take
LOAD_WINDOW_ITERATIONS = 50  # the summary's load per expert is that of the last iterations, this many


class Metrics(Callback):
    """Writes metrics.jsonl on the last rank, which has the losses, and the summary on rank 0.

    Args:
        account: adds what it has found to the summary; called before this one.
    """

    order = Order.METRICS

    def __init__(self, account: StepAccount | None = None) -> None:
        self._account = account
        self._loss: Mapping[str, torch.Tensor] = {}
        self._counts: ExpertCounts | None = None
        self._first_iteration: int | None = None
        self._iteration = 0
        self._train: dict[str, float] = {}
        self._evaluated: dict[str, dict[str, float]] = {}  # "validation" or "test" -> losses
        self._step_seconds: list[float] = []
        self._first_text: str | None = None

    def on_start(self, run: Run) -> None:
        """Put counters on the routers, and say which tokenizer reads the data."""
        self._run, self._last_logged = run, (0, time.perf_counter())
        if run.is_reporter:
            self._say_data(run)
        if run.args.num_experts is not None:
            self._counts = ExpertCounts(run.num_layers, run.args.num_experts, torch.cuda.current_device())
            count_tokens(run.layers, self._counts)

    def _say_data(self, run: Run) -> None:
        tokenizer = data_text.tokenizer_line(run.args)
        self._first_text = data_text.first_text(run.args)
        if tokenizer is not None:
            print(f"smartmoe: tokenizer {tokenizer}", flush=True)
        if self._first_text is not None:
            print(f"smartmoe: the data begin {summary.quoted(self._first_text)}", flush=True)

    def after_step(self, iteration: int, losses: Mapping[str, torch.Tensor]) -> None:
        """Keep the step's losses, on the device."""
        self._loss = losses

    def between_steps(self, iteration: int) -> None:
        """Write a line of metrics when Megatron logs."""
        args, self._iteration = self._run.args, iteration
        self._first_iteration = self._first_iteration or iteration
        if self._counts is not None and iteration == args.train_iters - LOAD_WINDOW_ITERATIONS:
            self._counts.reset()
        if iteration % args.log_interval == 0 or iteration == self._first_iteration:
            self._log(iteration, args.global_batch_size * args.seq_length)

    def _log(self, iteration: int, tokens_per_step: int) -> None:
        self._train = {key: float(value) for key, value in self._loss.items()}  # waits for the device
        last_iteration, last_time = self._last_logged
        now = time.perf_counter()
        self._last_logged = (iteration, now)
        seconds = (now - last_time) / max(1, iteration - last_iteration)
        if iteration == self._first_iteration:  # contains start-up
            self._write({"iteration": iteration, **self._train})
            return
        self._step_seconds.append(seconds)
        speed = {"seconds_per_step": round(seconds, 6), "tokens_per_second": round(tokens_per_step / seconds, 1)}
        self._write({"iteration": iteration, **self._train, **speed})

    def saved(self, iteration: int, seconds: float) -> None:
        """Mark for the batch script (scripts/pretrain_gpt_moe.slurm) that the run can be resumed from now on.

        The mark holds the seconds that training needs to save and stop: the step that is under way, a save until its
        checkpoint is in force, and half as much again.
        """
        marker = os.environ.get(batch_job.VARIABLE)
        if marker and self._run.is_reporter:
            needed = seconds + max(self._step_seconds[-_RECENT_STEPS:], default=0.0)
            text = f"{math.ceil(1.5 * needed)}\n"
            self._run.attempt(Path(marker), functools.partial(write_text, Path(marker), text))

    @contextlib.contextmanager
    def around_evaluation(self, split: str) -> Iterator[None]:
        """The time that an evaluation takes is not training time."""
        begun = time.perf_counter()
        yield
        iteration, last_time = self._last_logged
        self._last_logged = (iteration, last_time + time.perf_counter() - begun)

    def after_evaluation(self, split: str, losses: Mapping[str, torch.Tensor]) -> None:
        """Keep the losses."""
        if losses:
            self._evaluated[split] = {key: float(value) for key, value in losses.items()}
            self._write({"iteration": self._iteration, split: self._evaluated[split]})

    def _write(self, line: dict[str, Any]) -> None:
        if dist.get_rank() == dist.get_world_size() - 1:
            self._run.append("metrics.jsonl", json.dumps(line))

    def on_end(self) -> None:
        """Print the summary on rank 0, and write summary.json."""
        run = self._run
        known: list[Any] = [{"train": self._train, "step_seconds": self._step_seconds, **self._evaluated}]
        dist.broadcast_object_list(known, src=dist.get_world_size() - 1)  # the last rank has the losses
        load = self._counts.reduced() if self._counts is not None else torch.zeros(0, 0)
        if not run.is_reporter:
            return
        iteration = self._iteration or run.args.iteration
        gathered = {"iteration": iteration, "load_LE": load.tolist(), "first_text": self._first_text, **known[0]}
        content = summary.summarise(gathered, run.args)
        if self._account is not None:
            content = self._account.summary() | content  # the run's median speed, not that of the last interval
        print(summary.render(content, run.args, run.directory), flush=True)
        if run.directory is not None:
            path = run.directory / summary.FILE
            run.attempt(path, functools.partial(summary.write, content, path))
        if marker := os.environ.get(batch_job.VARIABLE):
            Path(marker).unlink(missing_ok=True)
