"""Where the time of steps goes, while a run trains: a line per log interval, scalars, and account.jsonl.

Every step is timed in parts and counted on every rank (`step_times`). Every `--log-interval` iterations the ranks
exchange what they have measured; the account of the interval is printed and written to TensorBoard and W&B, and the
measurements themselves go to the run directory, from which `smartmoe report` makes the account of the whole run.

It works without --smartmoe too: the hooks are on stock Megatron's layers as on ours.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from argparse import Namespace
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from megatron.core.num_microbatches_calculator import get_current_global_batch_size, get_num_microbatches

from megatron_smartmoe.adapter.cost_inputs import launch_of_run, machine, model_of_run
from megatron_smartmoe.adapter.hooks import Callback, Order, loop_module
from megatron_smartmoe.adapter.moe.routers import count_tokens
from megatron_smartmoe.adapter.records.scalars import write_histograms, write_scalars
from megatron_smartmoe.adapter.records.step_times import Step, StepTimes, Units
from megatron_smartmoe.adapter.run import Run
from megatron_smartmoe.cost.account import Account, account_of
from megatron_smartmoe.cost.fitted import Count, Part, StepRecord, fit_step
from megatron_smartmoe.cost.memory.budget import memory_budget
from megatron_smartmoe.errors import ConfigError, PlanError, one_line
from megatron_smartmoe.report.account import read_steps
from megatron_smartmoe.runtime.counts import ExpertCounts
from megatron_smartmoe.runtime.peak_memory import GIB, PeakMemory
from megatron_smartmoe.runtime.step_clock import STEP_CLOCK
from megatron_smartmoe.spec.arrays import FloatArray, IntArray
from megatron_smartmoe.spec.cluster import GpuSpec

FILE = "account.jsonl"
ROWS_PER_INTERVAL = 10  # of the file, at most: a row is the mean of some iterations
_MOST_NUMBERS = 200_000  # that a rank keeps of the run for its constants and its summary; the file has all
_PERCENTILES = ("p50", "p95", "worst")


def measures_steps(args: Namespace) -> bool:
    """Whether the steps of a run are measured; says so where the flags ask for it and it cannot be."""
    if args.smartmoe_account == "off" or args.num_experts is None:
        return False
    if (getattr(args, "cuda_graph_impl", None) or "none") == "none":
        return True
    if os.environ.get("RANK", "0") == "0":
        why = "Megatron allows no hooks in CUDA graphs (--cuda-graph-impl)"
        print(f"smartmoe: --smartmoe-account: steps are not measured: {why}", flush=True)
    return False


class StepAccount(Callback):
    """See the module."""

    order = Order.ACCOUNT

    def on_start(self, run: Run) -> None:
        """Put the hooks on the layers."""
        args = run.args
        self._run, self._times = run, StepTimes(run)
        self._device = torch.cuda.current_device()
        self._counts = ExpertCounts(run.num_layers, args.num_experts, self._device)
        count_tokens(run.layers, self._counts)
        stages: list[int] = [0] * dist.get_world_size()
        dist.all_gather_object(stages, run.ranks.pp_rank)
        self._stage_R = np.array(stages, dtype=np.int64)
        self._kept: deque[StepRecord] = deque()
        self._memory = PeakMemory()
        self._last: dict[str, Any] = {}
        self._iteration = 0
        self._begun_s = self._wall_s = 0.0
        self._logs = run.is_reporter or run.ranks.rank == dist.get_world_size() - 1  # who prints, and who has writers
        self._gpu: GpuSpec | None = None
        try:
            self._gpu = machine(args).gpu  # here and not for every line, since it reads a file
        except ConfigError:
            if args.smartmoe:
                raise  # a stock run names no cluster, and this GPU may have no file
        if run.is_reporter:
            header = {
                "version": 1,
                "basis": self._basis,
                "stages": stages,
                "micro_batches": get_num_microbatches(),
                "virtual": len(run.chunks),
                "parts": [part.name.lower() for part in Part],
                "counts": [count.name.lower() for count in Count],
            }
            run.append(FILE, json.dumps(header))

    @property
    def _basis(self) -> Any:
        return "gpu" if torch.cuda.is_available() else "cpu"

    def before_step(self, iteration: int) -> None:
        """Report what is due, and begin to time.

        Here and not when the interval ends: ranks wait for each other in a report, and within a step the watchdog sees
        soon that one of them has stopped.
        """
        if self._iteration % self._run.args.log_interval == 0:
            self._report(self._iteration)
        self._iteration, self._begun_s = iteration, time.perf_counter()
        self._times.begin()

    def after_step(self, iteration: int, losses: Mapping[str, torch.Tensor]) -> None:
        """What Megatron logs and evaluates is not part of the step."""
        STEP_CLOCK.pause()
        self._wall_s += time.perf_counter() - self._begun_s

    @contextlib.contextmanager
    def around_changes(self, iteration: int) -> Iterator[None]:
        """What the loops do between steps is part of the step before."""
        begun_s = time.perf_counter()
        STEP_CLOCK.resume()
        try:
            yield
        finally:
            self._times.end(iteration)
        self._wall_s += time.perf_counter() - begun_s

    def on_end(self) -> None:
        """Exchange what is left; `summary` has the account of the run."""
        self._report(self._iteration)

    def summary(self) -> dict[str, Any]:
        """For summary.json, on rank 0: the account of the run, and memory against the plan at its last log line."""
        content: dict[str, Any] = {"account": None, **self._last}
        if self._kept:
            content["account"] = self._against_ideal(_joined(list(self._kept))).to_json()
        return content

    def _against_ideal(self, record: StepRecord) -> Account:
        """The account against the force-balanced run that is named; without it where that no longer fits."""
        if (name := self._run.args.smartmoe_ideal_run) is not None:
            try:
                if (ideal := read_steps(Path(name))) is not None:
                    return account_of(record, ideal.record)
                reason = "its account.jsonl is gone"
            except (ConfigError, PlanError) as error:
                reason = one_line(error)
            print(f" smartmoe: WARNING: --smartmoe-ideal-run {name} was not compared with: {reason} |", flush=True)
        return account_of(record)

    # --- a log interval

    def _report(self, iteration: int) -> None:
        """Exchange, write and print. A collective call of all ranks."""
        steps = self._times.take()
        if not steps:
            return
        torch.cuda.synchronize()  # the last steps' events; Megatron has just waited for the loss in any case
        wall_s, self._wall_s = self._wall_s / len(steps), 0.0
        # Step 1: this rank's rows, for which it needs the counts of its expert-parallel group.
        micro_batches = get_num_microbatches()
        units = [self._times.units_of(step, micro_batches) for step in steps]
        busiest, ratios_L3 = self._of_group(units)
        rows_NX = np.stack([_row(*each) for each in zip(steps, units, busiest, strict=True)])
        # Step 2: everybody's rows, memory and load.
        record, peaks_R2 = self._gathered(steps, rows_NX, micro_batches)
        ratios = torch.from_numpy(ratios_L3).to(self._device, torch.float32)
        dist.all_reduce(ratios, op=dist.ReduceOp.MAX)
        load_LE = self._counts.reduced().numpy()
        self._counts.reset()
        if not self._logs:
            return
        # Step 3: what they amount to. No other rank waits for it, and no error in it ends a training.
        try:
            self._tell(iteration, record, ratios.cpu().numpy(), load_LE, peaks_R2, wall_s)
        except Exception as error:
            if self._run.is_reporter:
                text = f"no account of these steps: {type(error).__name__}: {one_line(error)}"
                print(f" smartmoe: iteration {iteration:8d} | WARNING: {text} |", flush=True)

    def _tell(
        self,
        iteration: int,
        record: StepRecord,
        ratios_L3: FloatArray,
        load_LE: IntArray,
        peaks_R2: FloatArray,
        wall_s: float,
    ) -> None:
        """Print and write the account of an interval, with constants fitted to all of the run that is kept."""
        self._keep(record)
        fitted = fit_step(_joined(list(self._kept)).without_warm_up())
        account = account_of(record, fitted=fitted)
        content = self._content(record, ratios_L3, load_LE, peaks_R2, wall_s)
        warning = self._memory.note(peaks_R2[:, 0], peaks_R2[:, 1])
        if self._run.is_reporter:
            for row in range(len(record.iteration_N)):
                self._run.append(FILE, _line(record, row, content if row + 1 == len(record.iteration_N) else {}))
            print(_text(iteration, account, content), flush=True)
            if warning is not None:
                print(f" smartmoe: iteration {iteration:8d} | WARNING: {warning} |", flush=True)
        self._write_scalars(iteration, account, content, load_LE)

    def _of_group(self, units: list[Units]) -> tuple[list[FloatArray], FloatArray]:
        """What the busiest ranks of the group did in each step, `[3]`, and max / mean rows by layer.

        Returns:
            For each step: rows of the busiest rank of each unit, its slots with rows, rows over the busiest port. And
            median, 95th percentile and worst of max / mean, `[L, 3]`; 0 for layers of other stages.
        """
        counts_T3 = np.concatenate([each.counts_U3 for each in units])
        layer_T = np.concatenate([each.layer_U for each in units])
        group, ratios_L3 = mpu.get_expert_model_parallel_group(), np.zeros((self._run.num_layers, 3))
        mine = torch.from_numpy(counts_T3).to(self._device)
        all_ranks = mine.new_empty((group.size() * len(mine), 3))
        if len(mine):
            dist.all_gather_into_tensor(all_ranks, mine, group=group)
        counts_RT3 = all_ranks.view(group.size(), len(mine), 3).cpu().numpy()
        busiest_T = counts_RT3[:, :, 0].argmax(axis=0)
        at_busiest_T3 = np.take_along_axis(counts_RT3, busiest_T[None, :, None], axis=0)[0].astype(np.float64)
        at_busiest_T3[:, 2] = counts_RT3[:, :, 2].max(axis=0)
        ends = np.cumsum([len(each.layer_U) for each in units])[:-1]
        busiest = [each.sum(axis=0) for each in np.split(at_busiest_T3, ends)]
        mean_T = counts_RT3[:, :, 0].mean(axis=0)
        ratio_T = at_busiest_T3[:, 0] / np.where(mean_T > 0, mean_T, 1)
        for layer in np.unique(layer_T).tolist():
            own_T = ratio_T[(layer_T == layer) & (mean_T > 0)]
            if len(own_T):
                ratios_L3[layer] = np.median(own_T), np.percentile(own_T, 95), own_T.max()
        return busiest, ratios_L3

    def _gathered(self, steps: list[Step], rows_NX: FloatArray, micro_batches: int) -> tuple[StepRecord, FloatArray]:
        """The record of the interval, in at most ROWS_PER_INTERVAL rows, and (peak, limit) of each rank's memory."""
        bins = np.array_split(np.arange(len(rows_NX)), min(ROWS_PER_INTERVAL, len(rows_NX)))
        binned_BX = np.stack([rows_NX[each].mean(axis=0) for each in bins])
        mine = torch.from_numpy(np.concatenate([binned_BX.ravel(), _memory_bytes()]))
        mine = mine.to(self._device, torch.float64)
        everyone = mine.new_empty(dist.get_world_size() * len(mine))
        dist.all_gather_into_tensor(everyone, mine)
        all_RX = everyone.view(dist.get_world_size(), len(mine)).cpu().numpy()
        rows_BRX = all_RX[:, :-2].reshape(len(all_RX), *binned_BX.shape).transpose(1, 0, 2)
        record = StepRecord(
            basis=self._basis,
            iteration_N=np.array([steps[each[-1]].iteration for each in bins]),
            iterations_N=np.array([len(each) for each in bins]),
            seconds_NRP=rows_BRX[:, :, : len(Part)],
            counts_NRC=rows_BRX[:, :, len(Part) :],
            stage_R=self._stage_R,
            micro_batches=micro_batches,
            virtual=len(self._run.chunks),
        )
        return record, all_RX[:, -2:]

    def _keep(self, record: StepRecord) -> None:
        """Keep the interval for the summary; of a very long run the newest part."""
        self._kept.append(record)
        numbers = record.seconds_NRP.size + record.counts_NRC.size
        while len(self._kept) > 1 and len(self._kept) * numbers > _MOST_NUMBERS:
            self._kept.popleft()

    def _content(
        self, record: StepRecord, ratios_L3: FloatArray, load_LE: IntArray, peaks_R2: FloatArray, wall_s: float
    ) -> dict[str, Any]:
        """The interval's other figures, for the file, the line and the summary."""
        args, batch_size = self._run.args, get_current_global_batch_size()
        flops = loop_module().num_floating_point_operations(args, batch_size) / wall_s / len(self._stage_R)
        hottest = int(np.argmax(peaks_R2[:, 0] / peaks_R2[:, 1]))
        routed = load_LE.sum(axis=1) > 0
        layers = np.nonzero(ratios_L3[:, 2])[0]
        groups = len(self._stage_R) / (self._stage_R.max() + 1) / self._run.ranks.ep_size  # on each stage
        replicas = float(record.mean(record.counts_NRC[:, :, Count.REPLICAS]).sum())
        content = {
            "tokens_per_second": round(batch_size * args.seq_length / wall_s, 1),
            "model_tflops_per_rank": flops / 1e12,
            "mfu": flops / self._gpu.peak_flops if self._gpu is not None else None,
            "memory": {
                "rank": hottest,
                "peak_bytes": int(peaks_R2[hottest, 0]),
                "limit_bytes": int(peaks_R2[hottest, 1]),
                "planned_bytes": self._planned_bytes(record),
            },
            "imbalance": {str(layer + 1): np.round(ratios_L3[layer], 4).tolist() for layer in layers.tolist()},
            "dead_experts": int((load_LE[routed] == 0).sum()),
            "replicas_per_layer": replicas / max(1, len(layers) * record.micro_batches * groups),
        }
        self._last = content
        return content

    def _planned_bytes(self, record: StepRecord) -> dict[str, float] | None:
        """The planner's memory of the fullest rank at this interval's imbalance, part by part; None for runs that it
        has no model of."""
        if self._gpu is None:
            return None
        args = self._run.args
        tokens_R = record.counts_NRC[:, :, Count.TOKENS].mean(axis=0)
        busiest_R = record.counts_NRC[:, :, Count.BUSIEST_TOKENS].mean(axis=0)
        imbalance = float(busiest_R.sum() / max(1.0, tokens_R.sum()))
        try:
            budget, _ = memory_budget(model_of_run(args), launch_of_run(args), self._gpu, max(1.0, imbalance))
        except (ConfigError, PlanError):
            return None
        return dict(budget.parts())

    def _write_scalars(self, iteration: int, account: Account, content: dict[str, Any], load_LE: IntArray) -> None:
        scalars = {
            "smartmoe/step (ms)": account.step_s * 1e3,
            "smartmoe/model TFLOP/s per rank": content["model_tflops_per_rank"],
            "smartmoe/peak memory (GiB)": content["memory"]["peak_bytes"] / GIB,
            "smartmoe/dead experts": float(content["dead_experts"]),
            "smartmoe/replicas per layer": content["replicas_per_layer"],
        }
        if content["mfu"] is not None:
            scalars["smartmoe/MFU"] = content["mfu"]
        for term in account.terms:
            scalars[f"smartmoe/account/{term.label} (ms)"] = term.seconds * 1e3
        for layer, ratios in content["imbalance"].items():
            for name, ratio in zip(_PERCENTILES, ratios, strict=True):
                scalars[f"smartmoe/max over mean tokens per rank, {name}/layer {layer}"] = ratio
        write_scalars(scalars, iteration)
        tokens = {
            f"smartmoe/tokens per expert/layer {layer + 1}": load_LE[layer]
            for layer in np.nonzero(load_LE.sum(axis=1))[0].tolist()
        }
        write_histograms(tokens, iteration)


def _row(step: Step, units: Units, busiest_3: FloatArray) -> FloatArray:
    """Parts and counts of a step on this rank, in the order of `Part` and `Count`."""
    tokens, groups, port = units.counts_U3.sum(axis=0)
    return np.concatenate([step.seconds_P, [tokens, groups, units.calls, port, units.replicas], busiest_3])


def _memory_bytes() -> tuple[float, float]:
    """This rank's peak so far, and what it may reach: what it holds and what is free, a share of it on a CPU."""
    free = torch.cuda.mem_get_info()[0]
    if not torch.cuda.is_available():
        free //= int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return float(torch.cuda.max_memory_reserved()), float(torch.cuda.memory_reserved() + free)


def _joined(records: list[StepRecord]) -> StepRecord:
    """The rows of several intervals."""
    return replace(
        records[-1],
        iteration_N=np.concatenate([each.iteration_N for each in records]),
        iterations_N=np.concatenate([each.iterations_N for each in records]),
        seconds_NRP=np.concatenate([each.seconds_NRP for each in records]),
        counts_NRC=np.concatenate([each.counts_NRC for each in records]),
    )


def _line(record: StepRecord, row: int, content: Mapping[str, Any]) -> str:
    """A row of the file; the last one of an interval has the interval's other figures."""
    return json.dumps(
        {
            "iteration": int(record.iteration_N[row]),
            "iterations": int(record.iterations_N[row]),
            "seconds": np.round(record.seconds_NRP[row], 6).tolist(),
            "counts": np.round(record.counts_NRC[row], 1).tolist(),
            **content,
        }
    )


def _text(iteration: int, account: Account, content: dict[str, Any]) -> str:
    """` smartmoe: iteration 100 | step 512.3 ms CPU, busiest rank, of it residual imbalance 3.1%, ... | ...`"""
    clock = "CPU" if account.basis == "cpu" else "GPU"
    shares = [f"{term.label} {term.seconds / account.step_s:.1%}" for term in account.terms]
    terms = ", ".join(share for share in shares if not share.endswith((" 0.0%", " -0.0%")))
    ratios_L3 = np.array(list(content["imbalance"].values()) or [[1.0, 1.0, 1.0]])
    speed = [
        f"{content['tokens_per_second']:,.0f} tokens/s",
        f"{content['model_tflops_per_rank']:.3g} model TFLOP/s per rank",
    ]
    if content["mfu"] is not None:
        speed.append(f"MFU {content['mfu']:.1%}")
    memory = content["memory"]
    peak, limit = memory["peak_bytes"] / GIB, memory["limit_bytes"] / GIB
    parts = [
        f"smartmoe: iteration {iteration:8d}",
        f"step {account.step_s * 1e3:.1f} ms {clock}, busiest rank" + (f", of it {terms}" if terms else ""),
        f"max/mean tokens per rank p50 {np.median(ratios_L3[:, 0]):.2f} p95 {ratios_L3[:, 1].max():.2f} "
        f"worst {ratios_L3[:, 2].max():.2f}",
        ", ".join(speed),
        f"peak memory {peak:.2f} of {limit:.2f} GiB (rank {memory['rank']})",
    ]
    if dead := content["dead_experts"]:
        parts.append(f"{dead} expert{'s' if dead != 1 else ''} without tokens")
    return " " + " | ".join(parts) + " |"
