#!/usr/bin/env python3
"""What balancing is worth in a training step: routing replayed from a trace, balancing off and on, in one table.

    OMP_NUM_THREADS=1 .venv/bin/python scripts/bench_balance.py --trace F.npz [--ep 2 4 8] [--steps N] [--first RECORD]

Real training on gloo ranks, one thread each, through the real entry; only the routers' choices come from the trace.
The model is small and its experts are large, so that expert compute dominates as it does on GPUs. Variants:

    off         --smartmoe without balancing
    stock       Megatron's own MoE layer
    homes       experts move to other ranks when that pays off
    history     one spare slot per rank, replicas planned from earlier iterations
    exact       one spare slot per rank, replicas planned from each micro-batch's counts
    ultraep     the same executor, replicas and token split by UltraEP's rule, one spare slot, exact counts
    fastermoe   the same executor, shadows by FasterMoE's rule (with this machine's constants), memory for all of them

Reported per step: wall time; the CPU time of the busiest rank, which is what the wall time would be with a core for
each rank, and the figure to compare when there are more ranks than cores; and max / mean tokens per rank at the
experts. Medians over the steps after the warm-up, the busiest rank of every step. UltraEP, EPLB and others that
relocate homes every time are in `smartmoe simulate`; here homes stay, because a move must carry the optimizer's state
along.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

HIDDEN, FFN = 256, 1024
MODEL = (
    f"--num-layers 2 --hidden-size {HIDDEN} --num-attention-heads 4 --ffn-hidden-size {FFN} --seq-length 512 "
    f"--max-position-embeddings 512 --position-embedding-type rope --normalization RMSNorm --swiglu "
    f"--disable-bias-linear --untie-embeddings-and-output-weights --attention-dropout 0 --hidden-dropout 0 "
    f"--moe-ffn-hidden-size {FFN} --moe-router-load-balancing-type none --moe-router-dtype fp32"
).split()
TRAINING = (
    "--micro-batch-size 1 --lr 1e-4 --lr-decay-style constant --eval-iters 0 --eval-interval 100000 "
    "--log-interval 1 --logging-level 40 --rerun-mode disabled --mock-data --tokenizer-type NullTokenizer "
    "--vocab-size 1023 --num-workers 0"
).split()
WARM_UP = 5  # steps
NETWORK_BYTES_S, RANK_FLOP_S = 1.4e9, 46e9  # nominal rates of the shipped cluster `cpu`, rounded
WITHOUT_BALANCING = ["--smartmoe", "--smartmoe-homes", "off"]
SPARE = [*WITHOUT_BALANCING, "--smartmoe-spare-slots", "1", "--smartmoe-replicas-margin", "0"]
EXACT = [*SPARE, "--smartmoe-replicas", "exact"]
VARIANTS = {
    "off": WITHOUT_BALANCING,
    "stock": [],
    "homes": ["--smartmoe", "--smartmoe-homes-interval", "5"],
    "history": SPARE,
    "exact": EXACT,
    "ultraep": EXACT,
    "fastermoe": EXACT,
}


@dataclass(frozen=True, kw_only=True)
class Steps:
    """Wall and CPU seconds of each step on each rank, `[step, rank]`, and max / mean tokens per rank of each step."""

    wall: np.ndarray
    cpu: np.ndarray
    balance: list[float]

    def row(self) -> tuple[float, float, float]:
        """Medians over the steps of the slowest rank's wall and CPU time, and the mean balance."""
        wall, cpu = (statistics.median(times[WARM_UP:].max(axis=1)) for times in (self.wall, self.cpu))
        return wall, cpu, float(np.mean(self.balance[WARM_UP:])) if self.balance else float("nan")


def run(variant: str, trace: Path, ranks: int, steps: int, experts: int, top_k: int) -> Steps:
    """Train for `steps` steps in a new process per rank."""
    with tempfile.TemporaryDirectory() as run_dir:
        flags = [*MODEL, *TRAINING, *VARIANTS[variant], "--num-experts", str(experts)]
        flags += ["--moe-router-topk", str(top_k), "--expert-model-parallel-size", str(ranks)]
        flags += ["--global-batch-size", str(ranks), "--train-iters", str(steps), "--smartmoe-run-dir", run_dir]
        flags += ["--smartmoe-replay-trace", str(trace)]
        if variant == "fastermoe":
            flags += ["--smartmoe-spare-slots", str(experts - experts // ranks)]
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--standalone"]
        command += [__file__, "--rank", variant, run_dir, "--", *flags]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(done.stdout[-2000:] + done.stderr[-6000:])
        times = np.stack([np.load(Path(run_dir) / f"times{rank}.npy") for rank in range(ranks)], axis=1)
        lines = Path(run_dir) / "balance-stage0-group0.jsonl"
        balance = [float(np.mean(json.loads(line)["split"])) for line in lines.open()] if lines.exists() else []
    return Steps(wall=times[..., 0], cpu=times[..., 1], balance=balance)


def rank_main(variant: str, run_dir: str, flags: list[str]) -> None:
    """Run Megatron's pretraining on one rank, with a timer around each step."""
    from megatron_smartmoe.adapter.hooks import Callback, Order
    from megatron_smartmoe.adapter.pretrain import main

    times: list[tuple[float, float]] = []

    class Start(Callback):
        order = Order.REPLAY  # before what the loops do ahead of a step

        def before_step(self, iteration: int) -> None:
            self.started = time.perf_counter(), time.process_time()

    class Stop(Callback):
        order = Order.LAST

        def after_step(self, iteration: int, losses: Any) -> None:
            wall, cpu = start.started
            times.append((time.perf_counter() - wall, time.process_time() - cpu))

    start = Start()
    if variant in ("ultraep", "fastermoe"):
        follow_rule(variant)
    main(flags, callbacks=[start, Stop()])
    np.save(Path(run_dir) / f"times{os.environ['RANK']}.npy", np.array(times))


def follow_rule(name: str) -> None:
    """Have the executor place replicas and split tokens by a peer's rule."""
    import megatron_smartmoe.runtime.replicas.dispatch_plan as dispatch_plan
    from megatron_smartmoe.placement.layer_plan import LayerPlan, LayerProblem, Rule, tokens_by_rank
    from megatron_smartmoe.placement.split import assign_sources
    from megatron_smartmoe.simulate.baselines.fastermoe import FasterMoE
    from megatron_smartmoe.simulate.baselines.ultraep import UltraEp

    rule: Rule = UltraEp()
    if name == "fastermoe":
        rule = FasterMoE(
            hidden=HIDDEN,
            ffn_factor=1.5 * FFN / HIDDEN,  # SwiGLU has three matrices where FasterMoE's formula assumes two
            network_bytes_s=NETWORK_BYTES_S,
            gpu_flops=RANK_FLOP_S,
            element_bytes=4,
        )
    latest: list[LayerPlan] = []

    def exact_slots(counts_RE: Any, slots_RS: Any, home_slots: int, **prices: Any) -> Any:
        num_slots = slots_RS.shape[1]
        problem = LayerProblem(counts_RE=counts_RE, slots_RS=slots_RS, spare_slots=num_slots - home_slots)
        plan = rule.plan(problem)
        latest[:] = [plan]
        assert (plan.slots_RS[:, :home_slots] == slots_RS[:, :home_slots]).all(), f"{name} moves homes"
        missing = num_slots - plan.slots_RS.shape[1]
        return np.pad(plan.slots_RS, ((0, 0), (0, missing)), constant_values=-1)

    def split_tokens(counts_RE: Any, slots_RS: Any, home_slots: int, num_nodes: int = 1) -> Any:
        tokens_ER = _whole(tokens_by_rank(latest[0], counts_RE), counts_RE.sum(axis=0))
        return assign_sources(counts_RE, slots_RS, tokens_ER, num_nodes)

    # The rules plan in Python, some tenths of a millisecond a layer and micro-batch more than the compiled plan.
    def plan(self: Any, counts_RPE: Any, slots_RS: Any, exact: Any = None) -> Any:
        return dispatch_plan.plan_in_steps(self.view, counts_RPE, slots_RS, exact)

    dispatch_plan.exact_slots = exact_slots
    dispatch_plan.split_tokens = split_tokens
    dispatch_plan.DispatchPlanner.plan = plan  # type: ignore[method-assign]


def _whole(tokens_ER: np.ndarray, load_E: np.ndarray) -> np.ndarray:
    """Whole tokens with the same sum for every expert, the largest remainders rounded up."""
    whole_ER = np.floor(tokens_ER + 1e-9).astype(np.int64)
    for expert, missing in enumerate(load_E - whole_ER.sum(axis=1)):
        whole_ER[expert, np.argsort(whole_ER[expert] - tokens_ER[expert], kind="stable")[:missing]] += 1
    return whole_ER


def main() -> None:
    """Run every variant and print the table."""
    if sys.argv[1:2] == ["--rank"]:
        rank_main(sys.argv[2], sys.argv[3], sys.argv[5:])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", type=Path, required=True)
    parser.add_argument("--ep", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--first", type=int, default=100, help="record of the trace that the runs begin with")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    args = parser.parse_args()
    from megatron_smartmoe.spec.trace import RoutingTrace, load_trace

    whole = load_trace(args.trace)
    part = slice(args.first, args.first + args.steps)
    with tempfile.TemporaryDirectory() as folder:
        part_path = Path(folder) / "part.npz"
        RoutingTrace(
            counts=whole.counts[part], iteration=whole.iteration[part], layer=whole.layer, meta=whole.meta
        ).save(part_path)
        print(
            f"{'EP':>3} {'variant':<10} {'wall ms':>9} {'busiest rank CPU ms':>20} {'off / this':>11} {'max/mean':>9}"
        )
        for ranks in args.ep:
            off = float("nan")
            for variant in args.variants:
                steps = run(variant, part_path, ranks, args.steps, whole.num_experts, int(whole.meta["top_k"]))
                wall, cpu, balance = steps.row()
                off = cpu if variant == "off" else off
                line = f"{ranks:>3} {variant:<10} {wall * 1e3:>9.1f} {cpu * 1e3:>20.1f} {off / cpu:>11.2f}"
                print(f"{line} {'-':>9}" if np.isnan(balance) else f"{line} {balance:>9.4f}", flush=True)


if __name__ == "__main__":
    main()
