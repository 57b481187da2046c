#!/usr/bin/env python3
"""Time the host ops of the placement and their numpy twins, in one process on one core; or compare balance.

    python scripts/bench_placement.py                     256 experts on 64 ranks, 1 and 2 spare slots
    python scripts/bench_placement.py --ranks 32 --repeats 1000
    python scripts/bench_placement.py --host              host time of a layer's dispatch, from the counts on
    python scripts/bench_placement.py --search            balance and time of exact replicas, greedy and searched
    python scripts/bench_placement.py --history           planning a layer from history, C++ against numpy
    python scripts/bench_placement.py --hard              the slowest plans from history, of loads that are hard to plan
    python scripts/bench_placement.py --ahead             what planning from history costs the training loop
    python scripts/bench_placement.py --balance           bursts and drift: ours against EPLB's and UltraEP's rules

Every draw is checked: the compiled ops must give the very slots and tokens of the twins. A call is timed with warm
caches and with its way through the dispatcher. A draw's time is the median of its calls; the table has the median over
draws of fresh lognormal loads, and the worst draw. The steps:

    split               on replicas planned for this load
    split, drifted      on replicas planned before each expert's load changed by a lognormal factor (--drift)
    replicas + split    all that a micro-batch needs: sum of the counts, new replicas, hosts, split

`--host` times all that a rank does between the arrival of the counts and the launch of the permutation: plan, this
rank's replicas, sizes of the exchange. One call of the library and the same steps in Python take turns; the table has
the median and the 90th percentile of the thread's CPU time.

`--ahead` plans all layers of a stage from history, 2 micro-batches a record and a load that drifts by 5%, in the step
and on a thread while the step before computes (here: waits) for --step-s seconds. The table has the wall time for which
the training loop is held up, and its thread's CPU time; the plans are compared and equal.

`--balance` replays synthetic traces whose load jumps (one expert 4, 8 or 16 times as popular for a third of every 24,
12 or 6 records) or drifts (2%, 5% or 20% a record), two seeds each. Its table has the mean of max / mean tokens per
rank and, after the slash, the worst record. It needs no compiled library.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout, when the script is run by its path

from megatron_smartmoe import ops
from megatron_smartmoe.cost.moe_layer import LayerConstants
from megatron_smartmoe.cost.replicas import LegPrice, TransferPrice
from megatron_smartmoe.placement.exact_replicas import exact_replicas
from megatron_smartmoe.placement.history import History, HistoryOptions
from megatron_smartmoe.placement.layer_cost import PricedLayer
from megatron_smartmoe.placement.layer_plan import Rule
from megatron_smartmoe.placement.online_options import OnlineOptions
from megatron_smartmoe.placement.plan_replicas import ReplicaOptions, best_replicas
from megatron_smartmoe.placement.replica_planner import ReplicaPlanner
from megatron_smartmoe.placement.replica_scope import cheapest_replicas
from megatron_smartmoe.placement.split import best_balance, min_max_split
from megatron_smartmoe.runtime.replicas.ahead import PlansAhead
from megatron_smartmoe.runtime.replicas.dispatch_plan import (
    DispatchPlanner,
    ExactOptions,
    RankView,
    plan_in_steps,
)
from megatron_smartmoe.runtime.replicas.history_plan import compiled_best_replicas
from megatron_smartmoe.runtime.replicas.kernels import fastest_kernels
from megatron_smartmoe.simulate.baselines.eplb import Eplb
from megatron_smartmoe.simulate.baselines.ultraep import UltraEp
from megatron_smartmoe.simulate.policies import OnlinePolicy, RulePolicy, SimulatedPolicy
from megatron_smartmoe.simulate.run import SimulationSetup, replay
from megatron_smartmoe.spec.arrays import FloatArray, IntArray
from megatron_smartmoe.spec.placement import EMPTY, Placement, hosts_of
from megatron_smartmoe.spec.trace import RoutingTrace
from tests.support.synthetic import SyntheticSpec, synthetic_trace


@dataclass(frozen=True, kw_only=True)
class Draw:
    """One layer's problem.

    Attributes:
        counts_RE: tokens of source rank r for expert e.
        slots_RS: homes and empty spare slots.
        home_slots: columns of homes.
    """

    counts_RE: IntArray
    slots_RS: IntArray
    home_slots: int


def draw(rng: np.random.Generator, num_ranks: int, num_experts: int, spare: int, tokens: int, sigma: float) -> Draw:
    """Counts of a lognormal popularity, drawn token by token, and contiguous homes."""
    popularity = rng.lognormal(0, sigma, num_experts)
    home_RH = np.arange(num_experts).reshape(num_ranks, -1)
    return Draw(
        counts_RE=rng.multinomial(tokens, popularity / popularity.sum(), size=num_ranks),
        slots_RS=np.pad(home_RH, ((0, 0), (0, spare)), constant_values=EMPTY),
        home_slots=num_experts // num_ranks,
    )


def drift(rng: np.random.Generator, problem: Draw, sigma: float) -> Draw:
    """The same problem with each expert's counts multiplied by a lognormal factor."""
    factor_E = rng.lognormal(0, sigma, problem.counts_RE.shape[1])
    return replace(problem, counts_RE=(problem.counts_RE * factor_E).astype(np.int64))


def numpy_step(problem: Draw) -> IntArray:
    """Replicas and split by the twins."""
    counts_RE = problem.counts_RE
    slots_RS = exact_replicas(counts_RE.sum(axis=0), problem.slots_RS, problem.home_slots)
    return min_max_split(counts_RE, hosts_of(slots_RS, counts_RE.shape[1]))


def compiled_step(counts_RE: torch.Tensor, slots_RS: torch.Tensor, home_slots: int) -> torch.Tensor:
    """Replicas and split by the ops."""
    new_RS = ops.exact_replicas(counts_RE.sum(0), slots_RS, home_slots)
    hosts_ER = torch.from_numpy(hosts_of(new_RS.numpy(), counts_RE.shape[1]))
    return ops.min_max_split(counts_RE, hosts_ER)


def check_equal(found: torch.Tensor, expected: IntArray) -> None:
    """Exit with an error when an op and its twin disagree."""
    if not np.array_equal(found.numpy(), expected):
        sys.exit("the compiled ops and their twins disagree: tests/unit/ops/test_placement.py finds where")


def fewer(repeats: int) -> int:
    """Repeats for a twin, which takes far longer than its op."""
    return max(1, repeats // 20)


def time_us(call: Callable[[], object], repeats: int) -> float:
    """Median time of a call after one that warms the caches, in us."""
    call()
    times_us = []
    for _ in range(repeats):
        start_ns = time.perf_counter_ns()
        call()
        times_us.append((time.perf_counter_ns() - start_ns) / 1000)
    return statistics.median(times_us)


def time_split(problem: Draw, slots_RS: IntArray, repeats: int) -> tuple[float, float]:
    """Check and time the split with given slots, in us: op and twin."""
    hosts_ER = hosts_of(slots_RS, problem.counts_RE.shape[1])
    args = torch.from_numpy(problem.counts_RE), torch.from_numpy(hosts_ER)
    check_equal(ops.min_max_split(*args), min_max_split(problem.counts_RE, hosts_ER))
    return (
        time_us(lambda: ops.min_max_split(*args), repeats),
        time_us(lambda: min_max_split(problem.counts_RE, hosts_ER), fewer(repeats)),
    )


def time_step(problem: Draw, repeats: int) -> tuple[float, float]:
    """Check and time replicas + split, in us: ops and twins."""
    args = torch.from_numpy(problem.counts_RE), torch.from_numpy(problem.slots_RS), problem.home_slots
    check_equal(compiled_step(*args), numpy_step(problem))
    return time_us(lambda: compiled_step(*args), repeats), time_us(lambda: numpy_step(problem), fewer(repeats))


def plan(problem: Draw) -> IntArray:
    """Slots with the replicas for this load, checked."""
    load_E = problem.counts_RE.sum(axis=0)
    expected_RS = exact_replicas(load_E, problem.slots_RS, problem.home_slots)
    found_RS = ops.exact_replicas(torch.from_numpy(load_E), torch.from_numpy(problem.slots_RS), problem.home_slots)
    check_equal(found_RS, expected_RS)
    return expected_RS


def cpu_name() -> str:
    """The processor as Linux names it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), platform.machine())


HOST_SHAPES = ((32, 8, 1, 1), (64, 8, 1, 1), (256, 32, 1, 1), (256, 64, 1, 1), (256, 64, 1, 8), (256, 64, 2, 8))


def host_calls(problem: Draw, spare: int, nodes: int) -> tuple[Callable[[], object], Callable[[], object]]:
    """What rank 0 does from the counts to the permutation: by one call of the library, and in steps."""
    ranks, experts = problem.counts_RE.shape
    view = RankView(
        num_ranks=ranks,
        tp_size=1,
        num_experts=experts,
        num_slots=problem.slots_RS.shape[1],
        num_nodes=nodes,
        rank=0,
        tp_rank=0,
    )
    planner, exact = DispatchPlanner(view), ExactOptions(used_slots=spare, num_nodes=nodes)
    counts_RPE = torch.from_numpy(problem.counts_RE).view(ranks, 1, experts)

    return (
        lambda: planner.plan(counts_RPE, problem.slots_RS, exact),
        lambda: plan_in_steps(view, counts_RPE, problem.slots_RS, exact),
    )


def host_table(tokens: int, sigma: float, repeats: int) -> None:
    """Print the host time of a layer's dispatch for some groups: experts, ranks, spare slots, nodes."""
    print(f"{cpu_name()}, one core; torch {torch.__version__}; {tokens} tokens x top-k a rank, lognormal sigma {sigma}")
    print(f"{'experts':>7} {'ranks':>5} {'spare':>5} {'nodes':>5} {'one call us':>13} {'in steps us':>15} {'times':>6}")
    rng = np.random.default_rng(0)
    for experts, ranks, spare, nodes in HOST_SHAPES:
        calls = host_calls(draw(rng, ranks, experts, spare, tokens, sigma), spare, nodes)
        times_us: list[list[float]] = [[], []]
        for _ in range(repeats):
            for call, spent_us in zip(calls, times_us, strict=True):
                start_ns = time.thread_time_ns()
                call()
                spent_us.append((time.thread_time_ns() - start_ns) / 1000)
        once, steps = (f"{np.median(us):.0f} ({np.percentile(us, 90):.0f})" for us in times_us)
        ratio = np.median(times_us[1]) / np.median(times_us[0])
        print(f"{experts:>7} {ranks:>5} {spare:>5} {nodes:>5} {once:>13} {steps:>15} {ratio:>6.1f}", flush=True)


HISTORY_SHAPES = ((32, 8, 1), (64, 16, 1), (256, 32, 1), (256, 64, 1), (256, 64, 2))  # experts, ranks, spare slots


def history_table(records: int) -> None:
    """Print the time to plan a layer from history while its load drifts by 5% a record, for C++ and numpy in turns."""
    print("| experts | ranks | spare slots | C++ ms | numpy ms |\n|---|---|---|---|---|")
    for experts, ranks, spare in HISTORY_SHAPES:
        rng, times_ms = np.random.default_rng(0), np.empty((records, 2))
        problem = draw(rng, ranks, experts, spare, 1, 0.0)
        slots_RS, popularity = problem.slots_RS, rng.lognormal(0, 1, experts)
        history = History(1, experts, HistoryOptions.for_ranks(ranks))
        for record in range(records):
            popularity *= rng.lognormal(0, 0.05, experts)
            history.update(rng.multinomial(8192 * ranks, popularity / popularity.sum())[None, None])
            found = []
            for column, best in enumerate((compiled_best_replicas, best_replicas)):
                start_ns = time.thread_time_ns()
                found.append(best(slots_RS, history.scenarios_KE(0), problem.home_slots, ReplicaOptions()))
                times_ms[record, column] = (time.thread_time_ns() - start_ns) / 1e6
            check_equal(torch.from_numpy(found[0].slots_RS), found[1].slots_RS)
            slots_RS = found[0].slots_RS
        texts = [f"{np.median(column):.2f} ({column.max():.1f})" for column in times_ms[2:].T]
        print(f"| {experts} | {ranks} | {spare} | {' | '.join(texts)} |", flush=True)


HARD_KINDS = ("fresh", "drift", "burst", "rotating", "Zipf")
# of replicas of 4096 x 1536 experts on H100 with 4 micro-batches an iteration, rounded; as if half was not hidden
HARD_PRICE = TransferPrice(
    fetch=LegPrice(inside_tokens=300.0, between_tokens=2700.0, hidden_tokens=3000.0),
    back=LegPrice(inside_tokens=600.0, between_tokens=5400.0, hidden_tokens=5000.0),
)


def hard_loads(kind: str, records: int, experts: int, ranks: int, rng: np.random.Generator) -> Iterator[IntArray]:
    """Counts `[M, E]` of 4 micro-batches whose popularities differ by a tenth, record by record."""
    popularity = rng.lognormal(0, 1, experts)
    for record in range(records):
        if kind == "drift":
            popularity = popularity * rng.lognormal(0, 0.2, experts)
        elif kind == "fresh":
            popularity = rng.lognormal(0, 1, experts)
        elif kind == "Zipf" and record % 4 == 0:
            popularity = 1 / rng.permutation(np.arange(1.0, experts + 1))
        now = popularity.copy()
        if kind == "rotating":
            now[:] = 1.0
            now[record // 3 * experts // 8 % experts :][: experts // 8] = 8.0
        if kind == "burst" and record % 3 == 0:
            now[rng.integers(experts)] *= 16
        shares = now * rng.lognormal(0, 0.1, (4, experts))
        yield np.stack([rng.multinomial(2048 * ranks, share / share.sum()) for share in shares])


def hard_table(records: int) -> None:
    """Print the time of all that plans a layer from history, scenarios and pricing included, on one node and on 8."""
    experts, ranks, home_slots, kernels = 256, 64, 4, fastest_kernels()
    print("| load | spare slots | nodes | median ms | slowest ms |\n|---|---|---|---|---|")
    for kind, spare, nodes in itertools.product(HARD_KINDS, (1, 2), (1, 8)):
        rng, times_ms = np.random.default_rng(0), list[float]()
        slots_RS = draw(rng, ranks, experts, spare, 1, 0.0).slots_RS
        history = History(1, experts, HistoryOptions.for_ranks(ranks))
        options = ReplicaOptions(num_nodes=nodes, or_group=True, price=replace(HARD_PRICE, num_nodes=nodes))
        for counts_ME in hard_loads(kind, records, experts, ranks, rng):
            history.update(counts_ME[None])
            start_ns = time.thread_time_ns()
            found = cheapest_replicas(slots_RS, history.scenarios_KE(0), home_slots, options, 8192.0, kernels)
            times_ms.append((time.thread_time_ns() - start_ns) / 1e6)
            slots_RS = found.slots_RS
        print(f"| {kind} | {spare} | {nodes} | {np.median(times_ms):.2f} | {max(times_ms[2:]):.2f} |", flush=True)


AHEAD_SHAPES = ((58, 256, 64, 1), (58, 256, 64, 2), (12, 64, 16, 1))  # layers, experts, ranks, spare slots


def ahead_table(records: int, step_s: float) -> None:
    """Print what planning from history costs the training loop in the step and on a thread, an iteration."""
    print("| layers | experts | ranks | spare slots | in the step: wall ms, CPU ms | on a thread: wall ms, CPU ms |")
    print("|---|---|---|---|---|---|")
    for layers, experts, ranks, spare in AHEAD_SHAPES:
        homes = Placement.contiguous(num_layers=layers, num_experts=experts, num_ranks=ranks, spare_slots=spare)
        in_step, on_thread = (ReplicaPlanner(homes, 0, OnlineOptions(), fastest_kernels()) for _ in range(2))
        ahead, rng, times_ms = PlansAhead(on_thread), np.random.default_rng(0), np.empty((records, 4))
        popularity_LE = rng.lognormal(0, 1, (layers, experts))
        for record in range(records):
            popularity_LE *= rng.lognormal(0, 0.05, popularity_LE.shape)
            share_LME = (popularity_LE / popularity_LE.sum(axis=1, keepdims=True))[:, None].repeat(2, axis=1)
            counts_LME = rng.poisson(8192 * ranks / 2 * share_LME)
            begin = _clocks_ms()
            in_step.observe(counts_LME)
            in_step.plan(record)
            middle = _clocks_ms()
            ahead.start(record, lambda counts_LME=counts_LME: counts_LME)  # type: ignore[misc]
            started = _clocks_ms()
            time.sleep(step_s)
            asked = _clocks_ms()
            ahead.plan(record)
            times_ms[record] = *(middle - begin), *(started - middle + _clocks_ms() - asked)
            assert on_thread.placement == in_step.placement, "the plans differ"
        wall_ms, cpu_ms, ahead_wall_ms, ahead_cpu_ms = np.median(times_ms[2:], axis=0)
        sizes = f"{layers} | {experts} | {ranks} | {spare}"
        print(f"| {sizes} | {wall_ms:.0f}, {cpu_ms:.0f} | {ahead_wall_ms:.2f}, {ahead_cpu_ms:.2f} |", flush=True)


def _clocks_ms() -> FloatArray:
    """Wall time and this thread's CPU time."""
    return np.array([time.perf_counter(), time.thread_time()]) * 1e3


SEARCH_SHAPES = ((64, 8), (128, 8), (128, 16), (256, 32), (256, 64))


def search_table(draws: int) -> None:
    """Print the balance of exact replicas and the op's time, without and with the search behind the greedy pass."""
    print("| experts | ranks | sigma | greedy | us | searched | us |\n|---|---|---|---|---|---|---|")
    for (experts, ranks), sigma in itertools.product(SEARCH_SHAPES, (0.5, 1.0, 1.5)):
        rng, texts = np.random.default_rng(1), list[str]()
        problems = [draw(rng, ranks, experts, 1, 16384, sigma) for _ in range(draws)]
        for trials in (0, ops.TRIALS):
            balance, times_us = list[float](), list[float]()
            for problem in problems:
                load_E, slots_RS = problem.counts_RE.sum(axis=0), torch.from_numpy(problem.slots_RS)
                args = torch.from_numpy(load_E), slots_RS, problem.home_slots, 1, trials
                hosts_ER = hosts_of(ops.exact_replicas(*args).numpy(), experts)
                balance.append(best_balance(hosts_ER, load_E).bound * ranks / int(load_E.sum()))
                times_us.append(thread_us(functools.partial(ops.exact_replicas, *args), 15))
            texts += [f"{statistics.mean(balance):.4f}, {max(balance):.4f}"]
            texts += [f"{statistics.median(times_us):.0f}, {max(times_us):.0f}"]
        print(f"| {experts} | {ranks} | {sigma} | {' | '.join(texts)} |", flush=True)


def thread_us(call: Callable[[], object], repeats: int) -> float:
    """Median CPU time of a call in this thread, in us."""
    times_us = []
    for _ in range(repeats):
        start_ns = time.thread_time_ns()
        call()
        times_us.append((time.thread_time_ns() - start_ns) / 1000)
    return statistics.median(times_us)


SHAPES = ((32, 4), (32, 8), (32, 16), (64, 16), (256, 64))  # experts, ranks
BURSTS = ({"burst_factor": 8.0, "burst_every": 12}, {"burst_factor": 4.0, "burst_every": 24},
          {"burst_factor": 16.0, "burst_every": 6})  # fmt: skip
DRIFTS = ({"drift": 0.02}, {"drift": 0.05}, {"drift": 0.2})
RIVALS: dict[str, Rule] = {
    "EPLB": Eplb(), "UltraEP, history": UltraEp(sees="history", min_tokens_per_replica=1),
    "UltraEP, exact": UltraEp(min_tokens_per_replica=1),
}  # fmt: skip


def balance_table() -> None:
    """Print a line for each kind of load, shape and number of spare slots, over all of its traces."""
    columns = ["ours, history", "ours, auto", *RIVALS]
    print(f"{'load':<9}{'experts':>8}{'ranks':>6}{'slots':>6}" + "".join(f"{name:>20}" for name in columns))
    behind = 0
    for kind, variants in (("burst", BURSTS), ("drifting", DRIFTS)):
        for (experts, ranks), spare in itertools.product(SHAPES, (1, 2)):
            traces = [burst_or_drift(kind, experts, ranks, seed, v) for v in variants for seed in (0, 1)]
            found = [balance_of(trace, ranks, spare) for trace in traces]
            rivals = [min(f["EPLB"].mean(), f["UltraEP, exact"].mean()) for f in found]
            behind += sum(bool(f["ours, auto"].mean() > rival) for f, rival in zip(found, rivals, strict=True))
            line = ""
            for name in columns:
                mean = np.mean([f[name].mean() for f in found])
                line += f"{f'{mean:.4f} / {max(f[name].max() for f in found):.2f}':>20}"
            print(f"{kind:<9}{experts:>8}{ranks:>6}{spare:>6}{line}", flush=True)
    print(f"traces on which ours, auto, has a larger mean than EPLB or UltraEP with the exact counts: {behind}")


def burst_or_drift(kind: str, experts: int, ranks: int, seed: int, changes: dict[str, Any]) -> RoutingTrace:
    """A trace of 36 records of one layer."""
    return synthetic_trace(
        SyntheticSpec(
            kind=kind,
            num_experts=experts,
            num_sources=ranks,
            seed=seed,
            num_records=36,
            num_layers=1,
            tokens_per_source=4096,
            **changes,
        )
    )


def balance_of(trace: RoutingTrace, ranks: int, spare: int) -> dict[str, FloatArray]:
    """Imbalance of every record and layer after warm-up, by policy; ours with its homes loop, every 100 iterations."""
    setup = SimulationSetup(
        num_ranks=ranks,
        spare_slots=spare,
        warmup=trace.num_records // 5,
        constants=LayerConstants(token_s=1e-6),
        state_bytes=0,
    )
    start = Placement.contiguous(
        num_layers=trace.num_layers, num_experts=trace.num_experts, num_ranks=ranks, spare_slots=spare
    )
    policies: dict[str, SimulatedPolicy] = {}
    for mode in ("history", "auto"):
        options = OnlineOptions(replicas=mode)
        policies[f"ours, {mode}"] = OnlinePolicy(start, 1, options, PricedLayer(pricing=setup.pricing))
    for name, rule in RIVALS.items():
        policies[name] = RulePolicy(rule, start, num_groups=1, num_nodes=1, interval=1)
    return {name: replay(trace, policy, setup).imbalance for name, policy in policies.items()}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description="Time the placement ops against their numpy twins.")
    parser.add_argument("--ranks", type=int, default=64, help="expert-parallel ranks")
    parser.add_argument("--experts", type=int, default=256, help="experts of a layer, a multiple of the ranks")
    parser.add_argument("--tokens", type=int, default=8192, help="tokens x top-k of each source rank")
    parser.add_argument("--sigma", type=float, default=1.0, help="of the lognormal popularity")
    parser.add_argument("--drift", type=float, default=0.2, help="sigma of the factor that changes a load afterwards")
    parser.add_argument("--draws", type=int, default=20, help="fresh loads per line")
    parser.add_argument("--repeats", type=int, default=200, help="calls timed per draw (a twentieth of them in numpy)")
    parser.add_argument("--seed", type=int, default=0, help="of the draws")
    parser.add_argument("--host", action="store_true", help="time a layer's dispatch from the counts on instead")
    parser.add_argument("--history", action="store_true", help="time the planning of a layer from history instead")
    parser.add_argument("--hard", action="store_true", help="the slowest plans from history of hard loads instead")
    parser.add_argument("--ahead", action="store_true", help="what planning from history costs a step instead")
    parser.add_argument("--step-s", type=float, default=1.0, help="with --ahead: seconds of a step after its counts")
    parser.add_argument("--search", action="store_true", help="what the search of exact replicas is worth instead")
    parser.add_argument("--balance", action="store_true", help="compare balance under bursts and drift instead")
    args = parser.parse_args()
    if args.balance:
        balance_table()
        return
    if not ops.is_compiled():
        sys.exit("the compiled library is not built: python megatron_smartmoe/ops/_build.py")
    torch.set_num_threads(1)
    if args.history:
        history_table(30)
        return
    if args.hard:
        hard_table(24)
        return
    if args.ahead:
        ahead_table(8, args.step_s)
        return
    if args.search:
        search_table(32)
        return
    if args.host:
        host_table(args.tokens, args.sigma, args.repeats)
        return
    rng = np.random.default_rng(args.seed)
    print(
        f"{cpu_name()}, one core; torch {torch.__version__}, numpy {np.__version__}; {args.experts} experts on "
        f"{args.ranks} ranks, {args.tokens} tokens x top-k a rank, lognormal sigma {args.sigma}, {args.draws} draws"
    )
    print(f"{'spare':>5}  {'step':<16} {'C++ us':>8} {'worst us':>8} {'numpy us':>9} {'times':>6}")
    for spare in (1, 2):
        problems = [draw(rng, args.ranks, args.experts, spare, args.tokens, args.sigma) for _ in range(args.draws)]
        slots = [plan(problem) for problem in problems]
        drifted = [drift(rng, problem, args.drift) for problem in problems]
        steps = {
            "split": [time_split(problem, at, args.repeats) for problem, at in zip(problems, slots, strict=True)],
            "split, drifted": [time_split(later, at, args.repeats) for later, at in zip(drifted, slots, strict=True)],
            "replicas + split": [time_step(problem, args.repeats) for problem in problems],
        }
        for step, times_us in steps.items():
            cpp_us, numpy_us = (statistics.median(column) for column in zip(*times_us, strict=True))
            worst_us = max(cpp for cpp, _ in times_us)
            print(f"{spare:>5}  {step:<16} {cpp_us:>8.1f} {worst_us:>8.1f} {numpy_us:>9.1f} {numpy_us / cpp_us:>6.1f}")


if __name__ == "__main__":
    main()
