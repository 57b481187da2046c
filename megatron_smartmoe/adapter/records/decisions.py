"""What a replay of the decisions begins with, written when a run starts that records its routing."""

from __future__ import annotations

import functools
from pathlib import Path

import torch.distributed as dist
from megatron.core import parallel_state as mpu
from megatron.core.num_microbatches_calculator import get_num_microbatches

from megatron_smartmoe.adapter.hooks import Callback, Order
from megatron_smartmoe.adapter.loops import saved_state
from megatron_smartmoe.adapter.loops.homes import HomesLoop
from megatron_smartmoe.adapter.loops.pool import PoolLoop
from megatron_smartmoe.adapter.loops.replicas import ReplicaLoop
from megatron_smartmoe.adapter.moe.routers import passes_per_micro_batch
from megatron_smartmoe.adapter.run import Run
from megatron_smartmoe.adapter.run_files import write_text
from megatron_smartmoe.runtime.decisions.record import (
    FOLDER,
    VERSION,
    HomesStart,
    ReplicasStart,
    Stage,
    Start,
    homes_state_file,
    replicas_state_file,
    start_file,
)


class DecisionRecorder(Callback):
    """Writes what the loops have when the run starts, after all of them have restored what their checkpoint held.

    Args:
        homes: the homes loop, or None.
        replicas: the replicas loop, or None.
        pool: the pool, or None.
        trace: the routing trace that is recorded.
    """

    order = Order.TRACE

    def __init__(
        self, homes: HomesLoop | None, replicas: ReplicaLoop | None, pool: PoolLoop | None, trace: Path
    ) -> None:
        self._homes, self._replicas, self._pool, self._trace = homes, replicas, pool, trace

    def on_start(self, run: Run) -> None:
        """Write the start. A collective call."""
        if run.directory is None:
            return
        self._folder = run.directory / FOLDER
        if run.is_reporter:
            run.attempt(self._folder, functools.partial(self._folder.mkdir, exist_ok=True))
        stages = _stages(run)  # every rank is here after the folder is
        replicas = self._save_replicas(run)
        homes = self._save_homes(run)
        if not run.is_reporter:
            return
        ranks, args = run.ranks, run.args
        start = Start(
            version=VERSION,
            iteration=args.iteration,
            trace=str(self._trace.resolve()),
            logs={path.name: path.stat().st_size for path in sorted(run.directory.glob("*.jsonl"))},
            num_experts=args.num_experts,
            num_ranks=ranks.ep_size,
            groups=ranks.edp_size,
            expert_shares=mpu.get_expert_tensor_parallel_world_size(),
            spare_slots=args.smartmoe_spare_slots,
            micro_batches=get_num_microbatches(),
            stages=stages,
            homes=homes,
            replicas=replicas,
            pool=None if self._pool is None else self._pool.recorded(),
        )
        path = self._folder / start_file(args.iteration)
        run.attempt(path, functools.partial(write_text, path, start.to_text()))

    def _save_homes(self, run: Run) -> HomesStart | None:
        if self._homes is None:
            return None
        start, state = self._homes.recorded()
        if run.is_reporter:
            self._save(run, homes_state_file(run.args.iteration), state)
        return start

    def _save_replicas(self, run: Run) -> ReplicasStart | None:
        if self._replicas is None:
            return None
        ranks = run.ranks
        start, state = self._replicas.recorded()
        if state and ranks.ep_rank == 0 and ranks.etp_rank == 0:
            self._save(run, replicas_state_file(run.args.iteration, ranks.pp_rank, ranks.edp_rank), state)
        return start

    def _save(self, run: Run, name: str, state: saved_state.State) -> None:
        problem = saved_state.save(self._folder / name, state)
        if problem:
            print(f" smartmoe: WARNING: {problem}; the decisions of this run cannot be replayed", flush=True)


def _stages(run: Run) -> tuple[Stage, ...]:
    """The layers of each pipeline stage. A collective call."""
    own = {run.ranks.pp_rank: [(number, passes_per_micro_batch(layer)) for number, layer in run.layers]}
    gathered: list[dict[int, list[tuple[int, int]]]] = [{}] * dist.get_world_size()
    dist.all_gather_object(gathered, own)
    stages = {stage: layers for of_rank in gathered for stage, layers in of_rank.items()}
    return tuple(
        Stage(layers=tuple(number for number, _ in stages[stage]), passes=tuple(passes for _, passes in stages[stage]))
        for stage in sorted(stages)
    )
