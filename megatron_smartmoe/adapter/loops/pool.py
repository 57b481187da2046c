"""The pool in Megatron: every N iterations a look at which setting would be fastest, and the switch to it.

What needs no restart is how homes move, how copies are planned and how many slots they use, and into how many pieces
the all-to-alls are cut. `runtime.pool.switchboard` decides, on rank 0, because ranks that cut their all-to-alls
differently would wait for each other for ever; its verdict is broadcast, and all ranks switch between the same two
iterations. A look takes three collectives: counts, step times, the verdict. Between looks nothing is sent and nothing
waited for.
"""

from __future__ import annotations

import time
from argparse import Namespace
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from megatron.core.num_microbatches_calculator import get_num_microbatches
from megatron.core.utils import unwrap_model
from megatron.training import get_args

from megatron_smartmoe.adapter.cost_inputs import (
    launch_of_run,
    machine_of_job,
    model_of_run,
    nodes_of_group,
    replica_options,
)
from megatron_smartmoe.adapter.flags.pool_settings import settings_of_pool, starting_setting
from megatron_smartmoe.adapter.hooks import after
from megatron_smartmoe.adapter.loops.decision_log import DecisionLog
from megatron_smartmoe.adapter.loops.homes import Balancer
from megatron_smartmoe.adapter.loops.replicas import ReplicaLoop
from megatron_smartmoe.adapter.moe.overlap import OverlappedMoELayer
from megatron_smartmoe.adapter.moe.overlap_degree import OverlapDegree
from megatron_smartmoe.adapter.moe.routers import all_layer_numbers, count_tokens, moe_layers
from megatron_smartmoe.placement.decisions import Decision, digest_of
from megatron_smartmoe.planner.pool import SETTLE_ITERATIONS, PoolSetting
from megatron_smartmoe.runtime.pool.prediction import PoolLoad, PoolPrices, moe_seconds
from megatron_smartmoe.runtime.pool.switchboard import (
    Measured,
    PoolVerdict,
    Switchboard,
    SwitchboardOptions,
    with_setting,
)
from megatron_smartmoe.runtime.recent_counts import RecentCounts
from megatron_smartmoe.spec.arrays import IntArray
from megatron_smartmoe.spec.placement import Placement

LAYERS = 4  # of the model that are looked at, evenly spaced: rank 0 predicts while the others wait
ITERATIONS = 4  # that the load is known of: what copies from history are planned from, and one to see them tried
MICRO_BATCHES = 2  # of the latest of them
UNTIMED = 1  # iterations after a switch that allocate and warm up


class PoolLoop:
    """Listens to one training run.

    Args:
        run_dir: where smartmoe.jsonl goes, or None for nowhere.
        balancer: the homes loop, or None when homes stay.
        replicas: the replicas loop, or None when there are no spare slots.
        overlap_degree: says with how many pieces the layers were built.
    """

    def __init__(
        self,
        run_dir: Path | None,
        balancer: Balancer | None,
        replicas: ReplicaLoop | None,
        overlap_degree: OverlapDegree,
    ) -> None:
        self._log = DecisionLog(run_dir, dry=False)
        self._balancer, self._replicas, self._degree = balancer, replicas, overlap_degree
        self._layers: list[OverlappedMoELayer] = []
        self._told = ""  # reason of the last look that was told
        self._untimed = UNTIMED

    def listen(self) -> None:
        """Hook into Megatron's loop."""
        import megatron.training.training as training

        after(training, "setup_model_and_optimizer", self.on_model)
        after(training, "post_training_step_callbacks", self.on_step_end)

    def on_model(self, result: tuple[list[Any], Any, Any], *args: Any, **kwargs: Any) -> None:
        """After `setup_model_and_optimizer`: count, and start with the setting that the flags say."""
        options = get_args()
        chunks = unwrap_model(result[0])
        own = list(moe_layers(chunks))
        self._layers = [layer for _, layer in own if isinstance(layer, OverlappedMoELayer)]
        self._numbers = all_layer_numbers([number for number, _ in own])
        self._sample = _spread(len(self._numbers), LAYERS)
        self._counts = RecentCounts(
            [self._numbers[row] for row in self._sample],
            options.num_experts,
            iterations=ITERATIONS,
            micro_batches=min(MICRO_BATCHES, get_num_microbatches()),
            device=torch.cuda.current_device(),
        )
        count_tokens(chunks, self._counts, self._counts.layers)
        now = starting_setting(options, self._degree())
        self._settings = with_setting(settings_of_pool(options), now)
        rest = SwitchboardOptions(rest_iterations=options.smartmoe_pool_interval)
        self._board = Switchboard(now, options.iteration, rest)
        self._prices = _prices(options, len(self._numbers), homes_move=options.smartmoe_homes == "on")
        self._seconds: deque[float] = deque(maxlen=max(options.smartmoe_pool_interval, SETTLE_ITERATIONS))
        self._ended_at = time.perf_counter()
        if options.rank == 0:
            every = options.smartmoe_pool_interval
            print(
                f"smartmoe: pool of {len(self._settings)} settings, a look every {every} iterations; starts with "
                f"{now.key}",
                flush=True,
            )

    def on_step_end(self, result: Any, *args: Any, **kwargs: Any) -> None:
        """After `post_training_step_callbacks`, and after the loops whose settings this one changes."""
        now, iteration = time.perf_counter(), args[3]
        if self._untimed:
            self._untimed -= 1
        else:
            self._seconds.append(now - self._ended_at)
        if iteration % get_args().smartmoe_pool_interval == 0 and self._seconds and self._counts.ended:
            self._look(iteration)
        self._counts.end_iteration()
        self._ended_at = time.perf_counter()  # a look is not the setting's time

    def _look(self, iteration: int) -> None:
        """Collect, let rank 0 decide, and do what it says. A collective call."""
        totals_ILE, batches_BLRE = self._counts.collect(
            mpu.get_expert_model_parallel_rank(),
            self._prices.spec.ep,
            speaks=mpu.get_expert_data_parallel_rank() == 0,
            shares=mpu.get_expert_tensor_parallel_world_size(),
        )
        measured = _of_slowest_rank(Measured.of(self._seconds))
        verdict: list[PoolVerdict | None] = [None]
        if dist.get_rank() == 0:
            load = PoolLoad(totals_ILE=totals_ILE, batches_BLRE=batches_BLRE, homes_LRH=self._homes())
            verdict = [self._decide(iteration, measured, load)]
        dist.broadcast_object_list(verdict, src=0)
        if verdict[0] is None:  # rank 0 has said why
            return
        if verdict[0].switched:
            self._switch_to(verdict[0].setting)
        self._tell(iteration, verdict[0], digest_of(totals_ILE, batches_BLRE))

    def _decide(self, iteration: int, measured: Measured, load: PoolLoad) -> PoolVerdict | None:
        """On rank 0. Whatever goes wrong, the training goes on as it is."""
        try:
            return self._board.look(iteration, measured, lambda: moe_seconds(self._settings, load, self._prices))
        except Exception as error:
            self._log.trouble(iteration, f"pool: {type(error).__name__}: {error}; the setting stays")
            return None

    def _switch_to(self, setting: PoolSetting) -> None:
        if self._balancer is not None:
            self._balancer.switch_to(setting)
        if self._replicas is not None:
            self._replicas.switch_to(setting.replicas, setting.spare_slots)
        for layer in self._layers:
            layer.cut_into(setting.overlap_degree)
        self._seconds.clear()
        self._untimed = UNTIMED

    def _homes(self) -> IntArray:
        """Expert in each home slot of the sampled layers; in logical order when nobody moves them."""
        if self._balancer is not None:
            return self._balancer.homes_LRH[self._sample]
        ranks, experts = self._prices.spec.ep, get_args().num_experts
        return Placement.contiguous(num_layers=len(self._sample), num_experts=experts, num_ranks=ranks).slots_LRS

    def _tell(self, iteration: int, verdict: PoolVerdict, inputs: str) -> None:
        """Switches and verdicts on them each time; that nothing changes, when the reason for it does."""
        if not verdict.is_decision and verdict.reason == self._told:
            return
        self._told = verdict.reason
        if dist.get_rank() == 0:
            way = (
                f"{verdict.before.key} -> {verdict.setting.key}" if verdict.switched else f"{verdict.before.key} stays"
            )
            print(f" smartmoe: iteration {iteration:8d} | pool: {way} | {verdict.why} |", flush=True)
        if not verdict.is_decision:
            return
        decision = Decision(
            iteration=iteration,
            kind="pool",
            group=-1,
            inputs=inputs,
            before=verdict.before.key,
            after=verdict.setting.key,
            taken=verdict.switched,
            why=verdict.why,
            changes=(),
            predicted_gain_s=verdict.predicted_gain_s,
            realised_gain_s=verdict.realised_gain_s,
        )
        self._log.switched(decision, self._settings.index(verdict.setting))


def _spread(length: int, most: int) -> list[int]:
    """At most `most` of the numbers below `length`, evenly spaced."""
    found: list[int] = np.unique(np.linspace(0, length - 1, min(length, most)).round().astype(int)).tolist()
    return found


def _of_slowest_rank(measured: Measured) -> Measured:
    """The longest step and the largest noise of any rank: one all-reduce."""
    longest = torch.tensor([measured.step_s, measured.noise_s], device=torch.cuda.current_device())
    dist.all_reduce(longest, op=dist.ReduceOp.MAX)
    step_s, noise_s = longest.tolist()
    return Measured(step_s=step_s, noise_s=noise_s, iterations=measured.iterations)


def _prices(options: Namespace, num_layers: int, *, homes_move: bool) -> PoolPrices:
    """This run's sizes and machine, as the planner would price them."""
    spec, micro_batches = launch_of_run(options), get_num_microbatches()
    chunks = options.virtual_pipeline_model_parallel_size or 1
    in_a_row = micro_batches + (spec.pp - 1) / chunks  # of a stage: its micro-batches and the bubble
    return PoolPrices(
        model=model_of_run(options),
        spec=spec,
        cluster=machine_of_job(options),
        num_nodes=nodes_of_group(spec.ep),
        micro_batches=micro_batches,
        layers_in_a_row=num_layers / spec.pp * in_a_row,
        replica=replica_options(options),
        homes_move=homes_move,
    )
