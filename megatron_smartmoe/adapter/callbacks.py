"""What happens at Megatron's hooks in a run: a callback for each thing that the flags ask for."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_smartmoe.adapter.hooks import Callback
    from megatron_smartmoe.adapter.moe.overlap_degree import OverlapDegree


def callbacks_for(args: Namespace, overlap_degree: OverlapDegree) -> list[Callback]:
    """What the flags ask for; `hooks.Order` says which is called first."""
    from megatron_smartmoe.adapter.flags.pool_settings import modes_of
    from megatron_smartmoe.adapter.gates.steps import GateSteps
    from megatron_smartmoe.adapter.gates.table import has_router
    from megatron_smartmoe.adapter.loops.homes import HomesLoop
    from megatron_smartmoe.adapter.loops.pool import PoolLoop
    from megatron_smartmoe.adapter.loops.replicas import ReplicaLoop
    from megatron_smartmoe.adapter.records.account import StepAccount, measures_steps
    from megatron_smartmoe.adapter.records.chosen import ChosenRecorder
    from megatron_smartmoe.adapter.records.decisions import DecisionRecorder
    from megatron_smartmoe.adapter.records.metrics import Metrics
    from megatron_smartmoe.adapter.records.progress import ProgressRecorder
    from megatron_smartmoe.adapter.records.replay import RoutingReplay
    from megatron_smartmoe.adapter.records.trace import TraceRecorder

    homes = replicas = None
    if args.smartmoe and args.smartmoe_homes != "off" and args.expert_model_parallel_size > 1:
        homes = HomesLoop()
    if args.smartmoe and (modes := modes_of(args)) != {"off"}:
        replicas = ReplicaLoop(modes)
    pool = PoolLoop(homes, replicas, overlap_degree) if args.smartmoe_pool is not None else None
    account = StepAccount() if measures_steps(args) else None
    wanted: list[Callback | None] = [
        ProgressRecorder(args) if args.smartmoe_watchdog == "on" else None,
        RoutingReplay(Path(args.smartmoe_replay_trace)) if args.smartmoe_replay_trace is not None else None,
        GateSteps() if has_router(args.smartmoe_gate) else None,
        account,
        Metrics(account),
        ChosenRecorder(overlap_degree) if args.smartmoe and args.num_experts is not None else None,
        homes,
        replicas,
        pool,
    ]
    if args.smartmoe_record_trace is not None:
        path = Path(args.smartmoe_record_trace)
        wanted.append(TraceRecorder(path, micro_batches=args.smartmoe_record_micro_batches))
        if homes is not None or replicas is not None or pool is not None:
            wanted.append(DecisionRecorder(homes, replicas, pool, path))
    return [callback for callback in wanted if callback is not None]
