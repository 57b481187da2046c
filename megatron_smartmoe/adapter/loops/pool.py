"""The pool in Megatron: every N iterations it re-evaluates which setting would be fastest, and switches to it.

Without a restart can be changed: whether homes move, how replicas are planned and how many slots they use, and the
number of chunks of the all-to-alls. `runtime.pool.switchboard` decides, on rank 0, because ranks with different numbers
of chunks would wait for each other for ever. Its verdict is broadcast, and all ranks switch between the same two
iterations. An evaluation takes three collectives: counts, step times, the verdict. Between evaluations nothing is sent
and nothing waited for.
"""

from __future__ import annotations

import time
from argparse import Namespace
from collections import deque

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from megatron.core.num_microbatches_calculator import get_num_microbatches

from megatron_smartmoe.adapter.cost_inputs import (
    dispatcher_of,
    homes_options,
    launch_of_run,
    machine_of_job,
    model_of_run,
    nodes_of_group,
    replica_options,
    replica_price,
)
from megatron_smartmoe.adapter.flags.pool_settings import settings_of_pool, starting_setting
from megatron_smartmoe.adapter.hooks import Callback, Order
from megatron_smartmoe.adapter.loops.decision_log import DecisionLog
from megatron_smartmoe.adapter.loops.homes import HomesLoop
from megatron_smartmoe.adapter.loops.replicas import ReplicaLoop
from megatron_smartmoe.adapter.moe.overlap import OverlappedMoELayer
from megatron_smartmoe.adapter.moe.overlap_degree import OverlapDegree
from megatron_smartmoe.adapter.moe.routers import count_tokens
from megatron_smartmoe.adapter.run import Run
from megatron_smartmoe.placement.decisions import digest_of
from megatron_smartmoe.planner.pool import SETTLE_ITERATIONS, PoolSetting
from megatron_smartmoe.runtime.decisions.record import POOL_LOG, PoolStart
from megatron_smartmoe.runtime.pool.prediction import PoolLoad, PoolPrices, moe_seconds
from megatron_smartmoe.runtime.pool.switchboard import (
    PoolVerdict,
    StepTimes,
    Switchboard,
    SwitchboardOptions,
    evaluation_line,
    pool_decision,
    with_setting,
)
from megatron_smartmoe.runtime.recent_counts import RecentCounts
from megatron_smartmoe.runtime.step_clock import STEP_CLOCK, Part
from megatron_smartmoe.spec.arrays import IntArray
from megatron_smartmoe.spec.placement import Placement

LAYERS = 4  # of the model whose load is sampled, evenly spaced: rank 0 predicts while the others wait
ITERATIONS = 4  # whose load is kept: what replicas from history are planned from, and one to see them tried
MICRO_BATCHES = 2  # of the latest iteration whose load is kept
UNTIMED = 1  # iterations after a switch that are not timed, because they allocate and warm up


class PoolLoop(Callback):
    """Times the steps, and switches between the settings of the pool when another one is predicted to be faster.

    Args:
        homes: the homes loop, or None when homes stay.
        replicas: the replicas loop, or None when there are no spare slots.
        overlap_degree: the number of chunks with which the layers were built.
    """

    order = Order.POOL

    def __init__(self, homes: HomesLoop | None, replicas: ReplicaLoop | None, overlap_degree: OverlapDegree) -> None:
        self._homes, self._replicas, self._degree = homes, replicas, overlap_degree
        self._reported = ""  # the reason that the last evaluation reported
        self._untimed = UNTIMED

    def on_start(self, run: Run) -> None:
        """Count tokens, and start with the setting that the flags describe."""
        args = run.args
        self._run, self._log = run, DecisionLog(run, dry=False)
        self._layers = [layer for _, layer in run.layers if isinstance(layer, OverlappedMoELayer)]
        self._sample = _spread(len(run.layer_numbers), LAYERS)
        sampled = [run.layer_numbers[row] for row in self._sample]
        self._counts = RecentCounts(
            sampled,
            args.num_experts,
            iterations=ITERATIONS,
            micro_batches=min(MICRO_BATCHES, get_num_microbatches()),
            device=torch.cuda.current_device(),
        )
        count_tokens([(number, layer) for number, layer in run.layers if number in sampled], self._counts)
        now = starting_setting(args, self._degree())
        self._settings = with_setting(settings_of_pool(args), now)
        rest = SwitchboardOptions(cooldown_iterations=args.smartmoe_pool_interval)
        self._board = Switchboard(now, args.iteration, rest)
        self._prices = _prices(args, len(run.layer_numbers), homes_move=args.smartmoe_homes == "on")
        self._seconds: deque[float] = deque(maxlen=max(args.smartmoe_pool_interval, SETTLE_ITERATIONS))
        self._ended_at = time.perf_counter()
        if run.is_reporter:
            every = args.smartmoe_pool_interval
            print(
                f"smartmoe: pool: {len(self._settings)} settings, re-evaluated every {every} iterations, "
                f"starting with {now.key}",
                flush=True,
            )

    def recorded(self) -> PoolStart:
        """What a replay of the next switches begins with."""
        return PoolStart(
            now=self._board.now,
            settings=self._settings,
            options=self._board.options,
            prices=self._prices,
            sample=tuple(self._sample),
            iterations=ITERATIONS,
            micro_batches=min(MICRO_BATCHES, get_num_microbatches()),
        )

    @STEP_CLOCK.within(Part.PLANNING)
    def between_steps(self, iteration: int) -> None:
        """Time the step; re-evaluate the settings when the interval is over."""
        now = time.perf_counter()
        if self._untimed:
            self._untimed -= 1
        else:
            self._seconds.append(now - self._ended_at)
        if iteration % self._run.args.smartmoe_pool_interval == 0 and self._seconds and self._counts.ended:
            self._evaluate(iteration)
        self._counts.end_iteration()
        self._ended_at = time.perf_counter()  # the time of an evaluation is not the setting's

    def _evaluate(self, iteration: int) -> None:
        """Collect the load, decide on rank 0, and switch everywhere. A collective call."""
        ranks = self._run.ranks
        totals_ILE, batches_BLRE = self._counts.collect(
            ranks.ep_rank,
            self._prices.spec.ep,
            is_reporter=ranks.edp_rank == 0,
            shares=mpu.get_expert_tensor_parallel_world_size(),
        )
        measured = _of_slowest_rank(StepTimes.of(self._seconds))
        verdict: list[PoolVerdict | None] = [None]
        if self._run.is_reporter:
            load = PoolLoad(totals_ILE=totals_ILE, batches_BLRE=batches_BLRE, homes_LRH=self._homes_LRH())
            verdict = [self._decide(iteration, measured, load)]
        dist.broadcast_object_list(verdict, src=0)
        if verdict[0] is None:  # rank 0 has logged why
            return
        if verdict[0].switched:
            self._switch_to(verdict[0].setting)
        if self._run.is_reporter:
            self._run.append(POOL_LOG, evaluation_line(iteration, measured, verdict[0]))
        self._report(iteration, verdict[0], digest_of(totals_ILE, batches_BLRE))

    def _decide(self, iteration: int, measured: StepTimes, load: PoolLoad) -> PoolVerdict | None:
        """On rank 0. Whatever goes wrong, training continues with the setting as it is."""
        try:
            return self._board.evaluate(iteration, measured, lambda: moe_seconds(self._settings, load, self._prices))
        except Exception as error:
            self._log.warn(iteration, f"pool: {type(error).__name__}: {error}; the setting stays")
            return None

    def _switch_to(self, setting: PoolSetting) -> None:
        if self._homes is not None:
            self._homes.switch_to(setting)
        if self._replicas is not None:
            self._replicas.switch_to(setting.replicas, setting.spare_slots)
        for layer in self._layers:
            layer.set_degree(setting.overlap_degree)
        self._seconds.clear()
        self._untimed = UNTIMED

    def _homes_LRH(self) -> IntArray:
        """The expert in each home slot of the sampled layers; in logical order when homes do not move."""
        if self._homes is not None:
            return self._homes.homes_LRH[self._sample]
        ranks, experts = self._prices.spec.ep, self._run.args.num_experts
        return Placement.contiguous(num_layers=len(self._sample), num_experts=experts, num_ranks=ranks).slots_LRS

    def _report(self, iteration: int, verdict: PoolVerdict, inputs: str) -> None:
        """Each switch and each review of one; that nothing changes, only when the reason for it does."""
        if not verdict.is_decision and verdict.reason == self._reported:
            return
        self._reported = verdict.reason
        if self._run.is_reporter:
            change = (
                f"{verdict.before.key} -> {verdict.setting.key}" if verdict.switched else f"{verdict.before.key} stays"
            )
            print(f" smartmoe: iteration {iteration:8d} | pool: {change} | {verdict.why} |", flush=True)
        if not verdict.is_decision:
            return
        self._log.switched(pool_decision(iteration, verdict, inputs), self._settings.index(verdict.setting))


def _spread(length: int, most: int) -> list[int]:
    """At most `most` of the numbers below `length`, evenly spaced."""
    found: list[int] = np.unique(np.linspace(0, length - 1, min(length, most)).round().astype(int)).tolist()
    return found


def _of_slowest_rank(measured: StepTimes) -> StepTimes:
    """The longest step and the largest noise of any rank: one all-reduce."""
    longest = torch.tensor([measured.step_s, measured.noise_s], device=torch.cuda.current_device())
    dist.all_reduce(longest, op=dist.ReduceOp.MAX)
    step_s, noise_s = longest.tolist()
    return StepTimes(step_s=step_s, noise_s=noise_s, iterations=measured.iterations)


def _prices(args: Namespace, num_layers: int, *, homes_move: bool) -> PoolPrices:
    """This run's sizes and machine, as the planner would price them."""
    spec, micro_batches = launch_of_run(args), get_num_microbatches()
    chunks = args.virtual_pipeline_model_parallel_size or 1
    in_a_row = micro_batches + (spec.pp - 1) / chunks  # of a stage: its micro-batches and the bubble
    return PoolPrices(
        model=model_of_run(args),
        spec=spec,
        cluster=machine_of_job(args),
        num_nodes=nodes_of_group(spec.ep),
        micro_batches=micro_batches,
        layers_in_a_row=num_layers / spec.pp * in_a_row,
        replica=replica_options(args),
        exact_price=replica_price(args, "exact"),
        homes=homes_options(args),
        homes_move=homes_move,
        dispatcher=dispatcher_of(args),
    )
